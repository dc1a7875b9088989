-- What the keys take on disk, partitions and TOAST included, and the blocks of the largest part.
SELECT
    sum(pg_table_size(part))::bigint AS table_bytes,
    sum(pg_indexes_size(part))::bigint AS index_bytes,
    max(pg_relation_size(part) / current_setting('block_size')::int) AS blocks,
    count(*) AS parts
FROM (
    SELECT 'whatsapp_keys'::regclass AS part
    UNION
    SELECT relid FROM pg_partition_tree('whatsapp_keys')
) AS parts
