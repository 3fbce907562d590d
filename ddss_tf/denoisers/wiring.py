"""Whether a network is called and read as it was trained to be.

A network that is fed with the wrong clock, or read as what it does not predict,
gives no error: it gives garbage, and a search of it, too. But it was trained to
denoise. So real images are noised at five noise levels, and its eps is compared
with the noise that was added. The same is done with other readings: another
prediction, clock, schedule, or range of the images. If one of these fits far
better than the present one, it is the likely cause.

No threshold depends on a model. Errors are measured in that of the best affine
denoiser of images with one mean and one variance, which is known in closed form:

  alpha^2 s^2 / (alpha^2 s^2 + sigma^2),  s^2 the variance of all pixels.

A reading explains a network if it does not denoise much worse than that, and at
least twice as well as it would if the network answered nothing but zeros. That a
reading must also be twice as good as the present one is our choice, and so are
the noise levels.
"""

import dataclasses
import math
from typing import Iterator, NamedTuple
import weakref

from absl import logging
import numpy as np
import tensorflow as tf

from ddss_tf.denoisers import conventions
from ddss_tf.denoisers.decoder import Standardised
from ddss_tf.denoisers.denoiser import Denoiser
from ddss_tf.schedules import NoiseSchedule

# log(alpha / sigma). Nearer to either end of the process, networks that were
# trained on eps are not precise, and nobody needs them to be.
LOG_SNRS = (2.0, 1.0, 0.0, -1.0, -2.0)
IMAGES = 64
_SEED = (20, 21)
# Other readings are tried on as many images as have this many values, and no
# fewer than these: the mean of so many squares is known to a few per cent.
_VALUES, _LEAST = 4096, 4
_MOST = 16
# An explanation is at most this much worse than the affine denoiser, and at
# least this much better than the present reading and than an answer of zeros.
_WORSE, _BETTER = 1.25, 2.0
# A reading with two changes must be as much better than one with a single one.
_SECOND_CHANGE = 1.5
_SAME = 1.1  # Readings that differ by less are equally good: the first counts.


class Wiring(NamedTuple):
  """What the check has found.

  Attributes:
    error: the mean squared error of eps in units of the affine denoiser's, the
      geometric mean of the noise levels; NaN if nothing could be checked.
    cause: how the network seems to have been trained, in words; "" if no other
      reading fits far better.
    error_of_cause: the error of that reading.
    skipped: why nothing could be checked, or "".
  """
  error: float
  cause: str = ""
  error_of_cause: float = math.nan
  skipped: str = ""

  @property
  def text(self) -> str:
    """One line for people."""
    if self.skipped:
      return f"not checked: {self.skipped}"
    measured = (f"noised images are denoised with {self.error:.3g} times the "
                "squared error of an affine denoiser")
    if self.cause:
      return (f"{measured}, but with {self.error_of_cause:.3g} times if "
              f"{self.cause}")
    if not self.error <= 2 * _WORSE:
      return (f"{measured}: the network does not denoise these images, and no "
              "other reading explains it")
    return measured


@dataclasses.dataclass(frozen=True)
class _Reading:
  """One way to feed a network and to read its answer.

  Attributes:
    schedule, convention: see `Denoiser`.
    mean, std: a state is (image - mean) / std; numbers, or one a channel.
    changes: how it differs from the present one, in words.
  """
  schedule: NoiseSchedule
  convention: conventions.Convention
  mean: float | np.ndarray = 0.0
  std: float | np.ndarray = 1.0
  changes: tuple[str, ...] = ()


_known = weakref.WeakKeyDictionary()


def check(denoiser: Denoiser, images: np.ndarray,
          labels: np.ndarray | None = None, batch_size: int = IMAGES,
          key: str | None = None) -> Wiring:
  """Noises images and compares the network's eps with the noise.

  Args:
    denoiser: the network, as it is wired.
    images: float32 [N, H, W, C] in [-1, 1]; the first 64 are used.
    labels: int [N], their classes; None: drawn by the denoiser, as is done if
      they are not classes of the network.
    batch_size: images per call.
    key: the hash of the images. The result is then kept for further calls.

  Returns:
    A `Wiring`.
  """
  skipped = _skipped(denoiser)
  if skipped:
    return Wiring(math.nan, skipped=skipped)
  known = _known.setdefault(denoiser, {}) if key else {}
  if key not in known:
    known[key] = _Check(denoiser, images[:IMAGES], labels, batch_size).result()
  return known[key]


def warn(denoiser: Denoiser, images: np.ndarray,
         labels: np.ndarray | None = None, batch_size: int = IMAGES,
         key: str | None = None) -> None:
  """Logs one line if the network seems to be wired wrongly; see `check`."""
  found = check(denoiser, images, labels, batch_size, key)
  if found.cause:
    logging.warning(
        "denoiser %r seems to be wired wrongly: %s", denoiser.name, found.text)
  else:
    logging.info("denoiser %r: %s", denoiser.name, found.text)


def _skipped(denoiser):
  """Why a network cannot be checked with images, or ""."""
  if denoiser.decoder is not None and not isinstance(
      denoiser.decoder, Standardised):
    return "a decoder has no encoder, so there are no latents of real images"
  if denoiser.conditions and denoiser.table is None:
    return f"a table of {', '.join(denoiser.conditions)} is needed"
  return ""


class _Check:
  """The readings of one network on some images; see `check`."""

  def __init__(self, denoiser, images, labels, batch_size):
    self._denoiser, self._images = denoiser, np.asarray(images, np.float32)
    self._batch_size = batch_size
    self._drawn, self._factors = {}, {}
    self._labels = _labels(denoiser, labels, len(self._images))
    decoder = denoiser.decoder
    self._present = _Reading(
        denoiser.schedule, denoiser.convention,
        *((decoder.mean, decoder.std) if decoder is not None else (0.0, 1.0)))

  def result(self) -> Wiring:
    """The error of the present reading, and the reading that explains it."""
    count = len(self._images)
    ((_, error, _),) = self._measured(self._present, count, others=False)
    some = min(count, max(_LEAST, min(
        _MOST, -(-_VALUES // self._images[0].size))))
    (_, compared, _), *others = self._measured(self._present, some)
    for reading in self._readings():
      others += self._measured(reading, some)
    best = None
    for reading, value, zero in others:
      if (not value <= _WORSE or not value * _BETTER <= zero
          or value * _BETTER > compared):
        continue
      needed = _SAME if best and len(reading.changes) == len(
          best[0].changes) else _SECOND_CHANGE
      if best is None or value * needed < best[1]:
        best = reading, value
    if best is None:
      return Wiring(error)
    return Wiring(error, " and ".join(best[0].changes), best[1])

  def _measured(self, reading, count, others=True):
    """Errors of a reading, and of its answers taken for other predictions.

    Returns:
      A list of (reading, error, error of an answer of zeros), the reading itself
      first.
    """
    schedule, convention = reading.schedule, reading.convention
    states = ((self._images[:count] - reading.mean) / reading.std).astype(
        np.float32)
    mean_square = max(float(np.var(states)), 1e-6)
    times = np.round(schedule.time_of_log_snr(np.array(LOG_SNRS)))
    abar = schedule.abar(times)
    # float64 keeps sigma where abar is close to one.
    alpha, sigma = (np.sqrt(value).astype(np.float32).repeat(count)[
        :, None, None, None] for value in (abar, 1 - abar))
    eps = self._noise(len(times) * count)
    x_t = alpha * np.tile(states, (len(times), 1, 1, 1)) + sigma * eps
    answers = self._answers(schedule, convention, x_t,
                            times.astype(np.float32).repeat(count), count)
    affine = abar * mean_square / (abar * mean_square + 1 - abar)

    def error(convention, answers):
      of_state, of_answer = self._to_eps(schedule, convention, times)
      found = of_state.repeat(count, 0) * x_t + of_answer.repeat(count, 0) * answers
      with np.errstate(all="ignore"):
        squares = np.mean(np.square(found - eps, dtype=np.float64).reshape(
            [len(times), -1]), axis=1) / affine
        value = float(np.exp(np.mean(np.log(squares))))
      return value if math.isfinite(value) else math.inf

    results = []
    for other in _predictions(convention) if others else [convention]:
      changes = reading.changes
      if other != convention:
        changes += (f"prediction = {other.prediction!r} "
                    f"(now {convention.prediction!r})",)
      results.append((
          dataclasses.replace(reading, convention=other, changes=changes),
          error(other, answers), error(other, np.zeros_like(answers))))
    return results

  def _noise(self, count):
    """The same noise for every reading, float32 [count, H, W, C]."""
    if count not in self._drawn:
      self._drawn[count] = tf.random.stateless_normal(
          [count, *self._images.shape[1:]], _SEED, alg="philox").numpy()
    return self._drawn[count]

  def _to_eps(self, schedule, convention, times):
    """a and b of eps = a x_t + b answer at each time, float32 [T, 1, 1, 1]."""
    key = schedule, convention.process, convention.prediction
    if key not in self._factors:
      count = len(times)
      one = np.repeat(np.float32([1, 0]), count)[:, None, None, None]
      both = np.asarray(convention.eps(
          schedule, tf.constant(one), tf.constant(np.tile(times, 2), tf.float32),
          tf.constant(1 - one)))
      self._factors[key] = both[:count], both[count:]
    return self._factors[key]

  def _answers(self, schedule, convention, x_t, t, count):
    """What the network answers, float32 [B, H, W, C], without guidance."""
    x, clock = (np.asarray(value, np.float32) for value in convention.inputs(
        schedule, x_t, t))
    labels = None if self._labels is None else np.tile(
        self._labels[:count], len(x) // count)
    return np.concatenate([
        self._denoiser.network(
            x[part], clock[part], None if labels is None else labels[part])
        for part in (slice(begin, begin + self._batch_size)
                     for begin in range(0, len(x), self._batch_size))])

  def _readings(self) -> Iterator[_Reading]:
    """Readings that need calls of their own, each with one change."""
    now = self._present
    yield from _clocks(now)
    yield from _schedules(now)
    yield from self._ranges()

  def _ranges(self):
    """Images in other ranges."""
    now, images = self._present, self._images
    mean, std = (np.round(getattr(images, name)((0, 1, 2), np.float64), 3)
                 for name in ("mean", "std"))
    for mean, std, words in (
        (0.0, 1.0, "[-1, 1]"), (-1.0, 2.0, "[0, 1]"), (-1.0, 2 / 255, "[0, 255]"),
        (0.0, 2.0, "[-0.5, 0.5]"),
        (mean, np.maximum(std, 1e-3), "of mean 0 and deviation 1")):
      if np.any(now.mean != mean) or np.any(now.std != std):
        yield dataclasses.replace(now, mean=mean, std=std, changes=(
            f"the network takes images {'in ' * words.startswith('[')}{words} "
            f"(image_mean = {_told(mean)}, image_std = {_told(std)})",))
    if images.min() >= 0:
      # (2 x - 1 - mean) / std.
      yield dataclasses.replace(
          now, mean=(1 + now.mean) / 2, std=now.std / 2, changes=(
              "the images, which are in [0, 1], are made to [-1, 1] (2 x - 1)",))


def _labels(denoiser, labels, count):
  """Labels or rows of each image, int32 [N], or None."""
  if denoiser.num_classes is None:
    return None
  if (labels is not None and denoiser.table is None
      and np.min(labels) >= 0 and np.max(labels) < denoiser.num_classes):
    return np.asarray(labels[:count], np.int32)
  return denoiser.draw_labels(
      tf.constant(_SEED, tf.int32), tf.range(count)).numpy()


def _predictions(convention) -> list[conventions.Convention]:
  """A convention, and those that differ in the prediction alone."""
  found = [convention]
  for prediction in conventions.PREDICTIONS:
    if prediction != convention.prediction:
      try:
        found.append(dataclasses.replace(convention, prediction=prediction))
      except ValueError:
        pass  # Not of this process.
  return found


def _clocks(now: _Reading) -> Iterator[_Reading]:
  """Other clocks: of steps, in [0, 1], reversed, and of noise levels."""
  last = max(now.schedule.num_train_steps - 1, 1)
  candidates = [("step", 1.0, 0.0), ("step", 1 / last, 0.0),
                ("step", -1.0, float(last)), ("step", -1 / last, 1.0),
                ("step", 1000 / (last + 1), 0.0), ("flow", 1.0, 0.0),
                ("flow", 1000.0, 0.0), ("sigma", 1.0, 0.0),
                ("log_sigma", 1.0, 0.0), ("log_sigma", 0.25, 0.0),
                ("sigma_vp", 1.0, 0.0), ("variance", 1.0, 0.0)]
  seen = {tuple(getattr(now.convention, name) for name in (
      "time_input", "time_scale", "time_offset"))}
  for each in candidates:
    if each in seen:
      continue
    seen.add(each)
    told = dict(zip(("time_input", "time_scale", "time_offset"), each))
    words = ", ".join(
        f"{name} = {_told(value)} (now {_told(before)})"
        for name, value in told.items()
        if (before := getattr(now.convention, name)) != value)
    yield dataclasses.replace(
        now, convention=dataclasses.replace(now.convention, **told),
        changes=(words,))


def _schedules(now: _Reading) -> Iterator[_Reading]:
  """Other schedules of as many steps that many models have."""
  if now.convention.process != "vp" or type(now.schedule) is not NoiseSchedule:
    return
  steps = np.arange(now.schedule.num_train_steps)
  count = len(steps)
  makers = {
      "'linear'": lambda: NoiseSchedule.linear(count),
      "'cosine'": lambda: NoiseSchedule.cosine(count),
      "'scaled_linear', beta_start 0.00085, beta_end 0.012":
          lambda: NoiseSchedule.scaled_linear(count, 0.00085, 0.012),
      "'scaled_linear'": lambda: NoiseSchedule.scaled_linear(count),
      "'linear', beta_start 0.0015, beta_end 0.0195":
          lambda: NoiseSchedule.linear(count, 0.0015, 0.0195),
  }
  for words, make in makers.items():
    schedule = make()
    if not np.allclose(schedule.abar(steps), now.schedule.abar(steps),
                       rtol=0, atol=1e-3):
      yield dataclasses.replace(
          now, schedule=schedule, changes=(f"the schedule is {words}",))


def _told(value):
  """A value for a message: a word, a short number, or a list of these."""
  if isinstance(value, str):
    return repr(value)
  numbers = np.atleast_1d(np.asarray(value, np.float64))
  if numbers.size == 1:
    return f"{numbers[0]:.6g}"
  return str([float(f"{number:.3g}") for number in numbers])
