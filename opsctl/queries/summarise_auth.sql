-- The companies that have credentials.
SELECT company_id
FROM whatsapp_auth
