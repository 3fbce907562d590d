"""The published search: plain Adam in the paper's form."""

import keras
import numpy as np
import pytest
import scipy.special
import tensorflow as tf

import ddss_tf
from ddss_tf.features import network as network_lib
from ddss_tf.objectives import distances
from ddss_tf.objectives import objective as objective_lib
from ddss_tf.samplers import card
from ddss_tf.samplers import chain
from ddss_tf.samplers import families
from ddss_tf.samplers import generator as generator_lib
from ddss_tf.searching import options as options_lib
from ddss_tf.searching import search as search_lib
from ddss_tf.errors import UserError
from small_searches import (
    SHAPE, die, events, interrupted, options, same_sampler)

STEPS, COUNT, K = 20, 32, 3


def images_of(v, noise, abar, model):
  """Equations 13 and 14 of the slides, +PRED, for a Gaussian data set.

  Args:
    v: the variables by name.
    noise: x_T [B, D], and the noise of the steps [K - 1, B, D].
    abar: [K], of the times that the network is called at.
    model: its mean and standard deviation.
  """
  states, (mean, std) = [noise[0]], model
  weights = np.zeros((K, K))
  weights[np.tril_indices(K - 1)] = scipy.special.expit(v["state_weights"])
  marginal = np.cumsum(scipy.special.softmax(
      np.append(v["pred"], 1.0)))[:-1][::-1]
  for k in range(K):
    alpha, sigma = np.sqrt(abar[k]), np.sqrt(1 - abar[k])
    eps = sigma * (states[k] - alpha * mean) / ((alpha * std)**2 + sigma**2)
    x0 = (states[k] - np.sqrt(marginal[k]) * eps) / np.sqrt(1 - marginal[k])
    if k == K - 1:
      return x0
    states.append(sum(weights[k, j] * states[j] for j in range(k + 1))
                  + scipy.special.expit(v["x0_weights"][k]) * x0
                  + scipy.special.expit(v["noise_scales"][k]) * noise[1][k])


def kid(features, real_mean):
  """Unbiased KID with the linear kernel, less the mean over real pairs."""
  pairs = features @ features.T
  count = len(features)
  return ((np.sum(pairs) - np.trace(pairs)) / (count * (count - 1))
          - 2 * np.mean(features, axis=0) @ real_mean)


def adam(v, loss_of_step, rate):
  """Kingma & Ba (2015), algorithm 1; gradients by central differences."""
  flat = np.concatenate(list(v.values()))
  named = lambda x: dict(zip(v, np.split(
      x, np.cumsum([len(part) for part in v.values()])[:-1])))
  first = second = np.zeros_like(flat)
  for step in range(STEPS):
    gradient = np.array([
        (loss_of_step(named(flat + h), step) - loss_of_step(named(flat - h), step))
        / 2e-5 for h in 1e-5 * np.eye(len(flat))])
    first = 0.9 * first + 0.1 * gradient
    second = 0.999 * second + 0.001 * gradient**2
    flat = flat - rate * first / (1 - 0.9**(step + 1)) / (
        np.sqrt(second / (1 - 0.999**(step + 1))) + 1e-8)
  return named(flat)


@pytest.fixture(scope="module")
def linear_features():
  inputs = keras.Input(SHAPE)
  pool = keras.layers.Dense(
      12, name="pool", kernel_initializer=keras.initializers.RandomNormal(
          seed=1, stddev=0.5))(keras.layers.Flatten()(inputs))
  return network_lib.FeatureNetwork(keras.Model(
      inputs, [pool, keras.layers.Dense(3, name="logits")(pool)]), "linear")


def test_it_is_adam_by_the_equations(parts, linear_features):
  """As a derivation of its own in float64, without TensorFlow."""
  denoiser, seed = parts["denoiser"], 5
  sampler = families.make_sampler(
      denoiser.schedule, "ggdm+pred", K, parameterisation="paper")
  real = linear_features(parts["dataset"].images)["pool"].numpy()
  numbers = options_lib.SearchOptions(
      num_search_steps=STEPS, batch_size=COUNT, optimizer="adam", seed=seed,
      jit_compile=False)
  search = search_lib.assemble(
      denoiser, sampler, objective_lib.Objective(
          "kid_linear", [linear_features], [real], SHAPE), numbers)
  variables = search.optimizer.variables.variables
  # Away from the flat ends of the sigmoids, where float32 rounds gradients.
  rng = np.random.default_rng(2)
  for variable in variables:
    variable.assign(rng.normal(size=variable.shape))
  start = {v.name: np.ravel(v.numpy()).astype(np.float64) for v in variables}
  assert len(start["state_weights"]) == 3  # One of them is off the diagonal.
  # The bias is 0, so the features of unit images are the rows of the matrix.
  matrix = linear_features(np.eye(16, dtype=np.float32).reshape(-1, *SHAPE))[
      "pool"].numpy().astype(np.float64)

  def loss_of_step(v, step):
    noise = chain.draw_noise(
        generator_lib.seed_pair(seed),
        tf.range(step * COUNT, (step + 1) * COUNT), SHAPE, K)
    x_T, steps = (n.numpy().astype(np.float64) for n in noise)
    images = images_of(
        v, (x_T.reshape(COUNT, 16),
            steps.reshape(COUNT, K - 1, 16).transpose(1, 0, 2)),
        denoiser.schedule.abar(sampler.start.times), (0.3, 0.25))
    # A feature network sees images cut off at their range.
    return kid(np.clip(images, -1, 1) @ matrix,
               real.mean(axis=0, dtype=np.float64))

  wanted = adam(start, loss_of_step, 0.05)
  for _ in range(STEPS):
    assert search.advance().taken
  moved = 0.0
  for variable in variables:
    np.testing.assert_allclose(
        np.ravel(variable.numpy()), wanted[variable.name], atol=1e-5)
    moved = max(moved, np.max(np.abs(
        wanted[variable.name] - start[variable.name])))
  assert moved > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("family,init", [
    ("ggdm+pred+time", "ddim"), ("vars", "ddpm"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("ddim-learned", "ddpm"), ("rddim", "ddim"), ("ggdm", "ddim"),
        ("ggdm+pred", "ddim"), ("ggdm+time", "ddim")))])
def test_every_family_improves_in_the_papers_form(
    parts, tmp_path, family, init):
  """At K = 5, where GGDM has weights off the diagonal."""
  run = str(tmp_path)
  make = lambda schedule: families.make_sampler(
      schedule, family, 5, parameterisation="paper", init=init)
  sampler = ddss_tf.search(run_dir=run, **parts, **options(
      sampler=make, optimizer="adam", objective="kid_linear",
      num_search_steps=16, learning_rate=0.1, batch_size=64, validation_samples=200,
      validate_every=4, keep="last"))
  goal = objective_lib.Objective(
      "kid_linear", [parts["features"]],
      [parts["features"](parts["dataset"].images)["pool"].numpy()], SHAPE)
  images = generator_lib.Generator(parts["denoiser"], 250, False)
  value = [float(goal.value(goal.view(images.images(
      found.coefficients().numpy(), 1000, 7)))) for found in (
          make(parts["denoiser"].schedule), sampler)]
  assert value[1] < value[0], value
  if family.startswith("ggdm"):
    weights = sampler.coefficients().state_weights.numpy()
    assert np.all(weights[np.tril_indices(4)] > 0)


@pytest.mark.slow
def test_killed_and_resumed_is_uninterrupted(parts, tmp_path, monkeypatch):
  """With Adam's moments, fresh real images, and the last step kept."""
  changes = dict(
      sampler=lambda schedule: families.make_sampler(
          schedule, "ggdm+pred", 3, parameterisation="paper"),
      optimizer="adam", objective="kid_linear", real_samples=32, keep="last",
      rate_schedule="cosine", warmup_steps=3)
  killed, whole = str(tmp_path / "killed"), str(tmp_path / "whole")
  interrupted(killed, parts, monkeypatch, 7, die, KeyboardInterrupt, **changes)
  found = [ddss_tf.search(run_dir=run, **parts, **options(**changes))
           for run in (killed, whole)]
  same_sampler(*found)
  assert events(killed) == events(whole)
  cards = [card.read(f"{run}/sampler.json") for run in (killed, whole)]
  assert [c.search["best_step"] for c in cards] == [12, 12]
  # Found to its end, it is finished and not searched again.
  same_sampler(found[0], ddss_tf.search(
      run_dir=killed, **parts, **options(**changes)))


@pytest.mark.quick("kid_linear", "kid_cubic")
@pytest.mark.parametrize("name", list(distances.KERNELS))
def test_fresh_real_images_give_the_same_on_average(name):
  rng = np.random.default_rng(0)
  real = rng.normal(2.0, 1.0, size=(40, 5)).astype(np.float32)
  features = rng.normal(1.5, 1.2, size=(30, 5)).astype(np.float32)
  whole = float(distances.make_distance(name, real)(features))
  fresh = distances.make_fresh_distance(name, real)
  np.testing.assert_allclose(float(fresh(features, real)), whole + (
      # Its real term is |m|^2, with which pairs of an image with itself count.
      (np.sum(real.mean(0)**2) - np.mean(np.sum(real**2, 1))) / 39
      if name == "kid_linear" else 0), rtol=1e-4, atol=1e-4)
  drawn = [float(fresh(features, real[rng.choice(40, 8, replace=False)]))
           for _ in range(300)]
  error = np.std(drawn) / np.sqrt(len(drawn))
  assert abs(np.mean(drawn) - float(fresh(features, real))) < 4 * error


def test_what_does_not_fit_together_is_refused(parts, tmp_path):
  paper = lambda schedule: families.make_sampler(
      schedule, "ggdm", 3, parameterisation="paper")
  for changes, words in (
      (dict(sampler=paper), "optimizer must be 'adam'.*'paper'"),
      (dict(optimizer="sgd"), "one of metric, adam.*'sgd'"),
      (dict(keep="last"), "keep must be 'best' for the optimizer 'metric'"),
      (dict(optimizer="adam", rate_schedule="linear"), "constant, cosine"),
      (dict(optimizer="adam", warmup_steps=99), "below num_search_steps"),
      (dict(optimizer="adam", real_samples=401), "at most the images.*400"),
      (dict(optimizer="adam", objective="frechet", real_samples=9), "biased"),
      (dict(objective="kid_linear", real_samples=9), "with a control")):
    with pytest.raises(UserError, match=words):
      ddss_tf.search(run_dir=str(tmp_path), **parts, **options(**changes))
