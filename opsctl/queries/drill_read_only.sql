-- A server that takes no more writes, as one with a full disk or a failed-over primary does.
ALTER ROLE ALL SET default_transaction_read_only = on
