"""Errors that a user can act on: each says what is wrong, where, and how to mend it."""


class CuepointError(Exception):
    """Base of all errors that are shown to the user as one message, without a traceback."""


class ConfigError(CuepointError):
    """A setting or the video list cannot be used; nothing has been started."""


class EnvironmentFault(CuepointError):
    """This machine cannot do the work (disk full, missing runtime, permission): the job fails, no video is blamed."""


class DataError(CuepointError):
    """A file that an earlier stage wrote is missing, damaged or not what its receipt says."""


class LockedError(CuepointError):
    """Another process holds what this one needs."""
