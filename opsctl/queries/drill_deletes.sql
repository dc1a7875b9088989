-- And some conversations end.
DELETE FROM whatsapp_keys
WHERE
    key_type = 'session'
    AND hashtext(company_id || key_id) %% 50 = 0
