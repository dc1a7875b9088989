-- The keys of one company that this transaction has not written: how many, and the sum of `fingerprint_company`'s marks.
SELECT
    count(*) AS key_count,
    coalesce(sum(hashtextextended(key_type || '-' || key_id, xmin::text::bigint)), 0)::text AS key_marks
FROM whatsapp_keys
WHERE company_id = %(company_id)s AND xmin <> pg_current_xact_id()::xid
