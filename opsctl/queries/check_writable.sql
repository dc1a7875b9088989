-- Whether keys can be deleted here: locking a row wants UPDATE as well.
SELECT
    pg_is_in_recovery() OR current_setting('transaction_read_only')::boolean AS read_only,
    has_table_privilege('whatsapp_keys', 'DELETE')
    AND has_any_column_privilege('whatsapp_keys', 'UPDATE') AS may_delete,
    has_table_privilege('whatsapp_keys', 'INSERT') AS may_insert
