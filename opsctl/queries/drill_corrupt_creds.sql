-- One company's credentials lose the key that every login begins with.
UPDATE whatsapp_auth
SET creds = jsonb_set(creds, '{noiseKey}', 'null')
WHERE company_id = %(company_id)s
