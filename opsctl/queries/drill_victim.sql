-- The company that something happens to.
SELECT min(company_id) AS company_id
FROM whatsapp_auth
