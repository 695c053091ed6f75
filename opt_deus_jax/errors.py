"""The one exception that launchers turn into a line on the screen."""


class UserError(Exception):
    """Something that the person at the keyboard can mend.

    Launchers print it as one line and exit with status 1. The message names the file or field and
    the remedy.
    """
