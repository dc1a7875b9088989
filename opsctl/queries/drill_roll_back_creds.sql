-- Yesterday's backup was put back: credentials are as old as that.
UPDATE whatsapp_auth
SET updated_at = updated_at - interval '1 day'
