"""The options of a search: every number once, with its checks."""

import dataclasses
from typing import Any, Mapping

from ddss_tf.objectives import distances
from ddss_tf.objectives import objective as objective_lib
from ddss_tf.objectives import teacher as teacher_lib
from ddss_tf.samplers import chain
from ddss_tf.errors import MAX_SEED, UserError, check_positive, check_whole
from ddss_tf.samplers.sampler import KINDS
from ddss_tf.searching.optimizer import SCHEDULES

# The least value of each of a search's whole numbers.
_LEAST = {
    "num_search_steps": 1, "batch_size": 2, "gradient_samples": 1,
    "micro_batch_size": 1, "start_samples": 2, "pool_samples": 2,
    "validation_samples": 2, "validate_every": 1, "checkpoint_every": 1,
    "log_every": 1, "max_skipped": 0, "sampling_batch_size": 1,
    "warmup_steps": 0, "real_samples": 2}
_OPTIONAL = ("gradient_samples", "micro_batch_size", "sampling_batch_size",
             "warmup_steps", "real_samples")
# What None stands for, by optimiser. The rates are our choice. That of "adam"
# suits some tens of steps: its variables are logits in the paper's form.
_OF_OPTIMIZER = {
    "metric": {"learning_rate": 0.15, "rate_schedule": "cosine",
               "control_variate": True},
    "adam": {"learning_rate": 0.05, "rate_schedule": "constant",
             "control_variate": False},
}
_WORDS = {"optimizer": tuple(_OF_OPTIMIZER), "rate_schedule": SCHEDULES,
          "keep": ("best", "last")}
# The most images per chain without gradient, unless the user gives a number.
_MOST_SAMPLED = 250


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchOptions:
  """The numbers of a search. `search` documents each under the same name.

  None is replaced by the value that it stands for, and `objective` by its
  weights by name.

  Raises:
    UserError: a value is out of range, or values do not fit together.
  """
  num_search_steps: int
  batch_size: int
  gradient_samples: int | None = None
  micro_batch_size: int | None = None
  sampling_batch_size: int | None = None
  objective: str | dict[str, float] = "kid_linear"
  feature_weights: list[float] | None = None
  teacher: dict | None = None
  optimizer: str = "metric"
  control_variate: bool | None = None
  pool_samples: int = 8192
  learning_rate: float | None = None
  rate_schedule: str | None = None
  warmup_steps: int | None = None
  real_samples: int | None = None
  keep: str = "best"
  rate_of_distance: float = 1.0
  rate_multipliers: dict[str, float] | None = None
  seed: int = 0
  x0_bound: str | None = None
  start_samples: int = 250
  start_candidates: list[dict] | None = None
  validation_samples: int = 1000
  validate_every: int = 25
  checkpoint_every: int = 25
  log_every: int = 5
  max_skipped: int = 20
  jit_compile: bool = True

  @classmethod
  def of(cls, arguments: Mapping[str, Any]) -> "SearchOptions":
    """The options among arguments of `search`; others are ignored."""
    return cls(**{field.name: arguments[field.name]
                  for field in dataclasses.fields(cls)
                  if field.name in arguments})

  def __post_init__(self):
    self._check_numbers()
    self._check_mappings()
    self._resolve()
    self._check_objective()

  def _check_numbers(self):
    for name, least in _LEAST.items():
      check_whole(f"search.{name}", getattr(self, name), least,
                  optional=name in _OPTIONAL)
    check_whole("search.seed", self.seed, 0, most=MAX_SEED)
    for name in ("learning_rate", "rate_of_distance"):
      if getattr(self, name) is not None:
        check_positive(f"search.{name}", getattr(self, name))
    for name, words in _WORDS.items():
      value = getattr(self, name)
      if value not in words and (name, value) != ("rate_schedule", None):
        raise UserError(f"search.{name} must be one of {', '.join(words)}. "
                        f"Received: {value!r}")
    if (self.warmup_steps or 0) >= self.num_search_steps:
      raise UserError("search.warmup_steps must be below num_search_steps, "
                      f"{self.num_search_steps}. Received: {self.warmup_steps}")
    part = self.gradient_samples or self.batch_size
    micro = self.micro_batch_size or part
    for name, value in (("gradient_samples", part),
                        ("micro_batch_size", micro)):
      if value > self.batch_size:
        raise UserError(f"search.{name} must be at most batch_size, "
                        f"{self.batch_size}. Received: {value}")
    chain.check_x0_bound("search", self.x0_bound)

  def _check_mappings(self):
    multipliers = self.rate_multipliers or {}
    if (not isinstance(multipliers, Mapping)
        or not set(multipliers) <= set(KINDS)):
      raise UserError("search.rate_multipliers must be numbers by kind, for "
                      f"{', '.join(KINDS)}. Received: {multipliers!r}")
    for kind, value in multipliers.items():
      if value != 0:  # A factor of 0 holds a kind where it starts.
        check_positive(f"search.rate_multipliers[{kind!r}]", value)
    candidates = self.start_candidates
    if candidates is not None and not (
        isinstance(candidates, (list, tuple)) and candidates
        and all(isinstance(start, Mapping) for start in candidates)):
      raise UserError("search.start_candidates must be a list of options by "
                      f"name. Received: {candidates!r}")
    if not isinstance(self.teacher or {}, Mapping):
      raise UserError("search.teacher must be options by name. "
                      f"Received: {self.teacher!r}")

  def _resolve(self):
    """Replaces None by the values that it stands for."""
    try:
      terms = objective_lib.weights_of_terms(self.objective)
    except (TypeError, ValueError) as error:
      raise UserError(f"search: {error}") from error
    for name, value in _OF_OPTIMIZER[self.optimizer].items():
      if getattr(self, name) is None:
        object.__setattr__(self, name, value)
    if self.warmup_steps is None:
      # The first steps of MetricAdam are as long whatever the noise, so they
      # come slowly.
      object.__setattr__(self, "warmup_steps", self.num_search_steps // 10
                         if self.optimizer == "metric" else 0)
    part = self.gradient_samples or self.batch_size
    micro = self.micro_batch_size or part
    for name, value in (
        ("gradient_samples", part), ("micro_batch_size", micro),
        ("sampling_batch_size",
         self.sampling_batch_size or min(_MOST_SAMPLED, 4 * micro)),
        ("objective", terms),
        ("teacher", {**teacher_lib.DEFAULT, **(self.teacher or {})}),
        ("control_variate", self.control_variate and objective_lib.uses(
            terms, distances.MOMENTS)),
        ("rate_multipliers", {
            **dict.fromkeys(KINDS, 1.0), **(self.rate_multipliers or {})})):
      object.__setattr__(self, name, value)

  def _check_objective(self):
    if self.pooled and self.pool_samples < self.batch_size:
      raise UserError("search.pool_samples must be at least batch_size, "
                      f"{self.batch_size}. Received: {self.pool_samples}")
    if self.keep == "last" and self.optimizer == "metric":
      raise UserError("search.keep must be 'best' for the optimizer 'metric', "
                      "which goes back to the best step. Received: 'last'")
    if self.real_samples is not None:
      others = sorted(set(self.objective) - set(distances.KERNELS))
      if others:
        raise UserError(
            "search.real_samples must be None for objectives other than "
            f"{', '.join(distances.KERNELS)}, whose estimate from few real "
            f"images would be biased. Received: {others}")
      if self.control_variate:
        raise UserError("search.real_samples must be None with a control "
                        "variate, whose moments are about the mean of all real "
                        f"images. Received: {self.real_samples}")
    if not self.is_elbo:
      return
    if self.gradient_samples % self.micro_batch_size:
      raise UserError(
          "search.micro_batch_size must divide gradient_samples, "
          f"{self.gradient_samples}, for the objective 'elbo', a mean over "
          f"micro-batches. Received: {self.micro_batch_size}")
    if self.x0_bound is not None:
      raise UserError("search.x0_bound must be None for the objective 'elbo', "
                      "whose states are not sampled. "
                      f"Received: {self.x0_bound!r}")

  @property
  def uses_teacher(self) -> bool:
    """Whether the objective compares each image with a teacher's."""
    return objective_lib.uses(self.objective, objective_lib.MATCHING)

  @property
  def is_elbo(self) -> bool:
    """Whether the objective is the variational bound."""
    return objective_lib.ELBO in self.objective

  @property
  def pooled(self) -> bool:
    """Whether the steps take their samples from a pool."""
    return self.uses_teacher or self.control_variate

  def setting(self, denoiser, dataset, networks) -> dict:
    """What decides the value of a sampler, as JSON."""
    setting = {
        "denoiser": denoiser.key, "dataset": dataset.sha256,
        "features": [network.key for network in networks],
        "feature_weights": self.feature_weights, "objective": self.objective,
        "x0_bound": self.x0_bound}
    if self.uses_teacher:
      setting["teacher"] = self.teacher
    return setting

  def identity(self, setting: dict) -> dict:
    """What decides the result of a search, as JSON.

    A search of another identity cannot go on from this one's checkpoint.

    Args:
      setting: what `setting` returns.
    """
    identity = {
        **setting, "num_search_steps": self.num_search_steps,
        "batch_size": self.batch_size,
        "gradient_samples": self.gradient_samples,
        "pool_samples": self.pool_samples if self.pooled else None,
        "control_variate": self.control_variate,
        "learning_rate": self.learning_rate,
        "rate_of_distance": self.rate_of_distance,
        "rate_multipliers": self.rate_multipliers,
        "seed": self.seed, "validation_samples": self.validation_samples,
        "validate_every": self.validate_every}
    if self.is_elbo:  # Only the bound depends on it.
      identity["micro_batch_size"] = self.micro_batch_size
    # Searches of before had but these.
    before = {"optimizer": "metric", "rate_schedule": "cosine",
              "warmup_steps": self.num_search_steps // 10,
              "real_samples": None, "keep": "best"}
    return identity | {name: getattr(self, name) for name, value
                       in before.items() if getattr(self, name) != value}


def check_search(arguments: Mapping[str, Any]) -> None:
  """Checks all of a search that can be checked before anything is loaded.

  Args:
    arguments: the arguments of `search`, by name; the parts and others are
      ignored.

  Raises:
    UserError: a value is out of range, or values do not fit together.
  """
  SearchOptions.of(arguments)
