"""Steps, and steps that are not taken."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

import ddss_tf
from ddss_tf.features import network as network_lib
from ddss_tf.objectives import objective as objective_lib
from ddss_tf.samplers import families
from ddss_tf.searching import loop
from ddss_tf.searching import options as options_lib
from ddss_tf.searching import search as search_lib
from ddss_tf.errors import UserError
from small_searches import SHAPE, make_search, options


def test_a_step_turns_with_the_variables(parts):
  """What Adam makes of its gradients does not depend on the axes."""
  rng = np.random.default_rng(0)
  count = 6
  # Without times, of which the first is at its bound.
  searches = [make_search(parts, family="ggdm+pred", num_search_steps=count,
                          learning_rate=1e-3) for _ in range(2)]
  size = len(searches[0].optimizer.metric.value.numpy())
  turn, _ = np.linalg.qr(rng.normal(size=(size, size)))
  turns = np.eye(size), turn
  root = rng.normal(size=(size, size)) + 2 * np.sqrt(size) * np.eye(size)
  metric = root @ root.T
  gradients = rng.normal(size=(count, size))
  moved = []
  for search, turn in zip(searches, turns):
    search.optimizer.metric.value.assign(turn @ metric @ turn.T)
    search.optimizer.metric.inverse.assign(turn @ np.linalg.inv(metric) @ turn.T)
    flat = lambda s=search: np.concatenate(
        [np.ravel(v.numpy()).astype(np.float64) for v in s.optimizer.variables.variables])
    before = flat()
    for gradient in gradients:
      search.gradient = lambda step, g=turn @ gradient: (0.0, g)
      assert search.advance()[2]
    moved.append(turn.T @ (flat() - before))
  assert np.linalg.norm(moved[0]) > 1e-4
  np.testing.assert_allclose(moved[1], moved[0], rtol=1e-3, atol=1e-6)


def test_a_step_has_the_effect_of_the_rate(parts):
  # Where all gradients agree; with one in ten steps to warm up, then a cosine.
  rng = np.random.default_rng(0)
  search = make_search(parts, num_search_steps=20, learning_rate=1e-2)
  size = len(search.optimizer.metric.value.numpy())
  root = rng.normal(size=(size, size)) + 2 * np.sqrt(size) * np.eye(size)
  metric = root @ root.T
  search.optimizer.metric.value.assign(metric)
  search.optimizer.metric.inverse.assign(np.linalg.inv(metric))
  gradient = rng.normal(size=size)
  search.gradient = lambda step: (0.0, gradient)
  for step in range(20):
    before = [v.numpy().astype(np.float64) for v in search.optimizer.variables.variables]
    assert search.advance()[2]
    move = np.concatenate(
        [np.ravel(v.numpy() - b) for v, b in zip(search.optimizer.variables.variables, before)])
    rate = (0.005 * (step + 0.5) if step < 2 else
            0.005 * (1 + np.cos(np.pi * (step - 1.5) / 18)))
    np.testing.assert_allclose(
        np.sqrt(move @ metric @ move), rate, rtol=1e-2, atol=1e-6)


@pytest.mark.slow
def test_too_many_non_finite_steps_end_a_search(parts, tmp_path, monkeypatch):
  init = loop.Search.__init__

  def poisoned(self, *args, **kwargs):
    init(self, *args, **kwargs)
    inner = self.gradient

    def compute(step):
      loss, gradient = inner(step)
      if step == 2:
        return loss * np.nan, gradient * np.nan
      if step == 5:
        gradient[-1] = np.inf
      return loss, gradient

    self.gradient = compute

  monkeypatch.setattr(loop.Search, "__init__", poisoned)
  with pytest.raises(UserError, match=(
      r"at step 6: 2 steps.*not finite, this one in the gradient of \w+; the "
      r"last good checkpoint is .*ckpt-4\b")):
    ddss_tf.search(
        run_dir=str(tmp_path / "strict"), **parts, **options(max_skipped=1))


@pytest.mark.slow
@pytest.mark.parametrize("where,value", [
    ("network", np.nan), ("coefficients", None), ("gradient", np.nan),
    pytest.param("network", np.inf, marks=pytest.mark.slow),
    pytest.param("gradient", np.inf, marks=pytest.mark.slow),
    pytest.param("features", np.nan, marks=pytest.mark.slow),
    pytest.param("features", np.inf, marks=pytest.mark.slow)])
def test_faults_change_nothing(parts, tmp_path, monkeypatch, where, value):
  """In the output of a network, its gradient, or where Adam leads.

  At two of the steps.
  """
  factor = tf.Variable(1.0, trainable=False)

  @tf.custom_gradient
  def backwards(output):
    return tf.identity(output), lambda upstream: upstream * factor

  poison = keras.layers.Lambda(
      backwards if where == "gradient" else lambda output: output * factor)
  denoiser, features = parts["denoiser"], parts["features"]
  if where in ("network", "gradient"):
    inputs = denoiser.model.inputs
    denoiser = ddss_tf.Denoiser(
        keras.Model(inputs, poison(denoiser.model(inputs))), denoiser.schedule)
  elif where == "features":
    inputs = keras.Input(SHAPE)
    found, logits = features.model(inputs)
    features = network_lib.FeatureNetwork(keras.Model(inputs, [
        keras.layers.Identity(name="pool")(poison(found)),
        keras.layers.Identity(name="logits")(logits)]), "poisoned")
  advance = loop.Search.advance
  skipped = []

  def refuse(coefficients):
    raise ValueError("outside")

  def state(search):
    return [np.array(v) for v in (
        *search.optimizer.variables.variables, *search.optimizer.moments)]

  def broken(self):
    if self.step not in (2, 5):
      return advance(self)
    before = state(self)
    with monkeypatch.context() as patch:
      if where == "coefficients":
        patch.setattr(ddss_tf.Coefficients, "validate", refuse)
      else:
        factor.assign(value)
      result = advance(self)
    factor.assign(1.0)
    assert not result[2] and self.fault
    for one, other in zip(state(self), before):
      np.testing.assert_array_equal(one, other)
    skipped.append(self.skipped)
    return result

  monkeypatch.setattr(loop.Search, "advance", broken)
  sampler = ddss_tf.search(
      run_dir=str(tmp_path), **options(),
      **{**parts, "denoiser": denoiser, "features": features})
  assert skipped == [1, 2]
  sampler.coefficients().validate()


@pytest.mark.slow
def test_a_kind_with_rate_0_is_held(parts, tmp_path):
  sampler = ddss_tf.search(
      run_dir=str(tmp_path), **parts,
      **options(rate_multipliers={"times": 0.0}))
  start = options()["sampler"](parts["denoiser"].schedule).coefficients()
  found = sampler.coefficients()
  np.testing.assert_array_equal(found.times, start.times)
  assert np.any(np.abs(found.state_weights - start.state_weights) > 1e-3)


def test_a_start_without_distance_has_the_rate_0(parts):
  """And not that of the options, as None has."""
  numbers = options_lib.SearchOptions(
      num_search_steps=20, batch_size=8, pool_samples=8, learning_rate=0.5)
  make = functools.partial(
      search_lib.assemble, parts["denoiser"], families.make_sampler(
          parts["denoiser"].schedule, "ggdm", 2),
      objective_lib.Objective(
          "kid_linear", [parts["features"]], [np.eye(12, dtype=np.float32)],
          SHAPE), numbers)
  rates = [make(learning_rate=rate).optimizer.rate(2) for rate in (0.0, None)]
  assert rates[0] == 0 and 0.4 < rates[1] <= 0.5
