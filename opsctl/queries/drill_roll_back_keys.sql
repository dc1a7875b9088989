-- And so are keys.
UPDATE whatsapp_keys
SET updated_at = updated_at - interval '1 day'
