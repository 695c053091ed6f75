"""The exceptions that launchers turn into a line on the screen."""


class UserError(Exception):
    """Something that the person at the keyboard can mend.

    Launchers print it as one line and exit with status 1. The message names the file or field and
    the remedy.
    """


class ResumableError(UserError):
    """The same, where nothing that was written is at fault: it is kept, to be gone on with."""


class DivergedError(UserError):
    """A loss or gradient that is no number any more."""
