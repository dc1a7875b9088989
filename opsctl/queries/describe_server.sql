-- Which server this is and at what point: the identity that a manifest remembers.
SELECT
    CASE WHEN has_function_privilege('pg_control_system()', 'EXECUTE')
        THEN (SELECT system_identifier::text FROM pg_control_system()) END AS system_identifier,
    CASE WHEN has_function_privilege('pg_control_checkpoint()', 'EXECUTE')
        THEN (SELECT timeline_id FROM pg_control_checkpoint()) END AS timeline,
    pg_is_in_recovery() AS in_recovery,
    current_setting('server_version_num')::int AS server_version,
    now()::text AS snapshot_at,
    (now() - interval '15 minutes')::text AS busy_since,
    pg_backend_pid() AS backend_pid
