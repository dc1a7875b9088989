-- One of its keys.
INSERT INTO whatsapp_keys (company_id, key_type, key_id, value)
VALUES (%(company_id)s, %(key_type)s, %(key_id)s, %(value)s::jsonb)
