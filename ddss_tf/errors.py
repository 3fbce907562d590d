"""Exceptions whose text is one line for the user, and checks of options."""

import math
import numbers
import signal

# Seeds are int32, and the validation of a search uses the next seed as well.
MAX_SEED = 2**31 - 2


class UserError(ValueError):
  """A fault in what the user gave: its text is one line, fit to be shown.

  It says what was expected and what was received. The command line prints it
  without a traceback and exits with status 2.
  """


class Terminated(Exception):
  """A search was asked to end by SIGTERM, and has saved its state.

  The command line prints its text and exits with status 143, like a process
  that the signal has ended.
  """


class Interrupted(KeyboardInterrupt):
  """The work was asked to end by a signal; a search has saved its state.

  It is a `KeyboardInterrupt`, so that notebooks and scripts end as at Ctrl-C,
  and no `except Exception` takes it for a fault. The command line prints its
  text and exits with status 128 + signum: 130 for Ctrl-C.

  Args:
    message: one line.
    signum: the signal.
  """

  def __init__(self, message: str, signum: int = signal.SIGINT):
    super().__init__(message)
    self.signum = signum


class WorkerLost(Exception):
  """Another worker process has ended, and this one cannot go on without it.

  The command line prints its text and exits with status 1.
  """


def shape_text(shape) -> str:
  """A shape for a message, "?" where any size will do: "[?, 16, 16, 1]"."""
  sizes = ", ".join("?" if size is None else str(size) for size in shape)
  return f"[{sizes}]"


def check_whole(option: str, value, least: int, *, most: int | None = None,
                optional: bool = False, other: str = "") -> None:
  """Checks that an option is a whole number.

  Args:
    option: its name.
    value: what was given.
    least: the lowest that is allowed.
    most: the highest that is allowed; None: there is no limit.
    optional: whether None is allowed too.
    other: words for another allowed value, which the caller has checked.

  Raises:
    UserError: the value is none of these.
  """
  if optional and value is None:
    return
  if (not isinstance(value, numbers.Integral) or isinstance(value, bool)
      or value < least or most is not None and value > most):
    choices = "".join(
        f"{choice}, " for choice in (other, "None" if optional else "")
        if choice)
    limit = f">= {least}" if most is None else f"from {least} to {most}"
    raise UserError(f"{option} must be {choices}{'or ' if choices else ''}a "
                    f"whole number {limit}. Received: {value!r}")


def check_number(option: str, value) -> None:
  """Checks that an option is a finite number.

  Raises:
    UserError: it is not.
  """
  if (not isinstance(value, numbers.Real) or isinstance(value, bool)
      or not math.isfinite(value)):
    raise UserError(f"{option} must be a finite number. Received: {value!r}")


def check_positive(option: str, value) -> None:
  """Checks that an option is a finite number above 0.

  Raises:
    UserError: it is not.
  """
  if (not isinstance(value, numbers.Real) or isinstance(value, bool)
      or not 0 < value < float("inf")):
    raise UserError(
        f"{option} must be a number above 0. Received: {value!r}")


def one_line(error: Exception) -> str:
  """The text of a library's error, short enough for a message of ours."""
  return " ".join(str(error).split())[:200]
