-- For one short transaction: no timeout of the role's, times as text in UTC, no lock waited for long. Nobody waits for
-- the disk where that is asked for.
SELECT
    set_config('statement_timeout', '0', true),
    set_config('idle_in_transaction_session_timeout', '0', true),
    set_config('lock_timeout', %(lock_timeout)s, true),
    set_config('synchronous_commit', coalesce(%(synchronous_commit)s, current_setting('synchronous_commit')), true),
    set_config('timezone', 'UTC', true),
    set_config('datestyle', 'ISO', true),
    set_config('jit', 'off', true),
    set_config('max_parallel_workers_per_gather', '0', true)
