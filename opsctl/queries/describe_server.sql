-- At what point this server is, and whether it lets us ask which one it is.
SELECT
    has_function_privilege('pg_control_system()', 'EXECUTE')
    AND has_function_privilege('pg_control_checkpoint()', 'EXECUTE') AS identifiable,
    pg_is_in_recovery() AS in_recovery,
    current_setting('server_version_num')::int AS server_version,
    now()::text AS snapshot_at,
    CASE WHEN pg_is_in_recovery() THEN pg_last_xact_replay_timestamp() END::text AS replayed_at,
    (now() - interval '15 minutes')::text AS busy_since,
    pg_backend_pid() AS backend_pid
