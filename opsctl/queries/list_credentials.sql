-- The companies that have credentials, and when they were last written.
SELECT company_id, updated_at::text AS updated_at
FROM whatsapp_auth
ORDER BY company_id
