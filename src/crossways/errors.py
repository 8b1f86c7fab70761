"""The exceptions that mean "the user asked for something impossible"."""


class UserError(ValueError):
    """A mistake in what was asked (a recipe, an option, a corpus), not in the program.

    The message is one line that gives the offending value and what to do about it. The command line prints it
    and exits with code 2; from Python it is an ordinary `ValueError`.
    """
