-- Sessions that hold a transaction open and do nothing.
SELECT
    pid,
    coalesce(nullif(application_name, ''), pg_get_userbyid(usesysid)::text, '') AS application,
    extract(epoch FROM clock_timestamp() - state_change)::float8 AS seconds
FROM pg_stat_get_activity(NULL)
WHERE starts_with(state, 'idle in transaction')
ORDER BY seconds DESC
