-- Take away the rows that are as an archive has them; gives which.
DELETE FROM whatsapp_keys AS held
USING unnest(%(lines)s::text[]) WITH ORDINALITY AS lines (line, number)
CROSS JOIN LATERAL json_populate_record(NULL::whatsapp_keys, lines.line::json -> %(side)s::text) AS given
WHERE
    held.company_id = given.company_id
    AND held.key_type = given.key_type
    AND held.key_id = given.key_id
    AND to_jsonb(held) = to_jsonb(given)
RETURNING lines.number::int AS number, true AS there, true AS equal
