"""What a user gives a search, checked."""

import functools
import math

from absl import logging

from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.denoisers import wiring
from ddss_tf.features import network as network_lib
from ddss_tf.features import reference
from ddss_tf.networks import precision
from ddss_tf.objectives import objective as objective_lib
from ddss_tf.objectives import teacher as teacher_lib
from ddss_tf.searching import starts
from ddss_tf.denoisers.denoiser import Denoiser
from ddss_tf.errors import UserError
from ddss_tf.features.network import as_networks
from ddss_tf.samplers.sampler import Sampler
from ddss_tf.searching.options import SearchOptions


class SearchParts:
  """What a search is made of, checked against each other.

  Raises:
    UserError: they do not fit together.

  Attributes:
    denoiser, dataset, networks: what the user gave; the denoiser's classes are
      drawn as the data set has them.
    make_sampler: what the user gave as the sampler.
    sampler: the sampler; at its default start if the start is chosen later.
    options: `SearchOptions`.
    teacher: coefficients of the teacher, NumPy, or None.
    reals: float32 [R, D], the real images' features by each network; None until
      `objective` is called.
  """

  def __init__(self, denoiser: Denoiser, sampler, features, dataset,
               options: SearchOptions):
    self.options, self.dataset = options, dataset_lib.as_dataset(dataset)
    self.denoiser = denoiser.for_dataset(self.dataset)
    self.networks = as_networks("search.features", features)
    network_lib.check_shapes(denoiser, self.dataset, *self.networks)
    self._check_dataset()
    self._check_denoiser()
    self.make_sampler, self.sampler = sampler, (
        sampler if isinstance(sampler, Sampler)
        else sampler(denoiser.schedule))
    self._check_sampler()
    try:
      objective_lib.weights_of_networks(options.feature_weights, self.networks)
    except (TypeError, ValueError) as error:
      raise UserError(f"search: {error}") from error
    self.reals = None
    self.teacher = self._teacher() if options.uses_teacher else None

  def _check_dataset(self):
    name, count = self.dataset.name, len(self.dataset.images)
    if count < 2:
      raise UserError(f"data set {name!r} must have at least 2 images, for "
                      f"the spread of their features. Received: {count}")
    if (self.options.real_samples or 0) > count:
      raise UserError("search.real_samples must be at most the images of the "
                      f"data set {name!r}, {count}. "
                      f"Received: {self.options.real_samples}")

  def _check_denoiser(self):
    name = self.denoiser.name
    self.denoiser.check_latents(
        "search", self.options.x0_bound, self.options.is_elbo)
    if self.options.is_elbo and self.denoiser.num_classes is not None:
      raise UserError("objective 'elbo' needs an unconditional denoiser: "
                      f"images come without their classes. Received: {name!r}")
    if self.denoiser.dtype_policy == precision.FLOAT16:
      logging.warning(
          "denoiser %r computes in float16, whose gradients are 0 below 6e-8 "
          "and whose times beyond 512 are halves: a search may stand still. In "
          "float32 or bfloat16 it would not", name)

  def _check_sampler(self):
    sampler = self.sampler
    if self.make_sampler is sampler and self.sampler.chooses_start:
      raise UserError("search.sampler must be a function from a schedule to a "
                      "sampler where init is 'auto'. Received: a sampler")
    if not sum(math.prod(variable.shape) for variables
               in sampler.variables_by_kind.values() for variable in variables):
      raise UserError(f"sampler {sampler.label!r} has nothing to learn: search "
                      "a learned family, such as ggdm+pred+time")
    if (self.options.optimizer == "metric"
        and getattr(sampler, "parameterisation", "real") == "paper"):
      raise UserError(
          "search.optimizer must be 'adam' for a sampler of the "
          "parameterisation 'paper': 'metric' would move the weights most whose "
          "sigmoids are flat, and run away. Received: 'metric'")
    sampler.reset()  # The object may have been searched before.
    if "times" in sampler.variables_by_kind:
      self.denoiser.check_times(sampler.label)
    self.denoiser.check_guidance(sampler.coefficients().guidance_scales)

  def _teacher(self):
    try:
      return teacher_lib.coefficients(
          self.denoiser.schedule, **self.options.teacher)
    except (TypeError, ValueError) as error:
      raise UserError(f"search.teacher: {error}") from error

  def check_wiring(self) -> None:
    """Warns if the network seems to be fed or read in a way it was not trained for."""
    wiring.warn(
        self.denoiser, self.dataset.images, self.dataset.labels,
        self.options.sampling_batch_size, self.dataset.sha256)

  def candidates(self) -> list[tuple[dict, Sampler]]:
    """The options and samplers that the search may start at."""
    if not self.sampler.chooses_start:
      return [({}, self.sampler)]
    schedule, told = self.denoiser.schedule, self.options.start_candidates
    return starts.possible(
        functools.partial(self.make_sampler, schedule),
        starts.suited(schedule) if told is None else told)

  def setting(self) -> dict:
    """What decides the value of a sampler, as JSON."""
    return self.options.setting(self.denoiser, self.dataset, self.networks)

  def objective(self, cache: str) -> objective_lib.Objective:
    """The objective, against the real images' features."""
    reals = [reference.reference(
        network, self.dataset, quantise=False, cache_dir=cache).pool
             for network in self.networks]
    for network, real in zip(self.networks, reals):
      network_lib.check_features(network, self.dataset, real)
    self.reals = reals
    return objective_lib.Objective(
        self.options.objective, self.networks, reals, self.denoiser.image_shape,
        self.options.feature_weights, self.options.real_samples is not None)
