"""Exceptions whose text is one line for the user, and their words."""


class UserError(ValueError):
  """A fault in what the user gave: its text is one line, fit to be shown.

  It says what was expected and what was received. The command line prints it
  without a traceback and exits with status 2.
  """


class Terminated(Exception):
  """The work was asked to end (SIGTERM), and saved what it had.

  The command line prints its text and exits with status 143, as a process does
  that dies of the signal.
  """


def shape_text(shape) -> str:
  """A shape for a message, "?" where any size will do: "[?, 16, 16, 1]"."""
  sizes = ", ".join("?" if size is None else str(size) for size in shape)
  return f"[{sizes}]"
