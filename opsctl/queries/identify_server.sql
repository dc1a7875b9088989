-- Which server this is: the identity that a manifest remembers. Fails, inside of any condition too, without the right to.
SELECT
    system_identifier::text AS system_identifier,
    timeline_id AS timeline
FROM pg_control_system(), pg_control_checkpoint()
