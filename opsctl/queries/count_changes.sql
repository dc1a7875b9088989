-- How many rows of the two tables were ever written, as the statistics collector counts them.
SELECT coalesce(sum(n_tup_ins + n_tup_upd + n_tup_del), 0)::bigint AS changes
FROM pg_stat_user_tables
WHERE relid IN (to_regclass('whatsapp_auth'), to_regclass('whatsapp_keys'))
