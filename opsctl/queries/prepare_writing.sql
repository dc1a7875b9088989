-- For one short transaction: no timeout of the role's, times as text in UTC, no lock of a table waited for long.
SELECT
    set_config('statement_timeout', '0', true),
    set_config('idle_in_transaction_session_timeout', '0', true),
    set_config('lock_timeout', '1s', true),
    set_config('timezone', 'UTC', true),
    set_config('datestyle', 'ISO', true),
    set_config('jit', 'off', true),
    set_config('max_parallel_workers_per_gather', '0', true)
