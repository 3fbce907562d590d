"""The algorithm: steps along a gradient, validations, returns to the best.

`run` is the search. All else that happens, such as checkpoints and TensorBoard,
is in hooks.
"""

import time
from typing import Callable, Iterable, NamedTuple

from absl import logging
import numpy as np
import tensorflow as tf

from ddss_tf.samplers.sampler import Sampler
from ddss_tf.searching.optimizer import Optimizer, StepResult
from ddss_tf.searching.validation import BestSoFar

Gradient = Callable[[int], tuple[float, np.ndarray]]


class Search:
  """The state of one search: all that its checkpoint holds.

  Args:
    sampler: the family whose variables are learned.
    gradient: function from a step to the loss and its gradient [n], a
      `PopulationGradient` or a `BoundGradient`.
    optimizer: makes steps from gradients.
    best: the best variables by validation.
    num_search_steps: steps in all.
    keep: what the search ends with, its "best" variables or its "last".

  Attributes:
    checkpoint: the state, as TensorFlow saves it.
    fault: what was not finite in the last step that was skipped.
  """

  def __init__(self, sampler: Sampler, gradient: Gradient,
               optimizer: Optimizer, best: BestSoFar, num_search_steps: int,
               keep: str = "best"):
    self.sampler, self.gradient = sampler, gradient
    self.optimizer, self.best = optimizer, best
    self.num_search_steps = num_search_steps
    self._keep = keep
    self.fault = ""
    self._validated = np.inf
    self._step = tf.Variable(0, dtype=tf.int64, trainable=False)
    self._skipped = tf.Variable(0, dtype=tf.int64, trainable=False)
    self.checkpoint = tf.train.Checkpoint(
        variables=optimizer.variables.values, step=self._step,
        skipped=self._skipped, **optimizer.state, **best.state)

  @property
  def step(self) -> int:
    """How many steps have been made, skipped ones too."""
    return int(self._step.numpy())

  @property
  def skipped(self) -> int:
    """How many of them were not taken, because a value was not finite."""
    return int(self._skipped.numpy())

  @property
  def is_over(self) -> bool:
    """Whether no step is left."""
    return self.step >= self.num_search_steps

  @property
  def rate(self) -> float:
    """The learning rate of the next step."""
    return self.optimizer.rate(self.step)

  def advance(self) -> StepResult:
    """Makes one step."""
    step = self.step
    result = self.optimizer.apply(step, *self.gradient(step))
    if not result.taken:
      self.fault = result.fault
      self._skipped.assign_add(1)
    self._step.assign_add(1)
    return result

  def judge(self, value: float) -> bool:
    """Remembers the best variables, or goes back to them if the optimiser does.

    Returns:
      Whether it went back.
    """
    self._validated = value
    back = self.best.judge(value, self.step) and self.optimizer.goes_back
    if back:
      self.best.restore()
      self.optimizer.go_back()
    return back

  @property
  def kept_step(self) -> int:
    """After how many steps the variables were what the search ends with."""
    return self.step if self._keep == "last" else self.best.step

  @property
  def kept_value(self) -> float:
    """Their validation value, of a search that has run to its end."""
    return self._validated if self._keep == "last" else self.best.value

  def settle(self) -> None:
    """Gives the sampler the variables that the search ends with."""
    if self._keep == "best":
      self.best.restore()


class Event(NamedTuple):
  """A step as hooks see it: its result, and the seconds that it took."""
  result: StepResult
  seconds: float


class Hook:
  """What happens beside the search; every method does nothing here."""

  def begin(self, state: Search) -> None:
    """Before the first step of a search that is new."""

  def after_step(self, state: Search, event: Event) -> None:
    """After every step."""

  def after_validation(self, state: Search, value: float) -> None:
    """After a validation, the first of which comes before the first step."""

  def end_step(self, state: Search) -> None:
    """After a step, its validation and what follows from it."""


def run(state: Search, validate: Callable[[], float], hooks: Iterable[Hook],
        validate_every: int, was_over: bool = False) -> None:
  """Searches until no step is left.

  If the optimiser goes back, a validation that is not better than the best one
  takes the search back to the best variables, with half the rate.

  Args:
    state: where the search stands.
    validate: gives the value of the sampler as it is.
    hooks: called in their order.
    validate_every: steps between validations; the last step always has one.
    was_over: whether the state is that of the end of a search that has got more
      steps since.
  """
  def tell(event: str, *arguments) -> None:
    for hook in hooks:
      getattr(hook, event)(state, *arguments)

  def judged() -> bool:
    value = validate()
    tell("after_validation", value)
    back = state.judge(value)
    logging.info(
        "step %d: validation %.4f%s", state.step, value,
        f", back to {state.best.value:.4f} at step {state.best.step} with half "
        "the rate" if back else "")
    return back

  if state.step == 0:
    tell("begin")
    judged()
    state.optimizer.begin(0)
  elif was_over and state.optimizer.goes_back and (
      state.best.step != state.step):
    state.optimizer.begin(state.step)  # The last validation took it back.
  while not state.is_over:
    began = time.monotonic()
    result = state.advance()
    tell("after_step", Event(result, time.monotonic() - began))
    if state.step % validate_every == 0 or state.is_over:
      if judged() and not state.is_over:
        state.optimizer.begin(state.step)
    tell("end_step")
