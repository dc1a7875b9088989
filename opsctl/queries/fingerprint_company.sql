-- By what one sees that nothing of one company was written meanwhile: which transaction wrote each row.
SELECT
    (SELECT xmin::text FROM whatsapp_auth WHERE company_id = %(company_id)s) AS creds_mark,
    count(*) AS key_count,
    coalesce(sum(hashtextextended(key_type || '-' || key_id, xmin::text::bigint)), 0)::text AS key_marks
FROM whatsapp_keys
WHERE company_id = %(company_id)s
