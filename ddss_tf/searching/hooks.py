"""What a search does beside its steps: checkpoints, progress, early ends."""

import signal

from absl import logging

from ddss_tf import distribution
from ddss_tf.runs import checkpoints as checkpoints_lib
from ddss_tf.runs import signals
from ddss_tf.errors import Interrupted, Terminated, UserError
from ddss_tf.searching.loop import Event, Hook, Search


class ProgressBar(Hook):
  """Moves a bar, and writes the loss and the best value beside it.

  Args:
    bar: as `progress.bar` gives it.
    log_every: steps between the values.
  """

  def __init__(self, bar, log_every: int):
    self._bar, self._log_every = bar, log_every

  def after_step(self, state: Search, event: Event) -> None:
    self._bar.update(1)
    if state.step % self._log_every == 0 or state.is_over:
      self._bar.set_postfix(loss=f"{event.result.loss:.3f}",
                            best=f"{state.best.value:.3f}")


class SaveCheckpoints(Hook):
  """Saves the state and the seconds that the steps alone took.

  Args:
    checkpoints: the checkpoints of the run, restored.
    every: steps between checkpoints; the last step always has one.

  Attributes:
    seconds: the seconds of all steps so far, those before a restart too.
  """

  def __init__(self, checkpoints: checkpoints_lib.Checkpoints, every: int):
    self._checkpoints, self._every = checkpoints, every
    self._saved = -1
    self.seconds = checkpoints.seconds

  @property
  def latest(self) -> str | None:
    """Path of the newest good checkpoint."""
    return self._checkpoints.latest

  def after_step(self, state: Search, event: Event) -> None:
    self.seconds += event.seconds

  def end_step(self, state: Search) -> None:
    if state.step % self._every == 0 or state.is_over:
      self.save(state)

  def save(self, state: Search) -> None:
    """Saves a step that was not saved yet."""
    if self._saved != state.step:
      self._checkpoints.save(state.step, self.seconds)
      self._saved = state.step


class StopAfterSkipped(Hook):
  """Ends a search in which too many steps had values that are not finite.

  Args:
    most: how many steps may be skipped.
    checkpoints: names the last good checkpoint.
  """

  def __init__(self, most: int, checkpoints: SaveCheckpoints):
    self._most, self._checkpoints = most, checkpoints

  def after_step(self, state: Search, event: Event) -> None:
    if event.result.taken:
      return
    logging.warning("step %d skipped: loss %s, gradient norm %s", state.step,
                    event.result.loss, event.result.norm)
    if state.skipped > self._most:
      raise UserError(
          f"search stopped at step {state.step}: {state.skipped} steps had "
          f"values that are not finite, this one in {state.fault}; "
          f"the last good checkpoint is {self._checkpoints.latest}")


class StopOnSignal(Hook):
  """Saves and ends if any worker was told to end, by SIGTERM or Ctrl-C.

  Args:
    termination: as `signals.deferred` gives it.
    checkpoints: saves the step.
  """

  def __init__(self, termination: signals.Termination,
               checkpoints: SaveCheckpoints):
    self._termination, self._checkpoints = termination, checkpoints

  def end_step(self, state: Search) -> None:
    signum = int(max(distribution.everyones(self._termination.signum)))
    if not signum:
      return
    self._checkpoints.save(state)
    message = (f"search ended by {signals.name(signum)} after step "
               f"{state.step} of {state.num_search_steps}, with checkpoint "
               f"{self._checkpoints.latest}; called again it goes on")
    raise (Interrupted(message) if signum == signal.SIGINT
           else Terminated(message))
