-- Every value that must not leave, with its company and its type.
SELECT company_id, key_type, value::text AS value
FROM whatsapp_keys
UNION ALL
SELECT company_id, 'creds', creds::text
FROM whatsapp_auth
