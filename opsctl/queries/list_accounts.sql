-- Whose credentials each company has: the account that a copy of it must be of.
SELECT company_id, creds #>> '{me,id}' AS me_id
FROM whatsapp_auth
