"""SIGINT (Ctrl-C) and SIGTERM: work ends in good order, and at once if told so.

  end_at_once  for a program that has nothing to put in order yet
  ending       for a command: the signal is an exception, and a second Ctrl-C,
               even inside of a long call, ends the process
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
# Launchers pass on the Ctrl-C that the terminal has sent to all of them.
_THE_SAME = 0.25  # Seconds.


def name(signum: int) -> str:
  """What a person calls a signal."""
  return ("Ctrl-C" if signum == signal.SIGINT
          else signal.Signals(signum).name)


class Termination:
  """Whether work has been asked to end.

  Attributes:
    signum: by which signal, SIGINT (Ctrl-C) or SIGTERM; 0: not at all.
  """

  def __init__(self):
    self.signum = 0


def _install(handler) -> dict:
  """Sets a handler, and gives those of before, by signal.

  Signals that the process was started to ignore, as in the background of a
  shell script, stay ignored. Only a main thread may handle any.
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
    # Below a progress bar.
    os.write(2, f"\nerror: ended by {name(signum)}\n".encode())
  os._exit(128 + signum)


def end_at_once() -> None:
  """From now on a signal ends the process with one line, and 128 + its number.

  For a program until it knows better, while it imports, say: there is nothing
  to put in order, and libraries do not expect exceptions.
  """
  _install(_end)


@contextlib.contextmanager
def at_once() -> Iterator[None]:
  """`end_at_once` in here."""
  before = _install(_end)
  try:
    yield
  finally:
    _restore(before)


@contextlib.contextmanager
def ending() -> Iterator[None]:
  """A signal raises `Interrupted`; Ctrl-C after it ends the process at once.

  Python runs handlers between its own instructions only, so a thread waits for
  the second one.
  """
  asked = Termination()

  def interrupt(signum, frame):
    del frame
    if not asked.signum:  # Once: what is put in order must not be disturbed.
      asked.signum = signum
      raise Interrupted(f"ended by {name(signum)}", signum)

  def unraisable(failure):
    # Raised where nothing can be: it is tried again.
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
  """Ends the process by the first Ctrl-C that follows another signal."""
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

  A second Ctrl-C raises. A signal that nobody has acted on when the work is
  over is delivered then. In a thread that is not the main one this changes
  nothing.

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
