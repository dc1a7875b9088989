-- Replication slots and the WAL that they keep.
SELECT
    slot_name::text AS name,
    active,
    coalesce(wal_status, '') AS wal_status,
    coalesce(
        pg_wal_lsn_diff(
            CASE WHEN pg_is_in_recovery() THEN pg_last_wal_receive_lsn() ELSE pg_current_wal_lsn() END, restart_lsn
        ),
        0
    )::float8 AS kept_bytes
FROM pg_replication_slots
ORDER BY slot_name
