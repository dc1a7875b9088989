-- Who waits for a lock, how long, for what, and who holds it. pg_locks is shown to everybody.
SELECT
    waiting.pid,
    coalesce(extract(epoch FROM clock_timestamp() - waiting.waitstart), 0)::float8 AS seconds,
    coalesce(waiting.relation::regclass::text, waiting.locktype) AS wanted,
    blocker.pid AS blocker_pid,
    coalesce(nullif(activity.application_name, ''), pg_get_userbyid(activity.usesysid)::text, '') AS blocker,
    coalesce(activity.state, '') AS blocker_state
FROM pg_locks AS waiting
CROSS JOIN LATERAL unnest(pg_blocking_pids(waiting.pid)) AS blocker (pid)
LEFT JOIN LATERAL pg_stat_get_activity(blocker.pid) AS activity ON true
WHERE NOT waiting.granted
ORDER BY seconds DESC
