-- Who streams from this server and how far behind its replay is. Without pg_monitor only that there is somebody.
SELECT
    coalesce(activity.application_name, '') AS name,
    coalesce(sender.state, '(hidden)') AS state,
    extract(epoch FROM sender.replay_lag)::float8 AS lag_s,
    pg_wal_lsn_diff(
        CASE WHEN pg_is_in_recovery() THEN pg_last_wal_receive_lsn() ELSE pg_current_wal_lsn() END, sender.replay_lsn
    )::float8 AS lag_bytes
FROM pg_stat_get_wal_senders() AS sender
LEFT JOIN LATERAL pg_stat_get_activity(sender.pid) AS activity ON true
WHERE sender.state IS DISTINCT FROM 'backup'
ORDER BY name
