"""What a search minimises.

  distances   between generated and real features (`distances.py`). Each is a
              function of a whole population, not a mean over its parts;
              `population.PopulationGradient` differentiates a large one.
  matching    the images of a many-step teacher from the same noise
              (`MATCHING`; not in the paper). Means over samples.
  elbo        the variational bound, see `elbo.py`.

`Objective` adds them up, over several feature networks.
"""

from typing import Callable

import numpy as np
import tensorflow as tf

from ddss_tf.objectives import distances as distances_lib
from ddss_tf.runs import fingerprint
from ddss_tf.errors import check_positive
from ddss_tf.objectives.distances import Control
from ddss_tf.objectives.view import ViewLayout

MATCHING = ("teacher_pixels", "teacher_features")
ELBO = "elbo"


def objective_names() -> tuple[str, ...]:
  """All objectives: distances (also registered ones), matching, the ELBO."""
  return (*distances_lib.DISTANCES, *MATCHING, ELBO)


def register_objective(name: str, *, moments: bool = False) -> Callable:
  """Adds an objective of features, which `search.objective` then takes by name.

    @ddss_tf.register_objective("mean_gap")
    def mean_gap(real):  # float [R, D]
      mean = real.mean(axis=0)
      return lambda features: tf.reduce_sum(
          (tf.reduce_mean(features, axis=0) - mean) ** 2)

  Args:
    name: what gin and the command line call it.
    moments: whether it depends on moments of the features only. Then its
      function also takes a `distances.Control` or None, which makes it more
      precise.

  Returns:
    A decorator. The decorated function takes real features, float [R, D], and
    returns a differentiable function from the features [N, D] of a population
    to a float32 scalar.

  Raises:
    ValueError: the name is taken.
  """
  def register(make):
    known = distances_lib.DISTANCES.get(name)
    if name in (*MATCHING, ELBO) or known is not None and (
        fingerprint.definition(known.make) != fingerprint.definition(make)):
      raise ValueError(f"an objective's name must be new. Received: {name!r}")
    distances_lib.register_distance(name, make, moments)
    return make

  return register


def weights_of_terms(terms) -> dict[str, float]:
  """Weights by name, from one of `objective_names` or from such weights.

  Raises:
    ValueError: unknown or no terms, weights that are not positive, or "elbo"
      among others.
  """
  terms = {terms: 1.0} if isinstance(terms, str) else dict(terms)
  for name in terms:
    if name not in objective_names():
      raise ValueError(f"objective must be out of {', '.join(objective_names())}. "
                       f"Received: {name!r}")
  if not terms:
    raise ValueError("objective must have terms. Received: {}")
  for name, weight in terms.items():
    check_positive(f"the weight of the objective {name!r}", weight)
  if ELBO in terms and len(terms) > 1:
    raise ValueError(f"objective 'elbo' stands alone. Received: {terms}")
  return terms


def weights_of_networks(weights, networks) -> list[float]:
  """The weights of feature networks, 1 each for None.

  Raises:
    ValueError: more or fewer weights than networks, or one that is not
      positive.
  """
  weights = [1.0] * len(networks) if weights is None else list(weights)
  if len(weights) != len(networks):
    raise ValueError("feature_weights must be one for each of the "
                     f"{len(networks)} networks. Received: {weights}")
  for weight in weights:
    check_positive("each of the feature_weights", weight)
  return weights


def uses(terms, kind: tuple[str, ...]) -> bool:
  """Whether any of the terms is of a kind, such as `MATCHING`."""
  return any(name in kind for name in terms)


class Objective:
  """A weighted sum of distances and matching terms, of one population.

  A population is seen as its `view`: the features of every network side by
  side, then the pixels if a term asks for them. A distance is taken in each
  network's features and summed with the networks' weights.

  teacher_pixels is the mean squared difference of pixels to the images of the
  teacher from the same noise; teacher_features that of features, relative to
  their variance in the data. Both are unbiased, but they do not estimate a
  distance between distributions: where the teacher cannot be matched they are
  lowest at its conditional mean, which is too smooth.

  Args:
    terms: a name out of `objective_names`, or weights by name. "elbo" stands
      alone.
    networks: feature networks, see `network.FeatureNetwork`.
    reals: float32 [R, D], features of the training set, for each network.
    image_shape: (H, W, C).
    network_weights: for each network; 1 if None.
    fresh: whether `value` will be given fresh real features.

  Attributes:
    terms: weights by name.
    layout: where the parts of a view are.
    width: the width of a view.
    uses_teacher: whether `value` needs the teacher's view.
    num_reals: R, the size of the training set.
    is_elbo: whether it is the bound, which does not depend on a view.
    uses_control: whether a control variate helps any of the terms.

  Raises:
    ValueError: unknown or no terms, weights that do not fit, or "elbo" among
      others.
  """

  def __init__(self, terms, networks, reals, image_shape,
               network_weights=None, fresh: bool = False):
    self.terms = weights_of_terms(terms)
    self.is_elbo = ELBO in self.terms
    self.uses_teacher = uses(self.terms, MATCHING)
    self._networks = networks
    self._weights = weights_of_networks(network_weights, networks)
    self._variances = [float(np.sum(np.var(real, axis=0, dtype=np.float64)))
                       for real in reals]
    self._distances = {
        name: [distances_lib.make_distance(name, real) for real in reals]
        for name in self.terms if name in distances_lib.DISTANCES}
    self._reals = reals if fresh else None
    self._fresh = {
        name: [distances_lib.make_fresh_distance(name, real) for real in reals]
        for name in self.terms if fresh and name in distances_lib.KERNELS}
    self.num_reals = len(reals[0])
    self._means = [real.mean(axis=0, dtype=np.float64) for real in reals]
    self.uses_control = uses(self.terms, distances_lib.MOMENTS)
    self._pixels = "teacher_pixels" in self.terms
    self.layout = ViewLayout(
        [real.shape[1] for real in reals],
        int(np.prod(image_shape)) if self._pixels else 0)
    self.width = self.layout.width

  @property
  def feature_std(self) -> float:
    """Root of the total variance of the first network's real features."""
    return self._variances[0] ** 0.5

  def view(self, images: tf.Tensor) -> tf.Tensor:
    """What the terms see of images [N, H, W, C]: float32 [N, width]."""
    return self.layout.join(
        [network(images)["pool"] for network in self._networks], images)

  def fresh_reals(self, rows: np.ndarray) -> tuple[tf.Tensor, ...]:
    """Some rows of the real features of each network, of an objective that is `fresh`."""
    return tuple(tf.constant(real[rows]) for real in self._reals)

  def control_moments(self, views: np.ndarray):
    """What `value` needs to know of a control variate.

    Args:
      views: float32 [M, width], of many of its samples.

    Returns:
      For each network, mean and second moment as in `Control`.
    """
    moments = []
    for features, mean in zip(self.layout.split(views).features, self._means):
      own = features - mean
      moments.append((tf.constant(own.mean(axis=0), tf.float32),
                      tf.constant(own.T @ own / len(own), tf.float32)))
    return moments

  def value(self, view: tf.Tensor, teacher: tf.Tensor | None = None,
            control=None, fresh: tuple = ()):
    """The objective of a population, a float32 scalar.

    Args:
      view: [N, width].
      teacher: [N, width], of the teacher's images from the same noise; only
        used if `uses_teacher`.
      control: None, or a pair of a control variate's views of the same noise,
        [N, width], and its `control_moments`.
      fresh: float32 [M, D] for each network, real features in place of those of
        the whole training set; () for the latter.
    """
    pools, pixels = self.layout.split(view)
    loss = tf.zeros([])
    controls = [None] * len(pools)
    if control is not None:
      rows = self.layout.split(control[0]).features
      controls = [Control(own, *moments)
                  for own, moments in zip(rows, control[1])]
    for name, distances in self._distances.items():
      if fresh:
        for pool, weight, distance, real in zip(
            pools, self._weights, self._fresh[name], fresh):
          loss += self.terms[name] * weight * distance(pool, real)
        continue
      for pool, weight, distance, known in zip(
          pools, self._weights, distances, controls):
        values = (pool, known) if name in distances_lib.MOMENTS else (pool,)
        loss += self.terms[name] * weight * distance(*values)
    if "teacher_features" in self.terms:
      targets = self.layout.split(teacher).features
      for pool, target, weight, variance in zip(
          pools, targets, self._weights, self._variances):
        squares = tf.reduce_sum((pool - target) ** 2, axis=1)
        loss += self.terms["teacher_features"] * weight * (
            tf.reduce_mean(squares) / variance)
    if self._pixels:
      loss += self.terms["teacher_pixels"] * tf.reduce_mean(
          (pixels - self.layout.split(teacher).pixels) ** 2)
    return loss
