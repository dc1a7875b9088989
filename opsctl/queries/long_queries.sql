-- Queries that run, the longest first; their text is never read, because it may hold keys.
SELECT
    pid,
    coalesce(nullif(application_name, ''), pg_get_userbyid(usesysid)::text, '') AS application,
    extract(epoch FROM clock_timestamp() - query_start)::float8 AS seconds
FROM pg_stat_get_activity(NULL)
WHERE state = 'active' AND backend_type = 'client backend' AND pid <> pg_backend_pid()
ORDER BY seconds DESC
