-- Changes of keys as lines of an archive: each row as it is, and with some fields replaced; without a patch it goes.
SELECT
    '{"table":"whatsapp_keys"'
    || CASE WHEN wanted.stays THEN '' ELSE ',"old":' || row_to_json(held) END
    || coalesce(',"new":' || (to_jsonb(held) || wanted.patch::jsonb)::text, '')
    || '}' AS line
FROM unnest(
    %(companies)s::text[], %(key_types)s::text[], %(key_ids)s::text[], %(patches)s::text[], %(stays)s::boolean[]
) AS wanted (company_id, key_type, key_id, patch, stays)
INNER JOIN whatsapp_keys AS held
    ON held.company_id = wanted.company_id
    AND held.key_type = wanted.key_type
    AND held.key_id = wanted.key_id
