"""Standard output and error on which nothing that is printed ends a command."""

import codecs
import contextlib
import errno
import io
import os
import sys
from typing import Iterator

_ERRORS = "ddss_tf.readable"
_READABLE = {"±": "+-", "–": "-", "—": "-", "×": "x", "…": "..."}


def _readable(error):
  """What stands for characters that an encoding does not have."""
  if not isinstance(error, UnicodeEncodeError):
    raise error
  text = error.object[error.start:error.end]
  return "".join(
      _READABLE.get(character)
      or character.encode("ascii", "backslashreplace").decode()
      for character in text), error.end


codecs.register_error(_ERRORS, _readable)


class _Output:
  """A text stream that takes everything.

  Characters that its encoding lacks are replaced. Where it cannot be written to
  (`| head -1` has read enough, its disk is full) the rest is dropped.

  Args:
    stream: a text stream; None, as Python has it where the file is closed.
  """

  def __init__(self, stream):
    self._stream = io.StringIO() if stream is None else stream
    self.failed = None  # Why the rest was dropped.

  def write(self, text: str) -> int:
    try:
      self._stream.write(text)
    except UnicodeEncodeError:
      encoding = self._stream.encoding or "ascii"
      return self.write(text.encode(encoding, _ERRORS).decode(encoding))
    except (OSError, ValueError) as error:
      self._drop(error)
    return len(text)

  def flush(self) -> None:
    try:
      self._stream.flush()
    except (OSError, ValueError) as error:
      self._drop(error)

  def _drop(self, error):
    self.failed = error
    with contextlib.suppress(OSError, ValueError, AttributeError):
      # Python writes what it still has of it when the process ends.
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, self._stream.fileno())
      os.close(nowhere)
    self._stream = io.StringIO()

  def __getattr__(self, name):
    return getattr(self._stream, name)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
  """Nothing that is printed in here raises; at the end all of it is written."""
  before = sys.stdout, sys.stderr
  sys.stdout, sys.stderr = outputs = tuple(map(_Output, before))
  try:
    yield
  finally:
    for output in outputs:
      output.flush()
    lost = outputs[0].failed
    # A reader that has gone wanted no more; else the results are missed.
    if lost is not None and getattr(lost, "errno", None) != errno.EPIPE:
      print(f"warning: standard output cannot be written to: {lost}",
            file=sys.stderr)
      sys.stderr.flush()
    sys.stdout, sys.stderr = before
