-- By what one sees that nothing of a company has changed: how many rows, and which transaction wrote each. updated_at
-- would not do: what was deleted has none, and writers leave it alone. age() of the first ordinary transaction less that
-- of xmin is xmin itself, in half of the time that casting it by way of text takes (2.3 million rows: 1.4 s).
SELECT
    coalesce(auth.company_id, keys.company_id) AS company_id,
    auth.company_id IS NOT NULL AS has_creds,
    coalesce(keys.key_count, 0) AS key_count,
    concat_ws(' ', auth.xmin::text, keys.key_count, keys.hashes) AS digest
FROM whatsapp_auth AS auth
FULL JOIN (
    SELECT
        company_id,
        count(*) AS key_count,
        sum(hashtextextended(key_type || '-' || key_id, age('3'::xid)::bigint - age(xmin))) AS hashes
    FROM whatsapp_keys
    GROUP BY company_id
) AS keys ON keys.company_id = auth.company_id
ORDER BY 1
