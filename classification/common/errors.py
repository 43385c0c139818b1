"""The one exception for mistakes a user can mend, how it helps, and what becomes of it."""

import difflib
import signal
import sys


class UserError(ValueError):
    """Its text names the file, key or value, what was expected, and what to do.

    Entry points print it as one line, without a traceback.
    """


def did_you_mean(name, known):
    """' (did you mean X?)' where a known name is near, else nothing."""
    near = difflib.get_close_matches(str(name), known, 1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""


def reason(error):
    """The first line of an exception's text, or its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def run_command(function, argv=None):
    """Run an entry point: a user's mistake becomes one line on stderr and exit status 2."""
    try:
        stopped_by = function(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # a second Ctrl-C in training, the first elsewhere
        sys.exit(128 + signal.SIGINT)
    sys.exit(128 + stopped_by if stopped_by else 0)
