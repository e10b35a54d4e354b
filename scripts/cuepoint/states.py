"""How a video can end: the one list of states, and what each means for the next run."""

from enum import StrEnum


class Status(StrEnum):
    """State of a video, as receipts, tables and the ledger spell it."""

    OK = "ok"
    UNAVAILABLE = "unavailable"
    NEEDS_AUTH = "needs_auth"
    GEO_BLOCKED = "geo_blocked"
    NOT_YET = "not_yet"
    THROTTLED = "throttled"
    TRANSIENT = "transient"
    EMPTY = "empty"
    PENDING = "pending"  # ledger only: listed, and no download has ended yet

    @property
    def retryable(self) -> bool:
        """Whether the next run tries again by itself."""
        return self in {Status.NOT_YET, Status.THROTTLED, Status.TRANSIENT, Status.PENDING}

    @property
    def final(self) -> bool:
        """Whether only a change from outside (cookies, `retry_final`) can lead to another attempt."""
        return not self.retryable
