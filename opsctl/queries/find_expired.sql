-- Where expired rows lie among some blocks of the table, and of each partition.
COPY (
    SELECT tableoid, ctid
    FROM whatsapp_keys
    WHERE
        ctid >= %(first)s::tid
        AND ctid < %(last)s::tid
        AND <expired>
) TO STDOUT
