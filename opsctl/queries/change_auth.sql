-- Change credentials that are as one side of a line has them into its other side. Updated, not exchanged: deleting
-- them could take the company's keys along, where a foreign key says so.
UPDATE whatsapp_auth AS held
SET
    creds = after.creds,
    created_at = after.created_at,
    updated_at = after.updated_at
FROM unnest(%(lines)s::text[]) WITH ORDINALITY AS lines (line, number)
CROSS JOIN LATERAL json_populate_record(NULL::whatsapp_auth, lines.line::json -> %(side)s::text) AS before
CROSS JOIN LATERAL json_populate_record(NULL::whatsapp_auth, lines.line::json -> %(other_side)s::text) AS after
WHERE
    held.company_id = before.company_id
    AND to_jsonb(held) = to_jsonb(before)
RETURNING lines.number::int AS number, true AS there, true AS equal
