-- One company's keys, streamed.
COPY (
    SELECT key_type, key_id, value, updated_at, expires_at
    FROM whatsapp_keys
    WHERE company_id = %(company_id)s
) TO STDOUT
