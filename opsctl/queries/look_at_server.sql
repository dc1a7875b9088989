-- Whether this server can be written, has connections left and holds our tables.
SELECT
    pg_is_in_recovery() AS in_recovery,
    current_setting('transaction_read_only')::boolean AS read_only,
    (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend') AS connections,
    current_setting('max_connections')::int
    - current_setting('superuser_reserved_connections')::int
    - coalesce(current_setting('reserved_connections', true)::int, 0) AS usable_connections,
    to_regclass('whatsapp_auth') IS NOT NULL AS has_auth,
    to_regclass('whatsapp_keys') IS NOT NULL AS has_keys
