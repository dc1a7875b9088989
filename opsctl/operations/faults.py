"""The ways in which a drill lets the database fail."""

from enum import StrEnum


class Fault(StrEnum):
    """What is broken; `opsctl.operations.drill_faults` breaks it."""

    REFUSED = "refused"
    FROZEN = "frozen"
    READ_ONLY = "read-only"
    DROPPED_TABLES = "dropped-tables"
    CORRUPT_CREDS = "corrupt-creds"
    DELETED_COMPANY = "deleted-company"
    ROLLED_BACK = "rolled-back"
    DISK_FULL = "disk-full"
