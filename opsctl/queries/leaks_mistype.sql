-- Rows as an early migration has split them, for the doctor.
INSERT INTO whatsapp_keys (company_id, key_type, key_id, value)
SELECT company_id, 'pre', 'key-9' || key_id, value
FROM whatsapp_keys
WHERE key_type = 'pre-key'
