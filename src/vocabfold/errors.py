"""What a command line prints as a single line."""


class UserError(Exception):
    """What was wrong and what to do, in one line. Command lines print it without a traceback and exit with status 2."""


class OutOfReach(UserError):
    """A compression that no setting of a method reaches."""
