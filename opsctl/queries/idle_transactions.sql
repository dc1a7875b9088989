-- Sessions that hold a transaction open and do nothing.
SELECT
    pid,
    coalesce(nullif(application_name, ''), usename::text, '') AS application,
    extract(epoch FROM clock_timestamp() - state_change)::float8 AS seconds
FROM pg_stat_activity
WHERE starts_with(state, 'idle in transaction')
ORDER BY seconds DESC
