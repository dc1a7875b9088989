-- The triggers that may change a row while it is inserted, partitions' too.
SELECT DISTINCT tgname::text AS name
FROM pg_trigger
WHERE
    tgrelid IN (SELECT 'whatsapp_keys'::regclass UNION SELECT relid FROM pg_partition_tree('whatsapp_keys'))
    AND NOT tgisinternal
    AND tgenabled <> 'D'
    AND tgtype & 7 = 7
