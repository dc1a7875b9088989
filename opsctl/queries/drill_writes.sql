-- What the service writes between the last copy and the disaster: every company's credentials move on.
UPDATE whatsapp_auth
SET
    creds = jsonb_set(creds, '{accountSyncCounter}', to_jsonb(coalesce((creds ->> 'accountSyncCounter')::int, 0) + 1)),
    updated_at = now()
