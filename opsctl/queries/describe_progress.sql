-- How far the server is: every transaction before `since` has ended, none from `next_xid` on has begun; and in which of
-- its databases we are.
SELECT
    txid_snapshot_xmin(txid_current_snapshot()) AS since,
    txid_snapshot_xmax(txid_current_snapshot()) AS next_xid,
    (SELECT oid::bigint FROM pg_database WHERE datname = current_database()) AS database_oid
