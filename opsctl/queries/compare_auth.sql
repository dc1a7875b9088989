-- Whether rows of an archive are in the table, and as they were.
SELECT
    lines.number::int AS number,
    held.company_id IS NOT NULL AS there,
    coalesce(to_jsonb(held) = to_jsonb(given), false) AS equal
FROM unnest(%(lines)s::text[]) WITH ORDINALITY AS lines (line, number)
CROSS JOIN LATERAL json_populate_record(NULL::whatsapp_auth, lines.line::json -> %(side)s::text) AS given
LEFT JOIN whatsapp_auth AS held
    ON held.company_id = given.company_id
