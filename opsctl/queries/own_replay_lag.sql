-- How far behind a replica is, by its own account; nothing to replay is no lag only while somebody sends.
SELECT
    (SELECT count(*) FROM pg_stat_wal_receiver) AS receivers,
    CASE
        WHEN pg_last_wal_receive_lsn() <= pg_last_wal_replay_lsn() THEN 0
        ELSE extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp())
    END::float8 AS lag_s
