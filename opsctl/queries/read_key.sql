-- One key, as the service reads it.
SELECT value::text
FROM whatsapp_keys
WHERE company_id = %(company_id)s AND key_type = %(key_type)s AND key_id = %(key_id)s
