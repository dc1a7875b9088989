-- Keys per company and type: how many, how large, how old, how fast they grow, and how many are expired.
-- The bounds are subqueries, which are computed once and not for every row.
SELECT
    company_id,
    key_type,
    count(*) AS key_count,
    coalesce(sum(size_bytes), 0)::bigint AS size_bytes,
    count(*) FILTER (WHERE updated_at >= day) AS under_1_day,
    count(*) FILTER (WHERE updated_at >= week AND updated_at < day) AS under_7_days,
    count(*) FILTER (WHERE updated_at >= fortnight AND updated_at < week) AS under_14_days,
    count(*) FILTER (WHERE updated_at >= month AND updated_at < fortnight) AS under_30_days,
    count(*) FILTER (WHERE updated_at < month OR updated_at IS NULL) AS older,
    count(*) FILTER (WHERE created_at >= week) AS created_in_7_days,
    count(*) FILTER (WHERE expired) AS expired_count,
    coalesce(sum(size_bytes) FILTER (WHERE expired), 0)::bigint AS expired_bytes,
    min(updated_at)::text AS oldest_at,
    max(updated_at)::text AS newest_at
FROM (
    SELECT
        company_id,
        key_type,
        updated_at,
        created_at,
        (SELECT %(now)s::timestamptz - interval '1 day') AS day,
        (SELECT %(now)s::timestamptz - interval '7 days') AS week,
        (SELECT %(now)s::timestamptz - interval '14 days') AS fortnight,
        (SELECT %(now)s::timestamptz - interval '30 days') AS month,
        pg_column_size(value) AS size_bytes,
        <expired> AS expired
    FROM whatsapp_keys
) AS keys
GROUP BY company_id, key_type
ORDER BY company_id, key_type
