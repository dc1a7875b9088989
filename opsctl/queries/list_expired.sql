-- Some expired keys by name, oldest first.
SELECT company_id, key_type, key_id, updated_at::text AS updated_at
FROM whatsapp_keys
WHERE <expired>
ORDER BY whatsapp_keys.updated_at
LIMIT %(most)s
