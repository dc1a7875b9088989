-- Who waits for a lock in this database, for how long, and the session that they, or any reader of our tables, wait for.
WITH waiting AS (
    SELECT locks.pid, (to_jsonb(locks) ->> 'waitstart')::timestamptz AS since
    FROM pg_locks AS locks
    INNER JOIN pg_stat_activity AS session ON session.pid = locks.pid
    WHERE NOT locks.granted AND session.datname = current_database()
),
blocking AS (
    SELECT unnest(pg_blocking_pids(pid)) AS pid FROM waiting
    UNION
    SELECT pid
    FROM pg_locks
    WHERE
        granted
        AND mode = 'AccessExclusiveLock'
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND relation IN (to_regclass('whatsapp_auth'), to_regclass('whatsapp_keys'))
),
first_blocking AS (
    SELECT session.pid, session.state, session.application_name
    FROM blocking
    INNER JOIN pg_stat_activity AS session ON session.pid = blocking.pid
    WHERE blocking.pid NOT IN (SELECT pid FROM waiting)
    ORDER BY session.xact_start NULLS LAST
    LIMIT 1
)
SELECT
    (SELECT count(*) FROM waiting) AS waiting,
    (SELECT extract(epoch FROM clock_timestamp() - min(since)) FROM waiting)::float AS longest_s,
    (SELECT pid FROM first_blocking) AS blocker_pid,
    (SELECT state FROM first_blocking) AS blocker_state,
    (SELECT application_name FROM first_blocking) AS blocker_application
