-- Write some of one company's keys with their own times: as new rows, because a trigger may put its own into others.
INSERT INTO whatsapp_keys AS keys (company_id, key_type, key_id, value, created_at, updated_at, expires_at)
SELECT %(company_id)s, put.key_type, put.key_id, put.value, put.created_at, put.updated_at, put.expires_at
FROM json_to_recordset(%(rows)s::json) AS put (
    key_type text,
    key_id text,
    value jsonb,
    created_at timestamptz,
    updated_at timestamptz,
    expires_at timestamptz
)
RETURNING keys.key_type, keys.key_id, keys.created_at::text AS created_at, row_to_json(keys)::text AS line
