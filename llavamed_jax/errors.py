"""The errors that a person is meant to read: one sentence that says what, where and what was expected."""


class UserError(ValueError):
    """Something outside the program is wrong (a file, a checkpoint, data). Command lines print it and exit 1."""


class UsageError(UserError):
    """The command line, the config file, a config key or its value is wrong. Command lines print it and exit 2."""
