"""Progress bars: live in a terminal, a line now and then in a log."""

import sys
import weakref

import tqdm

from ddss_tf import distribution

_open = weakref.WeakSet()


def bar(total: int, description: str, unit: str, initial: int = 0) -> tqdm.tqdm:
  """A progress bar on the standard error output.

  Args:
    total: what it counts up to.
    description: text before it; if empty, no bar is shown.
    unit: what it counts, such as "image".
    initial: the count at which it starts, if earlier work is continued.

  Returns:
    The bar, a context manager with `update` and `set_postfix`.
  """
  terminal = sys.stderr.isatty()
  made = tqdm.tqdm(
      total=total, initial=initial, desc=description, unit=unit,
      disable=not description or not distribution.is_chief(),
      mininterval=0.1 if terminal else 20.0, leave=True, dynamic_ncols=terminal)
  _open.add(made)
  return made


def close_all() -> None:
  """Ends all bars, so that the next output begins on a line of its own."""
  for each in list(_open):
    each.close()
