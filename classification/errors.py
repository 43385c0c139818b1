"""The one exception for mistakes a user can mend, and how it helps."""

import difflib


class UserError(ValueError):
    """Its text names the file, key or value, what was expected, and what to do.

    Entry points print it as one line, without a traceback.
    """


def did_you_mean(name, known):
    """' (did you mean X?)' where a known name is near, else nothing."""
    near = difflib.get_close_matches(str(name), known, 1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""
