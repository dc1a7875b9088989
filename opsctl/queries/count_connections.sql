-- Connections by role and application, against what is usable by a role that is no superuser. reserved_connections
-- exists since PostgreSQL 16; without pg_monitor the types of other sessions are not shown.
SELECT
    coalesce(activity.usename::text, '') AS role,
    coalesce(activity.application_name, '') AS application,
    count(*) AS connections,
    max(roles.rolconnlimit) AS role_limit,
    current_setting('max_connections')::int
    - current_setting('superuser_reserved_connections')::int
    - coalesce(current_setting('reserved_connections', true)::int, 0) AS usable
FROM pg_stat_activity AS activity
LEFT JOIN pg_roles AS roles ON roles.oid = activity.usesysid
WHERE activity.datid IS NOT NULL AND coalesce(activity.backend_type, 'client backend') = 'client backend'
GROUP BY activity.usename, activity.application_name
ORDER BY connections DESC
