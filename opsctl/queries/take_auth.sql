-- Take away the rows that are as an archive has them; gives which.
DELETE FROM whatsapp_auth AS held
USING unnest(%(lines)s::text[]) WITH ORDINALITY AS lines (line, number)
CROSS JOIN LATERAL json_populate_record(NULL::whatsapp_auth, lines.line::json -> %(side)s::text) AS given
WHERE
    held.company_id = given.company_id
    AND to_jsonb(held) = to_jsonb(given)
RETURNING lines.number::int AS number, true AS there, true AS equal
