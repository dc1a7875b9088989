-- Some keys to ask for, without a scan.
SELECT company_id, key_type, key_id
FROM whatsapp_keys
LIMIT 50
