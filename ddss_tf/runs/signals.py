"""SIGINT (Ctrl-C) and SIGTERM: work ends in good order, or at once.

  end_at_once  for a program that has nothing to put in order yet
  ending       for a command: the signal raises an exception, and a second
               Ctrl-C ends the process, even during a long call
  deferred     for work with a state to save: the signal is noted
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from typing import Iterator

from ddss_tf.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A Ctrl-C that follows within these seconds is the same one again: the terminal
# sends it to all processes, and launchers pass it on to their children.
_THE_SAME = 0.25


def name(signum: int) -> str:
  """Name of a signal for people."""
  return ("Ctrl-C" if signum == signal.SIGINT
          else signal.Signals(signum).name)


class Termination:
  """Whether work has been asked to end.

  Attributes:
    signum: the signal that asked, SIGINT (Ctrl-C) or SIGTERM; 0: none has.
  """

  def __init__(self):
    self.signum = 0


def _install(handler) -> dict:
  """Sets a handler, and gives the handlers of before, by signal.

  Signals that the process was started to ignore, as in the background of a
  shell script, stay ignored. Outside the main thread this does nothing, because
  Python allows handlers there only.
  """
  if threading.current_thread() is not threading.main_thread():
    return {}
  return {signum: signal.signal(signum, handler) for signum in _SIGNALS
          if signal.getsignal(signum) not in (signal.SIG_IGN, None)}


def _restore(handlers) -> None:
  for signum, handler in handlers.items():
    signal.signal(signum, handler)


def _end(signum, frame=None):
  """Ends the process, with one line."""
  del frame
  with contextlib.suppress(OSError):
    # The line break puts the line below a progress bar.
    os.write(2, f"\nerror: ended by {name(signum)}\n".encode())
  os._exit(128 + signum)


def end_at_once() -> None:
  """Lets a signal end the process with one line, and status 128 + its number.

  This suits a program that still imports: it has nothing to put in order, and
  libraries do not expect exceptions there.
  """
  _install(_end)


@contextlib.contextmanager
def at_once() -> Iterator[None]:
  """Does what `end_at_once` does, inside the block only."""
  before = _install(_end)
  try:
    yield
  finally:
    _restore(before)


@contextlib.contextmanager
def ending() -> Iterator[None]:
  """A signal raises `Interrupted`; Ctrl-C after it ends the process at once.

  A thread waits for that Ctrl-C, because Python runs handlers only between its
  own instructions, not during a long call.
  """
  asked = Termination()

  def interrupt(signum, frame):
    del frame
    if not asked.signum:  # A second exception would disturb the clean-up.
      asked.signum = signum
      raise Interrupted(f"ended by {name(signum)}", signum)

  def unraisable(failure):
    # Python drops what is raised in, say, a `__del__`: raise it again.
    if issubclass(failure.exc_type, Interrupted):
      asked.signum = 0
      signal.raise_signal(failure.exc_value.signum)
    else:
      hook_before(failure)

  before = _install(interrupt)
  if not before:
    yield
    return
  hook_before, sys.unraisablehook = sys.unraisablehook, unraisable
  ours, other = socket.socketpair()
  other.setblocking(False)
  wakeup_before = signal.set_wakeup_fd(
      other.fileno(), warn_on_full_buffer=False)
  threading.Thread(target=_wait_for_second, args=(ours,), daemon=True).start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(wakeup_before)
    other.close()
    sys.unraisablehook = hook_before
    _restore(before)


def _wait_for_second(received: socket.socket) -> None:
  """Ends the process at the first Ctrl-C that follows another signal."""
  first = None
  with received:
    while signum := received.recv(1):
      if signum[0] not in _SIGNALS:
        continue
      now = time.monotonic()
      if first is None:
        first = now
      elif signum[0] == signal.SIGINT and now - first > _THE_SAME:
        _end(signal.SIGINT)


@contextlib.contextmanager
def deferred() -> Iterator[Termination]:
  """Notes a signal instead of ending, so that what was begun can be finished.

  A second Ctrl-C raises `Interrupted`. If a signal was noted and the block ends
  without an exception, the signal is delivered then. Outside the main thread
  this changes nothing.

  Yields:
    A `Termination`.
  """
  termination = Termination()
  noted = 0.0

  def note(signum, frame):
    nonlocal noted
    del frame
    now = time.monotonic()
    if not termination.signum:
      termination.signum, noted = signum, now
    elif signum == signal.SIGINT and now - noted > _THE_SAME:
      raise Interrupted(f"ended by {name(signum)}", signum)

  before = _install(note)
  try:
    yield termination
  finally:
    _restore(before)
  if termination.signum:
    handler = before[termination.signum]
    if callable(handler):
      handler(termination.signum, None)
    else:
      signal.raise_signal(termination.signum)
