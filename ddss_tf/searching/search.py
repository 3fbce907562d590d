"""The search: gradient descent on a sampler's coefficients.

  seeds (step, sample) -> chain.draw_noise -> chain.run_chain -> features
                                                   ^                 |
  variables ------------> coefficients ------------+                 v
      ^                                              objective <- real ones
      +------- Adam, in the features' metric <-----------+

`search` builds the parts, resumes, runs and publishes. The algorithm is in
`loop.py`, its gradient in `population.py`, its step in `optimizer.py`.
"""

import functools
from typing import Callable

from absl import logging
import gin
import numpy as np

from ddss_tf import bindings
from ddss_tf import distribution
from ddss_tf import metrics
from ddss_tf import storage
from ddss_tf.objectives import objective as objective_lib
from ddss_tf.runs import checkpoints as checkpoints_lib
from ddss_tf.runs import progress
from ddss_tf.runs import run_dir as run_dir_lib
from ddss_tf.runs import signals
from ddss_tf.samplers import card
from ddss_tf.searching import hooks as hooks_lib
from ddss_tf.searching import loop
from ddss_tf.searching import pools as pools_lib
from ddss_tf.searching import starts
from ddss_tf.searching import summaries
from ddss_tf.datasets.dataset import ImageDataset
from ddss_tf.denoisers.denoiser import Denoiser
from ddss_tf.errors import UserError
from ddss_tf.features.network import FeatureNetwork
from ddss_tf.samplers.sampler import Sampler
from ddss_tf.schedules import NoiseSchedule
from ddss_tf.searching.bound import BoundGradient
from ddss_tf.searching.metric import FeatureMetric
from ddss_tf.searching.optimizer import Adam, MetricAdam, make_schedule
from ddss_tf.searching.options import SearchOptions
from ddss_tf.searching.parts import SearchParts
from ddss_tf.searching.population import PopulationGradient
from ddss_tf.searching.validation import BestSoFar, Validation
from ddss_tf.searching.variables import SamplerVariables


def assemble(denoiser: Denoiser, sampler: Sampler,
             objective: objective_lib.Objective, options: SearchOptions, *,
             images: np.ndarray | None = None,
             teacher: np.ndarray | None = None,
             control: np.ndarray | None = None, learning_rate: float | None = None,
             remat: bool = True) -> loop.Search:
  """Puts the parts of a search together.

  Args:
    denoiser: the frozen model.
    sampler: the family whose variables are learned.
    objective: what is minimised.
    options: the numbers.
    images: float32 [R, H, W, C], the training set, which the ELBO needs.
    teacher: float32 [M, width], the teacher's views of the first M samples of
      the seed, for an objective that uses them.
    control: float32 [M, width], a control variate's views of the same samples,
      or None.
    learning_rate: the highest rate; that of the options if None.
    remat: recompute the network's activations; False keeps them all.
  """
  variables = SamplerVariables(sampler)
  pool = pools_lib.Pool(
      objective, options.batch_size, options.seed, teacher, control,
      options.real_samples)
  common = dict(
      gradient_samples=options.gradient_samples,
      micro_batch_size=options.micro_batch_size, seed=options.seed,
      jit_compile=options.jit_compile, remat=remat)
  gradient = population = PopulationGradient(
      denoiser, variables, objective, pool, x0_bound=options.x0_bound, **common)
  if objective.is_elbo:
    gradient = BoundGradient(denoiser, variables, pool, images, **common)
  multipliers = variables.by_entry(options.rate_multipliers)
  schedule = make_schedule(
      options.rate_schedule,
      options.learning_rate if learning_rate is None else learning_rate,
      options.num_search_steps, options.warmup_steps)
  if options.optimizer == "metric":
    optimizer = MetricAdam(variables, multipliers, schedule, FeatureMetric(
        population, variables, objective, multipliers > 0,
        options.micro_batch_size))
  else:
    optimizer = Adam(variables, multipliers, schedule)
  return loop.Search(sampler, gradient, optimizer, BestSoFar(variables),
                     options.num_search_steps, options.keep)


@bindings.configurable(denylist=["run_dir"])
def search(
    denoiser: Denoiser = gin.REQUIRED,
    sampler: Sampler | Callable[[NoiseSchedule], Sampler] = gin.REQUIRED,
    features: FeatureNetwork | list[FeatureNetwork] = gin.REQUIRED,
    dataset: ImageDataset | np.ndarray = gin.REQUIRED,
    *,
    run_dir: str,
    num_search_steps: int = gin.REQUIRED,
    batch_size: int = gin.REQUIRED,
    gradient_samples: int | None = None,
    micro_batch_size: int | None = None,
    sampling_batch_size: int | None = None,
    objective: str | dict[str, float] = "kid_linear",
    feature_weights: list[float] | None = None,
    teacher: dict | None = None,
    optimizer: str = "metric",
    control_variate: bool | None = None,
    pool_samples: int = 8192,
    learning_rate: float | None = None,
    rate_schedule: str | None = None,
    warmup_steps: int | None = None,
    real_samples: int | None = None,
    keep: str = "best",
    rate_of_distance: float = 1.0,
    rate_multipliers: dict[str, float] | None = None,
    seed: int = 0,
    x0_bound: str | None = None,
    start_samples: int = 250,
    start_candidates: list[dict] | None = None,
    validation_samples: int = 1000,
    validate_every: int = 25,
    checkpoint_every: int = 25,
    log_every: int = 5,
    max_skipped: int = 20,
    restart: bool = False,
    cache_dir: str | None = None,
    jit_compile: bool = True,
) -> Sampler:
  """Searches a sampler, or goes on where an earlier call stopped.

  A call that differs in a larger `num_search_steps` alone goes on, too: after
  the steps that were made, at the rates of the longer search. With a constant
  rate and no warm-up it then ends with the coefficients of a search that had as
  many steps from the beginning, if the first one ended at a validation.

  Writes checkpoints, TensorBoard events, `sampler.json` and pictures of the
  sampler (`PICTURES`) into the run directory; with `init="auto"` also
  `starts.json`. Killed at any moment and called again, it ends with the
  coefficients of an uninterrupted run. With keep="best" it never ends
  worse than it starts, by the objective on its validation images.

  Args:
    denoiser: the frozen model.
    sampler: the sampler to learn; or a function from a noise schedule to it,
      such as `@make_sampler` in gin, which `init="auto"` needs.
    features: the network of the loss, or a list of networks.
    dataset: the training set, or images, float32 [N, H, W, C] in [-1, 1].
    run_dir: folder of the run.
    num_search_steps: steps in all.
    batch_size: images per step, at least 2: the population of the objective.
    gradient_samples: how many of them the gradient passes through; all if
      None. Fewer are cheaper: the rest only sharpens the estimate of where the
      population stands, at the cost of a forward chain. See
      `population.PopulationGradient`.
    micro_batch_size: images per chain; `gradient_samples` if None. The last
      chain is filled up with images that do not count. Smaller chains need less
      memory. The gradient is the same, except for the ELBO, whose last variance
      is fitted to each of them.
    sampling_batch_size: images per chain without gradient, of the validation,
      the starts and the pools; None: four times `micro_batch_size`, because
      they need less memory, but not above 250.
    objective: what is minimised: one of `objective.objective_names()`, or
      weights by name. The best step is chosen by the same objective on the
      validation images.
    feature_weights: weights of the networks in it; 1 each if None.
    teacher: the teacher of the matching objectives: solver, stride and
      num_steps; those left out keep `teacher.DEFAULT`.
    optimizer: "adam", Keras's Adam on every variable, the paper's; or "metric",
      ours, Adam in the metric of the features (`optimizer.py`), which suits the
      "real" parameterisation only.
    control_variate: None: False of "adam", True of "metric". Whether the start's images from the same noise correct the
      moments of the population, for objectives made of moments
      (`distances.MOMENTS`): more precise, for the price of `pool_samples`
      images before the first step.
    pool_samples: how many images the teacher and the control variate make
      beforehand; the steps take their samples from these in turn. Validation
      has the larger of half as many and `validation_samples` for its control.
    learning_rate: Adam's highest rate; None: 0.15 of "metric", where it is the
      share of the features' standard deviation by which a step of all variables
      together moves them, at every K; 0.05 of "adam", in the units of the
      unconstrained variables. Both are our choice.
    rate_schedule: "constant" or "cosine", which falls to 0 at the last step;
      None: "constant" of "adam", "cosine" of "metric".
    warmup_steps: the first steps, in which the rate rises from 0; None: none of
      "adam", a tenth of all of "metric".
    real_samples: fresh real images of every step, as published; None: the mean
      over all of them, which has the same expectation and less noise. Only for
      `distances.KERNELS`.
    keep: what the search ends with: the "best" step by validation, or the
      "last", which "metric" does not allow because it goes back to the best.
    rate_of_distance: the rate is at most this times the start's distance, the
      root of the Frechet distance in the same unit. A higher rate would first
      move a good start away. The distance is measured on the control variate's
      images; without these there is no such limit.
    rate_multipliers: factors on the rate by kind of variable
      (`sampler.KINDS`), 1 for kinds left out.
    seed: the seed of the search's noise; validation uses seed + 1.
    x0_bound: see `chain.bound_x0`.
    start_samples: images by which `init="auto"` chooses; see `starts.choose`.
    start_candidates: what it chooses from, see `starts.possible`; None: what
      suits the schedule, see `starts.suited`.
    validation_samples: images of the validation, on fixed noise.
    validate_every: steps between validations. With "metric", one that is
      not better than the best takes the search back there, with half the rate.
    checkpoint_every: steps between checkpoints.
    log_every: steps between TensorBoard scalars.
    max_skipped: steps with non-finite values after which the search stops.
    restart: where `run_dir` holds another search, begin anew instead of
      refusing; what the other one left is deleted.
    cache_dir: folder of the real images' features, which runs may share;
      run_dir/cache if None.
    jit_compile: compile the network with XLA.

  Returns:
    The sampler, with the best coefficients by validation.

  Raises:
    UserError: arguments out of range or that do not fit together; a run
      directory of another search; too many non-finite steps.
    Interrupted: Ctrl-C, or a notebook's stop button, during the steps: the step
      was finished and a checkpoint saved. A second one ends the call at once.
      It is a KeyboardInterrupt, as Ctrl-C before or after the steps raises.
    Terminated: SIGTERM during the steps, which ends them in the same way.
  """
  given = dict(locals())
  options = SearchOptions.of(given)
  parts = SearchParts(denoiser, sampler, features, dataset, options)
  identity = options.identity(parts.setting())
  with run_dir_lib.RunDir(run_dir, cache_dir).locked() as run:
    # A search that is refused must not have taken long. Before the starts are
    # ranked the sampler is not known, but all that it may become is.
    candidates = parts.candidates()
    earlier = None if restart else _earlier(run, given, parts)
    run.check("search", earlier or identity, restart, open_to={
        "sampler": [candidate.get_config() for _, candidate in candidates]})
    if not run.claimed("search"):
      parts.check_wiring()
    goal = parts.objective(run.cache)
    pools = pools_lib.Pools(parts, goal, run.cache)
    sampler = _chosen(parts, candidates, goal, pools, run)
    config = {"sampler": sampler.get_config()}
    gone_on = _gone_on(run, earlier)
    run.claim(
        "search", {**identity, **config, **(
            {"went_on_from": gone_on} if gone_on else {})}, restart,
        (run_dir_lib.SAMPLER, *run_dir_lib.PICTURES, run_dir_lib.PICTURE_EVENTS),
        earlier and {**earlier, **config})
    run.keep_config()
    first = sampler.coefficients().numpy()
    build = functools.partial(
        assemble, parts.denoiser, sampler, goal, options,
        images=parts.dataset.images)

    if distribution.everyones(storage.exists(run.path(run_dir_lib.SAMPLER)))[0]:
      state = build()  # Without the pools, which only further steps would need.
      _resume(state, run)
      if state.is_over:
        state.settle()
        return _finish(run, state, first, _validation(
            parts, goal, options.validation_samples).generator, seed + 1)
    prepared, validation = _prepare(parts, goal, pools, first)
    state = build(**prepared)
    seconds = _work(state, validation, _resume(state, run), parts, run, gone_on)
    if not np.isfinite(state.best.value):
      raise UserError("no step of the search had a finite validation value: the "
                      "denoiser or the feature network gives NaN or infinity")
    state.settle()
    _publish(run, state, parts, prepared.get("learning_rate", options.learning_rate),
             seconds, gone_on)
    return _finish(run, state, first, validation.generator, seed + 1)


def _earlier(run, arguments: dict, parts: SearchParts) -> dict | None:
  """The identity of the same search with as many steps as the run has so far.

  None if the run has none, or as many as are wanted, or more.
  """
  steps = run.claimed("search").get("num_search_steps")
  if not isinstance(steps, int) or not (
      0 < steps < parts.options.num_search_steps):
    return None
  try:
    options = SearchOptions.of({**arguments, "num_search_steps": steps})
  except UserError:  # A warm-up that is longer than the earlier search.
    return None
  return options.identity(parts.setting())


def _gone_on(run, earlier: dict | None) -> list[dict]:
  """The searches that this one goes on from: their steps, and if they were over.

  Args:
    run: the run directory.
    earlier: see `_earlier`.
  """
  before = run.claimed("search").get("went_on_from", [])
  if earlier is None:
    return before
  return [*before, {"steps": earlier["num_search_steps"],
                    "over": storage.exists(run.path(run_dir_lib.SAMPLER))}]


def _first_rate(parts: SearchParts, goal, other: np.ndarray) -> float:
  """The highest rate, lower for a start that is close to the real features."""
  options = parts.options
  distance = metrics.fid(parts.reals[0], goal.layout.split(other).features[0])
  rate = min(options.learning_rate,
             options.rate_of_distance * max(distance, 0.0) ** 0.5
             / goal.feature_std)
  logging.info("Frechet distance of the start %.3f, rate %.4f", distance, rate)
  return rate


def _validation(parts: SearchParts, goal, num_samples: int, teacher=None,
                known=None) -> Validation:
  """The objective on the noise of seed + 1."""
  options = parts.options
  return Validation(
      goal, parts.denoiser, parts.dataset.images, num_samples, teacher, known,
      seed=options.seed + 1, batch_size=options.sampling_batch_size,
      x0_bound=options.x0_bound, jit_compile=options.jit_compile)


def _chosen(parts: SearchParts, candidates, goal, pools, run) -> Sampler:
  """The sampler at its start: the best of the candidates by the objective."""
  options = parts.options
  if not parts.sampler.chooses_start:
    return parts.sampler
  return starts.choose(
      candidates, lambda count: _validation(
          parts, goal, count, pools.teacher(count, options.seed + 1)),
      options.start_samples, run.path(run_dir_lib.STARTS),
      {**parts.setting(), "family": parts.sampler.get_config(),
       "seed": options.seed + 1})


def _resume(state: loop.Search, run) -> checkpoints_lib.Checkpoints:
  """Puts the newest checkpoint of the run, if any, into the state."""
  checkpoints = checkpoints_lib.Checkpoints(
      state.checkpoint, run.path(run_dir_lib.CHECKPOINTS),
      run.path(run_dir_lib.TENSORBOARD))
  checkpoints.restore()
  if checkpoints.latest:
    logging.info("going on from step %d", state.step)
  return checkpoints


def _prepare(parts: SearchParts, goal, pools, first
             ) -> tuple[dict, Validation]:
  """Makes the pools.

  Returns:
    The arguments of `assemble` that depend on them, and the validation.
  """
  options = parts.options
  prepared, known = {}, None
  if options.control_variate:
    prepared["control"], other = pools.control(first)
    known = other[:options.validation_samples], goal.control_moments(other)
    if options.optimizer == "metric":
      prepared["learning_rate"] = _first_rate(parts, goal, other)
  prepared["teacher"] = pools.teacher(options.pool_samples, options.seed)
  return prepared, _validation(
      parts, goal, options.validation_samples,
      pools.teacher(options.validation_samples, options.seed + 1), known)


def _work(state: loop.Search, validation: Validation,
          checkpoints: checkpoints_lib.Checkpoints, parts: SearchParts, run,
          gone_on: list[dict]) -> float:
  """Runs the steps that are left; returns the seconds of all steps."""
  options, sampler = parts.options, state.sampler
  saved = hooks_lib.SaveCheckpoints(checkpoints, options.checkpoint_every)

  def validate() -> float:
    # The chief's value for all, because the workers' could differ by rounding.
    return distribution.everyones(
        validation(sampler.coefficients().numpy()))[0]

  with checkpoints.writer().as_default(), progress.bar(
      options.num_search_steps, f"search {sampler.label} K={sampler.num_steps}",
      "step", initial=state.step) as bar, signals.deferred() as termination:
    loop.run(state, validate, [
        hooks_lib.ProgressBar(bar, options.log_every),
        saved,
        hooks_lib.StopAfterSkipped(options.max_skipped, saved),
        summaries.WriteTensorBoard(
            run, options, parts.dataset.name, validation.generator),
        hooks_lib.StopOnSignal(termination, saved)], options.validate_every,
             was_over={"steps": state.step, "over": True} in gone_on)
  return saved.seconds


def _publish(run, state: loop.Search, parts: SearchParts, rate: float,
             seconds: float, gone_on: list[dict]) -> None:
  """Writes the sampler's card."""
  options, sampler = parts.options, state.sampler
  run.remove(*run_dir_lib.PICTURES, run_dir_lib.PICTURE_EVENTS)
  card.write(run.path(run_dir_lib.SAMPLER), card.SamplerCard(
      label=sampler.label, coefficients=sampler.coefficients().numpy(),
      denoiser=parts.denoiser.identity,
      search={
          "config": sampler.get_config(),
          "steps": options.num_search_steps,
          **({"went_on_from": [each["steps"] for each in gone_on]}
             if gone_on else {}),
          "best_step": state.kept_step,
          "optimizer": options.optimizer, "keep": options.keep,
          "skipped_steps": state.skipped, "batch_size": options.batch_size,
          "gradient_samples": options.gradient_samples,
          "objective": options.objective,
          "control_variate": options.control_variate,
          "learning_rate": options.learning_rate, "rate": rate,
          "rate_multipliers": options.rate_multipliers,
          "seed": options.seed, "seconds": round(seconds, 3),
          "validation": state.kept_value,
          "validation_samples": options.validation_samples,
          "features": [{"name": network.name, "sha256": network.sha256}
                       for network in parts.networks],
          "dataset": parts.dataset.name, **parts.denoiser.card_weights},
      x0_bound=options.x0_bound))


def _finish(run, state: loop.Search, first, generator, seed: int) -> Sampler:
  """Draws the pictures that are missing; returns the searched sampler."""
  wanted = (*run_dir_lib.PICTURES, run_dir_lib.PICTURE_EVENTS)
  # The chief's answer counts for all.
  if distribution.everyones(
      not all(storage.exists(run.path(name)) for name in wanted))[0]:
    summaries.draw(run, state.sampler, first, generator, seed, state.kept_step)
  distribution.everyones(0)  # Now all workers find what the chief has written.
  return state.sampler
