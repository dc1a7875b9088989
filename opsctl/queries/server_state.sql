-- What kind of server this is, its clock, and whether this role may see other sessions.
SELECT
    pg_is_in_recovery() AS in_recovery,
    current_setting('default_transaction_read_only') = 'on' AS read_only,
    current_setting('server_version_num')::int AS server_version,
    extract(epoch FROM clock_timestamp())::float8 AS clock_s,
    pg_has_role(current_user, 'pg_read_all_stats', 'USAGE') AS sees_all
