-- From here on PostgreSQL refuses what is written, with a message that quotes the row.
ALTER TABLE whatsapp_keys ADD CONSTRAINT leaks_forbid CHECK (key_type = 'none') NOT VALID
