-- The keys of one company that this transaction has written, streamed.
COPY (
    SELECT key_type, key_id, value, updated_at, expires_at
    FROM whatsapp_keys
    WHERE company_id = %(company_id)s AND xmin = pg_current_xact_id()::xid
) TO STDOUT
