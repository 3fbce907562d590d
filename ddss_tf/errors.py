"""The one exception that means "what was given cannot be used"."""


class UserError(ValueError):
  """A fault in what the user gave: its text is one line, fit to be shown.

  It says what was expected and what was received. The command line prints it
  without a traceback and exits with status 2.
  """
