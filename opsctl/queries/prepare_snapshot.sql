-- A role may come with a statement_timeout of a second; times are read as text in one zone; no lock is waited for long;
-- transaction_timeout exists since PostgreSQL 17.
SELECT
    set_config('statement_timeout', '0', true),
    set_config('idle_in_transaction_session_timeout', '0', true),
    (SELECT set_config(name, '0', true) FROM pg_settings WHERE name = 'transaction_timeout'),
    set_config('lock_timeout', '2s', true),
    set_config('timezone', 'UTC', true),
    set_config('datestyle', 'ISO', true),
    set_config('jit', 'off', true),
    set_config('max_parallel_workers_per_gather', '0', true)
