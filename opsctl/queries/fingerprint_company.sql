-- By what one sees that nothing of one company was written meanwhile: which transaction wrote each row.
SELECT concat_ws(
    ' ',
    (SELECT xmin::text FROM whatsapp_auth WHERE company_id = %(company_id)s),
    count(*),
    sum(hashtextextended(key_type || '-' || key_id, xmin::text::bigint))
) AS fingerprint
FROM whatsapp_keys
WHERE company_id = %(company_id)s
