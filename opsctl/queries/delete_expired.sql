-- Delete those of some rows that are still expired and that nobody else has locked; each comes as a line of the archive.
COPY (
    DELETE FROM whatsapp_keys
    WHERE
        tableoid = %(part)s::oid
        AND ctid = ANY(ARRAY(
            SELECT ctid
            FROM whatsapp_keys
            WHERE
                tableoid = %(part)s::oid
                AND ctid = ANY(%(places)s::tid[])
                AND <expired>
            FOR UPDATE SKIP LOCKED
        ))
    RETURNING '{"table":"whatsapp_keys","old":' || row_to_json(whatsapp_keys) || '}'
) TO STDOUT
