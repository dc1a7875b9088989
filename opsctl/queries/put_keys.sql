-- Put the rows of an archive into the table where none of their name is; gives which.
WITH given AS MATERIALIZED (
    SELECT lines.number, given.*
    FROM unnest(%(lines)s::text[]) WITH ORDINALITY AS lines (line, number)
    CROSS JOIN LATERAL json_populate_record(NULL::whatsapp_keys, lines.line::json -> %(side)s::text) AS given
),
inserted AS (
    INSERT INTO whatsapp_keys OVERRIDING SYSTEM VALUE
    SELECT given.*
    FROM unnest(%(lines)s::text[]) AS lines (line)
    CROSS JOIN LATERAL json_populate_record(NULL::whatsapp_keys, lines.line::json -> %(side)s::text) AS given
    ON CONFLICT DO NOTHING
    RETURNING company_id, key_type, key_id
)
SELECT given.number::int AS number, true AS there, true AS equal
FROM given
INNER JOIN inserted
    ON inserted.company_id = given.company_id
    AND inserted.key_type = given.key_type
    AND inserted.key_id = given.key_id
