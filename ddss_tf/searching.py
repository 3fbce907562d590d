"""The search: gradient descent on a sampler's coefficients.

  seeds (step, sample) -> chain.draw_noise -> chain.run_chain -> features
                              ^                                      |
  variables -> coefficients --+              objectives.kid_linear <-+-- mean
      ^                                                |             real feature
      +------------- Adam, one rate per kind <---------+
"""

import time

from absl import logging
import gin
import keras
import numpy as np
import tensorflow as tf

from ddss_tf import card
from ddss_tf import chain
from ddss_tf import features as features_lib
from ddss_tf import figures
from ddss_tf import objectives
from ddss_tf import progress
from ddss_tf import run_dir as run_dir_lib
from ddss_tf import sampling
from ddss_tf.data import ImageDataset
from ddss_tf.denoisers import Denoiser
from ddss_tf.errors import UserError
from ddss_tf.samplers import KINDS, Sampler


def default_learning_rates(num_steps: int) -> dict[str, float]:
  """Adam's initial rate for each of `samplers.KINDS`; our choice.

  Found at K = 5 on the digits and scaled to other K by reasoning: Adam moves
  every weight by about its rate, a state sums up to K of them and K states
  follow each other, so weights go with 1 / K^2; the distance between times
  goes with 1 / K. Measured at K = 5 and 10 only.
  """
  ratio = 5 / num_steps
  return {"weights": 0.02 * ratio**2, "pred": 0.02 * ratio**2,
          "times": 0.006 * ratio, "noise_scales": 0.2 * ratio}


def check_shapes(denoiser: Denoiser, dataset: ImageDataset, *networks) -> None:
  """Checks that all parts speak of images of one shape.

  Raises:
    UserError: names the part that differs.
  """
  shape = denoiser.image_shape
  others = [("data set", dataset.name, dataset.images.shape[1:])]
  others += [("feature network", network.name, network.model.input_shape[1:])
             for network in networks]
  for kind, name, other in others:
    if tuple(other) != shape:
      raise UserError(f"{kind} {name!r} must have the image shape {shape} of "
                      f"the denoiser {denoiser.name!r}. Received: {other}")


class Search:
  """One search: its compiled step, its optimisers, its checkpointed state.

  Args:
    denoiser: the frozen model.
    sampler: the family whose variables are learned.
    features: the network of the loss.
    real_mean: float32 [D], mean feature of the whole training set.
    batch_size: images per step, which is the population of the KID.
    num_search_steps: steps over which the learning rates decay to 0 (cosine).
    learning_rates: Adam's initial rate of each kind of variable.
    clip_norm: bound on the global norm of the gradient.
    seed: of the run; the images of a step depend on it and on the step only.
    jit_compile: compile the network with XLA.
    remat: recompute the network's activations; False keeps them all.
  """

  def __init__(self, denoiser, sampler, features, real_mean, *, batch_size,
               num_search_steps, learning_rates, clip_norm, seed,
               jit_compile=True, remat=True):
    self.sampler = sampler
    self.kinds, self.variables = [], []
    for kind, variables in sampler.variables_by_kind.items():
      self.kinds += [kind] * len(variables)
      self.variables += variables
    self.optimizers = {}
    for kind, variables in sampler.variables_by_kind.items():
      decay = keras.optimizers.schedules.CosineDecay(
          learning_rates[kind], num_search_steps)
      self.optimizers[kind] = keras.optimizers.Adam(decay, name=f"adam_{kind}")
      self.optimizers[kind].build(variables)
    self.step = tf.Variable(0, dtype=tf.int64, trainable=False)
    self.skipped = tf.Variable(0, dtype=tf.int64, trainable=False)
    self.best_kid = tf.Variable(np.inf, dtype=tf.float32, trainable=False)
    self.best_step = tf.Variable(-1, dtype=tf.int64, trainable=False)
    self.best = [tf.Variable(v.value, trainable=False) for v in self.variables]
    self.checkpoint = tf.train.Checkpoint(
        variables=[v.value for v in self.variables], best=self.best,
        optimizers=self.optimizers, step=self.step, skipped=self.skipped,
        best_kid=self.best_kid, best_step=self.best_step)

    if remat:
      eps_fn = chain.rematerialise(denoiser.eps, jit_compile)
    else:
      eps_fn = tf.function(denoiser.eps, jit_compile=jit_compile)
    pair = sampling.seed_pair(seed)
    real_mean = tf.constant(real_mean, tf.float32)

    @tf.function
    def loss_and_gradients(step):
      indices = step * batch_size + tf.range(batch_size, dtype=tf.int64)
      x_T, step_noise = chain.draw_noise(
          pair, indices, denoiser.image_shape, sampler.num_steps)
      with tf.GradientTape() as tape:
        images = chain.run_chain(
            eps_fn, sampler.coefficients(), x_T, step_noise)
        loss = objectives.kid_linear(features(images)["pool"], real_mean)
      gradients = tape.gradient(loss, [v.value for v in self.variables])
      return loss, *_clip(gradients, clip_norm)

    self.loss_and_gradients = loss_and_gradients

  def advance(self) -> tuple[float, float, bool]:
    """Makes one step.

    Returns:
      The loss, the gradient norm before clipping, and whether the step was
      taken: one with a value that is not finite changes nothing but the
      counters.
    """
    loss, norm, gradients = self.loss_and_gradients(self.step.value())
    loss, norm = float(loss), float(norm)
    taken = bool(np.isfinite(loss) and np.isfinite(norm))
    if taken:
      for kind, optimizer in self.optimizers.items():
        optimizer.apply([g for g, k in zip(gradients, self.kinds) if k == kind],
                        self.sampler.variables_by_kind[kind])
    else:
      self.skipped.assign_add(1)
    self.step.assign_add(1)
    return loss, norm, taken

  def keep_if_best(self, kid: float) -> None:
    """Remembers the variables if `kid` is the lowest validation KID so far."""
    if kid < float(self.best_kid):
      self.best_kid.assign(kid)
      self.best_step.assign(self.step)
      for best, variable in zip(self.best, self.variables):
        best.assign(variable.value)

  def restore_best(self) -> None:
    """Puts the best variables back into the sampler."""
    for best, variable in zip(self.best, self.variables):
      variable.assign(best)


def _clip(gradients, clip_norm):
  """(global norm, gradients scaled to at most `clip_norm`)."""
  clipped, norm = tf.clip_by_global_norm(gradients, clip_norm)
  return norm, clipped


@gin.configurable(denylist=["run_dir"])
def search(
    run_dir: str,
    denoiser: Denoiser = gin.REQUIRED,
    dataset: ImageDataset = gin.REQUIRED,
    features: features_lib.FeatureNetwork = gin.REQUIRED,
    sampler=gin.REQUIRED,
    num_search_steps: int = gin.REQUIRED,
    batch_size: int = gin.REQUIRED,
    learning_rates: dict[str, float] | None = None,
    clip_norm: float = 1.0,
    seed: int = 0,
    validation_samples: int = 1000,
    validate_every: int = 25,
    checkpoint_every: int = 25,
    log_every: int = 5,
    max_skipped: int = 20,
    jit_compile: bool = True,
) -> Sampler:
  """Searches a sampler, or goes on where an earlier call stopped.

  Writes checkpoints, TensorBoard events, `sampler.json` and
  `coefficients.png` into the run directory. Killed at any moment and called
  again, it ends with the coefficients of an uninterrupted run.

  Args:
    run_dir: folder of the run.
    denoiser: the frozen model.
    dataset: its training set.
    features: the network of the loss.
    sampler: function from a noise schedule to the sampler to learn, such as
      `@make_sampler`.
    num_search_steps: steps in all.
    batch_size: images per step, at least 2.
    learning_rates: Adam's initial rate by kind of variable (`samplers.KINDS`);
      kinds left out keep those of `default_learning_rates`.
    clip_norm: bound on the global norm of the gradient.
    seed: of the search's noise; validation uses seed + 1.
    validation_samples: images of the validation KID, on fixed noise.
    validate_every: steps between validations.
    checkpoint_every: steps between checkpoints.
    log_every: steps between TensorBoard scalars.
    max_skipped: steps with non-finite values after which the search stops.
    jit_compile: compile the network with XLA.

  Returns:
    The sampler, with the best coefficients by validation KID.

  Raises:
    UserError: arguments out of range or that do not fit together; a run
      directory of another search; too many non-finite steps.
  """
  for name, value, least in (
      ("num_search_steps", num_search_steps, 1), ("batch_size", batch_size, 2),
      ("validation_samples", validation_samples, 2),
      ("validate_every", validate_every, 1),
      ("checkpoint_every", checkpoint_every, 1), ("log_every", log_every, 1)):
    if value < least:
      raise UserError(f"search.{name} must be at least {least}. "
                      f"Received: {value}")
  check_shapes(denoiser, dataset, features)
  sampler = sampler(denoiser.schedule)
  rates = {**default_learning_rates(sampler.num_steps),
           **(learning_rates or {})}
  if set(rates) != set(KINDS):
    raise UserError(f"search.learning_rates must be for {', '.join(KINDS)}. "
                    f"Received: {', '.join(rates)}")
  if not sampler.variables_by_kind:
    raise UserError(f"sampler {sampler.label!r} has nothing to learn: search "
                    "one of the ggdm families")

  run = run_dir_lib.RunDir(run_dir)
  # All that decides the result: another one cannot go on from its checkpoint.
  run.claim("search", {
      "denoiser": denoiser.sha256, "dataset": dataset.sha256,
      "features": features.sha256, "sampler": sampler.get_config(),
      "num_search_steps": num_search_steps, "batch_size": batch_size,
      "learning_rates": rates, "clip_norm": clip_norm, "seed": seed,
      "validation_samples": validation_samples,
      "validate_every": validate_every})
  real_mean = features_lib.dataset_features(
      features, dataset, quantise=False, cache_dir=run.cache)["pool"].mean(
          axis=0, dtype=np.float64)
  state = Search(
      denoiser, sampler, features, real_mean, batch_size=batch_size,
      num_search_steps=num_search_steps, learning_rates=rates,
      clip_norm=clip_norm, seed=seed, jit_compile=jit_compile)
  manager = tf.train.CheckpointManager(
      state.checkpoint, run.path("checkpoints"), max_to_keep=3)
  if manager.latest_checkpoint:
    state.checkpoint.restore(manager.latest_checkpoint).assert_consumed()
    logging.info("going on from step %d", int(state.step))

  generator = sampling.Generator(
      denoiser, min(250, validation_samples), jit_compile)
  extract = tf.function(features)

  def validation_kid() -> float:
    pool = [extract(images)["pool"] for images in generator.batches(
        sampler.coefficients(), validation_samples, seed + 1)]
    return float(objectives.kid_linear(
        tf.concat(pool, axis=0), tf.constant(real_mean, tf.float32)))

  with tf.summary.create_file_writer(run.path("tensorboard")).as_default(), \
      progress.bar(
          num_search_steps, f"search {sampler.label} K={sampler.num_steps}",
          "step", initial=int(state.step)) as bar:
    start = int(state.step)
    if start == 0:
      tf.summary.text("config", f"```\n{gin.config_str()}\n```", step=0)
      state.keep_if_best(validation_kid())
      _summarise_state(sampler, generator, seed, 0, float(state.best_kid))
      logging.info("validation KID at the start: %.4f", float(state.best_kid))
    clock = time.monotonic()
    while int(state.step) < num_search_steps:
      loss, norm, taken = state.advance()
      step = int(state.step)
      bar.update(1)
      if not taken:
        logging.warning("step %d skipped: loss %s, gradient norm %s", step,
                        loss, norm)
        if int(state.skipped) > max_skipped:
          raise UserError(
              f"search stopped at step {step}: {int(state.skipped)} steps had "
              "values that are not finite; the last good checkpoint is "
              f"{manager.latest_checkpoint}")
      if step % log_every == 0 or step == num_search_steps:
        seconds = (time.monotonic() - clock) / min(log_every, step - start)
        clock = time.monotonic()
        for name, value in (
            ("search/loss", loss), ("search/gradient_norm", norm),
            ("search/seconds_per_step", seconds),
            ("search/skipped_steps", int(state.skipped))):
          tf.summary.scalar(name, value, step=step)
        bar.set_postfix(loss=f"{loss:.3f}",
                        best_kid=f"{float(state.best_kid):.3f}")
      if step % validate_every == 0 or step == num_search_steps:
        kid = validation_kid()
        state.keep_if_best(kid)
        _summarise_state(sampler, generator, seed, step, kid)
        logging.info("step %d: validation KID %.4f (best %.4f at step %d)",
                     step, kid, float(state.best_kid), int(state.best_step))
        clock = time.monotonic()
      if step % checkpoint_every == 0 or step == num_search_steps:
        tf.summary.flush()
        manager.save(checkpoint_number=step)
        clock = time.monotonic()

  if not np.isfinite(float(state.best_kid)):
    raise UserError("no step of the search had a finite validation KID: the "
                    "denoiser or the feature network gives NaN or infinity")
  state.restore_best()
  best = sampler.coefficients().numpy()
  card.write(run.path(card.FILE), card.SamplerCard(
      label=sampler.label, coefficients=best,
      denoiser={"name": denoiser.name, "sha256": denoiser.sha256},
      search={
          "config": sampler.get_config(),
          "steps": num_search_steps, "best_step": int(state.best_step),
          "skipped_steps": int(state.skipped), "batch_size": batch_size,
          "seed": seed, "validation_kid": float(state.best_kid),
          "validation_samples": validation_samples,
          "features": {"name": features.name, "sha256": features.sha256},
          "dataset": dataset.name}))
  figures.coefficients_png(
      run.path("coefficients.png"), best, sampler.label)
  return sampler


def _summarise_state(sampler, generator, seed, step, kid):
  """Writes the sampler's state to TensorBoard."""
  coefficients = sampler.coefficients().numpy()
  tf.summary.scalar("validation/kid", kid, step=step)
  for name, value in coefficients.named_scalars().items():
    tf.summary.scalar(f"coefficients/{name}", value, step=step)
  images = generator.images(coefficients, 64, seed + 1)
  grid = figures.image_grid(images, columns=8)
  tf.summary.image("samples", grid[None], step=step)
