-- Our tables as the statistics have them: dead rows, the last vacuum (else the server's start), the cache.
SELECT
    tables.relname::text AS name,
    tables.n_live_tup AS live,
    tables.n_dead_tup AS dead,
    tables.n_dead_tup + tables.n_ins_since_vacuum AS written,
    greatest(tables.last_vacuum, tables.last_autovacuum) IS NOT NULL AS was_vacuumed,
    extract(
        epoch FROM now() - coalesce(greatest(tables.last_vacuum, tables.last_autovacuum), pg_postmaster_start_time())
    )::float8 AS vacuum_age_s,
    coalesce(blocks.heap_blks_hit + blocks.idx_blks_hit, 0) AS hits,
    coalesce(blocks.heap_blks_read + blocks.idx_blks_read, 0) AS reads
FROM pg_stat_user_tables AS tables
INNER JOIN pg_statio_user_tables AS blocks USING (relid)
WHERE tables.relname IN ('whatsapp_auth', 'whatsapp_keys') AND pg_table_is_visible(tables.relid)
ORDER BY tables.relname
