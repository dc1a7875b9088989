-- And its credentials with them.
DELETE FROM whatsapp_auth
WHERE company_id = %(company_id)s
