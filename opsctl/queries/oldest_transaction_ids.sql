-- The database whose oldest transaction ids are nearest to wraparound.
SELECT datname::text AS database, greatest(age(datfrozenxid), mxid_age(datminmxid)) AS ids
FROM pg_database
ORDER BY ids DESC
LIMIT 1
