-- How many of some rows, which were not deleted, are as they were found: another session had locked them.
SELECT count(*) AS count
FROM whatsapp_keys
WHERE
    tableoid = %(part)s::oid
    AND ctid = ANY(%(places)s::tid[])
    AND <expired>
