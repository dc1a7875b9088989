-- The companies that have credentials, where the table of keys is damaged and cannot be counted.
SELECT company_id, true AS has_creds, 0 AS key_count, updated_at::text AS newest_at
FROM whatsapp_auth
ORDER BY company_id
