-- Who streams from this server and how far behind its replay is. Without pg_monitor only that there is somebody.
SELECT
    coalesce(application_name, '') AS name,
    coalesce(state, '(hidden)') AS state,
    extract(epoch FROM replay_lag)::float8 AS lag_s,
    pg_wal_lsn_diff(
        CASE WHEN pg_is_in_recovery() THEN pg_last_wal_receive_lsn() ELSE pg_current_wal_lsn() END, replay_lsn
    )::float8 AS lag_bytes
FROM pg_stat_replication
WHERE state IS DISTINCT FROM 'backup'
ORDER BY name
