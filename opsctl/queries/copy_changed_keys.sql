-- One company's keys, streamed; without the values of those that no transaction from `since` on has written. Transactions
-- are numbered with 32 bits, round and round, so "from `since` on" is less than half a turn ahead of it.
COPY (
    SELECT
        key_type,
        key_id,
        CASE WHEN ((xmin::text::bigint - %(since)s) & 4294967295) < 2147483648 THEN value::text ELSE '' END AS value,
        updated_at,
        expires_at
    FROM whatsapp_keys
    WHERE company_id = %(company_id)s
) TO STDOUT
