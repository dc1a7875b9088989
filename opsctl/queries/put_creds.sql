-- Write one company's credentials. In place: deleting the row could take every key with it, by a foreign key.
INSERT INTO whatsapp_auth AS auth (company_id, creds, updated_at)
VALUES (%(company_id)s, %(creds)s::jsonb, coalesce(%(updated_at)s::timestamptz, now()))
ON CONFLICT (company_id) DO UPDATE SET creds = excluded.creds, updated_at = excluded.updated_at
RETURNING row_to_json(auth)::text AS line
