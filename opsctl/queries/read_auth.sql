-- One company's row of credentials, with every column.
SELECT row_to_json(auth)::text AS line
FROM whatsapp_auth AS auth
WHERE auth.company_id = %(company_id)s
