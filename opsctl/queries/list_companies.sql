-- Every company that has credentials or keys: how many keys, and when anything of it was last written.
SELECT
    coalesce(auth.company_id, keys.company_id) AS company_id,
    auth.company_id IS NOT NULL AS has_creds,
    coalesce(keys.key_count, 0) AS key_count,
    greatest(auth.updated_at, keys.newest_at)::text AS newest_at
FROM whatsapp_auth AS auth
FULL JOIN (
    SELECT company_id, count(*) AS key_count, max(updated_at) AS newest_at
    FROM whatsapp_keys
    GROUP BY company_id
) AS keys ON keys.company_id = auth.company_id
ORDER BY 1
