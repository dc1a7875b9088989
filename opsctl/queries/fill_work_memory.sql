-- Make the next sort spill to the server's disk.
SELECT set_config('work_mem', '64kB', true), set_config('statement_timeout', '0', true)
