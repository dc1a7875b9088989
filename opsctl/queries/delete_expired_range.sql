-- Delete what is expired among some blocks of the table, and of each partition; each comes as a line of the archive.
COPY (
    DELETE FROM whatsapp_keys
    WHERE
        ctid >= %(first)s::tid
        AND ctid < %(last)s::tid
        AND <expired>
    RETURNING '{"table":"whatsapp_keys","old":' || row_to_json(whatsapp_keys) || '}'
) TO STDOUT
