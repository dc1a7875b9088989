-- Keys per company and type: how many, how many are past both the retention and their expiry, and their ages. One scan;
-- the bounds are subqueries, which are computed once and not for every row.
SELECT
    company_id,
    key_type,
    count(*) AS keys,
    count(*) FILTER (
        WHERE updated_at < (SELECT now() - %(retention)s::text::interval) AND expires_at < now()
    ) AS expired,
    count(*) FILTER (WHERE updated_at >= (SELECT now() - interval '1 day')) AS within_1_day,
    count(*) FILTER (WHERE updated_at >= (SELECT now() - interval '7 days')) AS within_7_days,
    count(*) FILTER (WHERE updated_at >= (SELECT now() - interval '14 days')) AS within_14_days,
    count(*) FILTER (WHERE updated_at >= (SELECT now() - interval '30 days')) AS within_30_days
FROM whatsapp_keys
GROUP BY company_id, key_type
