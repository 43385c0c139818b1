"""The one exception for mistakes a user can mend."""


class UserError(ValueError):
    """Its text names the file, key or value, what was expected, and what to do.

    Entry points print it as one line, without a traceback.
    """
