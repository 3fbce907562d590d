"""Standard output and error that never end a command.

A terminal may lack a character, and a pipe or a disk may refuse more text. The
command goes on all the same.
"""

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
  """Codec error handler: replaces the characters that an encoding lacks."""
  if not isinstance(error, UnicodeEncodeError):
    raise error
  text = error.object[error.start:error.end]
  return "".join(
      _READABLE.get(character)
      or character.encode("ascii", "backslashreplace").decode()
      for character in text), error.end


codecs.register_error(_ERRORS, _readable)


class _Output:
  """A text stream whose writes do not fail.

  Characters that the encoding lacks are replaced. Once the stream cannot be
  written to (the reader of a pipe has gone, the disk is full), the rest of the
  text is dropped.

  Args:
    stream: a text stream; None if the file is closed, as in `sys.stdout`.

  Attributes:
    failed: the error for which text was dropped; None if all was written.
  """

  def __init__(self, stream):
    self._stream = io.StringIO() if stream is None else stream
    self.failed = None

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
    """Sends this text and all later text nowhere."""
    self.failed = error
    with contextlib.suppress(OSError, ValueError, AttributeError):
      # Python still holds some text, which it writes when the process ends.
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, self._stream.fileno())
      os.close(nowhere)
    self._stream = io.StringIO()

  def __getattr__(self, name):
    return getattr(self._stream, name)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
  """Lets printing inside the block never raise, and flushes at its end.

  If text of the standard output was lost, a warning says why, unless the reader
  of a pipe has gone.
  """
  before = sys.stdout, sys.stderr
  sys.stdout, sys.stderr = outputs = tuple(map(_Output, before))
  try:
    yield
  finally:
    for output in outputs:
      output.flush()
    lost = outputs[0].failed
    # A reader that has gone (EPIPE) wanted no more. Any other loss matters.
    if lost is not None and getattr(lost, "errno", None) != errno.EPIPE:
      print(f"warning: standard output cannot be written to: {lost}",
            file=sys.stderr)
      sys.stderr.flush()
    sys.stdout, sys.stderr = before
