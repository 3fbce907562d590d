"""The exception that means "what was given cannot be used", and its words."""


class UserError(ValueError):
  """A fault in what the user gave: its text is one line, fit to be shown.

  It says what was expected and what was received. The command line prints it
  without a traceback and exits with status 2.
  """


def shape_text(shape) -> str:
  """A shape for a message, "?" where any size will do: "[?, 16, 16, 1]"."""
  sizes = ", ".join("?" if size is None else str(size) for size in shape)
  return f"[{sizes}]"
