"""Paths as people give them."""

import os

from ddss_tf.errors import UserError


def expanded(path):
  """A path with the home folder that `~` or `~user` at its start stands for.

  Shells do that for some words only: not after the "=" of a flag, nor inside
  of a binding.

  Args:
    path: as it was given; what is no path is given back, for others to refuse.

  Returns:
    The path, as text.

  Raises:
    UserError: nobody knows that home folder, and there is no such file either.
  """
  if isinstance(path, os.PathLike):
    path = os.fspath(path)
  if not isinstance(path, str) or not path.startswith("~"):
    return path
  found = os.path.expanduser(path)
  if found.startswith("~") and not os.path.exists(path):
    raise UserError(f"the home folder of {path.split(os.sep)[0]} must be known "
                    f"(HOME, or the user's entry). Received: {path!r}")
  return found
