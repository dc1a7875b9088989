-- Connections by role and application, against what is usable by a role that is no superuser. reserved_connections
-- exists since PostgreSQL 16; without pg_monitor the types of other sessions are not shown. It asks the function behind
-- pg_stat_activity: to plan that view takes as long as all the rest.
SELECT
    coalesce(pg_get_userbyid(usesysid)::text, '') AS role,
    coalesce(application_name, '') AS application,
    count(*) AS connections,
    (SELECT rolconnlimit FROM pg_roles WHERE oid = usesysid) AS role_limit,
    current_setting('max_connections')::int
    - current_setting('superuser_reserved_connections')::int
    - coalesce(current_setting('reserved_connections', true)::int, 0) AS usable
FROM pg_stat_get_activity(NULL)
WHERE datid IS NOT NULL AND coalesce(backend_type, 'client backend') = 'client backend'
GROUP BY usesysid, application_name
ORDER BY connections DESC
