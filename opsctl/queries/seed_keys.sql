-- Write the keys of a seeded fleet.
COPY whatsapp_keys (company_id, key_type, key_id, value, created_at, updated_at, expires_at) FROM STDIN
