-- Every key there is, to see afterwards that none was lost.
SELECT company_id, key_type, key_id FROM whatsapp_keys
