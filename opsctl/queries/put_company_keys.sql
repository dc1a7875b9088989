-- Write some of one company's keys with their own times: as new rows, because a trigger may put its own into others.
INSERT INTO whatsapp_keys AS keys (company_id, key_type, key_id, value, created_at, updated_at, expires_at)
SELECT
    %(company_id)s,
    put.key_type,
    put.key_id,
    put.value::jsonb,
    put.created_at::timestamptz,
    put.updated_at::timestamptz,
    put.expires_at::timestamptz
FROM unnest(
    %(key_types)s::text[],
    %(key_ids)s::text[],
    %(values)s::text[],
    %(created_at)s::text[],
    %(updated_at)s::text[],
    %(expires_at)s::text[]
) AS put (key_type, key_id, value, created_at, updated_at, expires_at)
RETURNING keys.key_type, keys.key_id, keys.created_at::text AS created_at, row_to_json(keys)::text AS line
