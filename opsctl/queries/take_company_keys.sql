-- Delete some of one company's keys, and give them back as they were.
DELETE FROM whatsapp_keys AS keys
USING unnest(%(key_types)s::text[], %(key_ids)s::text[]) AS taken (key_type, key_id)
WHERE
    keys.company_id = %(company_id)s
    AND keys.key_type = taken.key_type
    AND keys.key_id = taken.key_id
RETURNING
    keys.key_type,
    keys.key_id,
    keys.created_at::text AS created_at,
    row_to_json(keys)::text AS line,
    hashtextextended(keys.key_type || '-' || keys.key_id, keys.xmin::text::bigint)::text AS mark
