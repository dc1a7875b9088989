-- Write the credentials of a seeded fleet.
COPY whatsapp_auth (company_id, creds, created_at, updated_at) FROM STDIN
