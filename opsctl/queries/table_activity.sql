-- Our tables as the statistics have them: dead rows, the last vacuum (else the server's start), the cache. It asks the
-- functions behind pg_stat_user_tables and pg_statio_user_tables: to plan those views takes longer than all the rest.
SELECT
    tables.relname::text AS name,
    pg_stat_get_live_tuples(tables.oid) AS live,
    pg_stat_get_dead_tuples(tables.oid) AS dead,
    pg_stat_get_dead_tuples(tables.oid) + pg_stat_get_ins_since_vacuum(tables.oid) AS written,
    vacuums.last_at IS NOT NULL AS was_vacuumed,
    extract(epoch FROM now() - coalesce(vacuums.last_at, pg_postmaster_start_time()))::float8 AS vacuum_age_s,
    blocks.hits::bigint AS hits,
    (blocks.fetched - blocks.hits)::bigint AS reads
FROM pg_class AS tables
CROSS JOIN LATERAL (
    SELECT greatest(pg_stat_get_last_vacuum_time(tables.oid), pg_stat_get_last_autovacuum_time(tables.oid)) AS last_at
) AS vacuums
CROSS JOIN LATERAL (
    SELECT sum(pg_stat_get_blocks_hit(part.oid)) AS hits, sum(pg_stat_get_blocks_fetched(part.oid)) AS fetched
    FROM (SELECT tables.oid UNION ALL SELECT indexrelid FROM pg_index WHERE indrelid = tables.oid) AS part (oid)
) AS blocks
WHERE
    tables.relname IN ('whatsapp_auth', 'whatsapp_keys')
    AND tables.relkind IN ('r', 'p')
    AND pg_table_is_visible(tables.oid)
ORDER BY tables.relname
