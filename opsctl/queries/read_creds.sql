-- One company's credentials.
SELECT creds::text AS creds, updated_at::text AS updated_at
FROM whatsapp_auth
WHERE company_id = %(company_id)s
