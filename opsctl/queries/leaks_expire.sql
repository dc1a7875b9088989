-- Half of the sessions are past their retention, for a cleanup.
UPDATE whatsapp_keys
SET updated_at = now() - interval '90 days', expires_at = now() - interval '60 days'
WHERE key_type = 'session' AND mod(hashtext(key_id), 2) = 0
