-- Keys per company and type: how many, how many are past both the retention and their expiry, and their ages. One scan.
SELECT
    company_id,
    key_type,
    count(*) AS keys,
    count(*) FILTER (
        WHERE updated_at < now() - %(retention)s::text::interval AND expires_at < now()
    ) AS expired,
    count(*) FILTER (WHERE updated_at >= now() - interval '1 day') AS within_1_day,
    count(*) FILTER (WHERE updated_at >= now() - interval '7 days') AS within_7_days,
    count(*) FILTER (WHERE updated_at >= now() - interval '14 days') AS within_14_days,
    count(*) FILTER (WHERE updated_at >= now() - interval '30 days') AS within_30_days
FROM whatsapp_keys
GROUP BY company_id, key_type
