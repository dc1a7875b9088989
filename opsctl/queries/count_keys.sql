-- Keys per company and type, and when the newest of them was written.
SELECT company_id, key_type, count(*) AS key_count, max(updated_at)::text AS newest_at
FROM whatsapp_keys
GROUP BY company_id, key_type
ORDER BY company_id, key_type
