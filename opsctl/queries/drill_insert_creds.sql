-- One company that a full drill has paired.
INSERT INTO whatsapp_auth (company_id, creds) VALUES (%(company_id)s, %(creds)s::jsonb)
