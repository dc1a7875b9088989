-- A company's keys are deleted by accident.
DELETE FROM whatsapp_keys
WHERE company_id = %(company_id)s
