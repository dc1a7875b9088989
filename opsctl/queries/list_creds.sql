-- Every company's credentials.
SELECT company_id, creds::text AS creds
FROM whatsapp_auth
ORDER BY company_id
