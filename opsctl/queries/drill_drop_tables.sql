-- A migration that went wrong.
DROP TABLE whatsapp_keys, whatsapp_auth
