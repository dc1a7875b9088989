-- The right to change one company's rows, until the transaction ends; false where another run has it.
SELECT pg_try_advisory_xact_lock(hashtextextended('opsctl ' || %(company_id)s, 0)) AS locked
