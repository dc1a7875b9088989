-- The lock of whoever deletes or mends keys; the session's own, so it goes with the connection.
SELECT pg_try_advisory_lock(%(kind)s, %(number)s) AS locked
