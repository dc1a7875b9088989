-- A change of credentials as a line of an archive: the row as it is, and with some fields of creds replaced.
SELECT
    '{"table":"whatsapp_auth","old":' || row_to_json(held)
    || ',"new":' || (to_jsonb(held) || jsonb_build_object('creds', held.creds || %(patch)s::jsonb))::text
    || '}' AS line
FROM whatsapp_auth AS held
WHERE held.company_id = %(company_id)s
