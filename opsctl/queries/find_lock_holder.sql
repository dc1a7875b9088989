-- Who has that lock.
SELECT
    locks.pid,
    coalesce(activity.application_name, '') AS application,
    coalesce(date_trunc('second', activity.backend_start)::text, '') AS since
FROM pg_locks AS locks
LEFT JOIN pg_stat_activity AS activity ON activity.pid = locks.pid
WHERE
    locks.locktype = 'advisory'
    AND locks.granted
    AND locks.database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND locks.classid = %(kind)s::int
    AND locks.objid = %(number)s::int
