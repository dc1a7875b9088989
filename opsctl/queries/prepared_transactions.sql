-- Prepared transactions, which hold their locks until somebody ends them.
SELECT
    count(*) AS transactions,
    coalesce(extract(epoch FROM clock_timestamp() - min(prepared)), 0)::float8 AS seconds
FROM pg_prepared_xacts
