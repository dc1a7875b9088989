-- The bytes of our tables, indexes and TOAST apart.
SELECT
    relname::text AS name,
    pg_table_size(oid)::float8 AS table_bytes,
    pg_indexes_size(oid)::float8 AS index_bytes
FROM pg_class
WHERE relname IN ('whatsapp_auth', 'whatsapp_keys') AND relkind IN ('r', 'p') AND pg_table_is_visible(oid)
ORDER BY relname
