"""Tests of the search, the evaluation and the export on a Gaussian data set."""

import contextlib
import fcntl
import functools
import glob
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import ddss_tf
from ddss_tf import metrics
from ddss_tf import schedules
from ddss_tf import storage
from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.denoisers import rematerialise
from ddss_tf.evaluation import evaluator as evaluator_lib
from ddss_tf.features import network as network_lib
from ddss_tf.objectives import distances as distances_lib
from ddss_tf.objectives import elbo
from ddss_tf.objectives import objective as objective_lib
from ddss_tf.reporting import comparison
from ddss_tf.runs import fingerprint
from ddss_tf.runs import records as records_lib
from ddss_tf.runs import run_dir
from ddss_tf.samplers import card
from ddss_tf.samplers import chain
from ddss_tf.samplers import families
from ddss_tf.samplers import generator as generator_lib
from ddss_tf.samplers import sampler as sampler_lib
from ddss_tf.samplers import solvers
from ddss_tf.searching import loop
from ddss_tf.searching import options as options_lib
from ddss_tf.searching import optimizer as optimizer_lib
from ddss_tf.searching import parts as parts_lib
from ddss_tf.searching import pools
from ddss_tf.searching import population
from ddss_tf.searching import search as search_lib
from ddss_tf.searching import starts
from ddss_tf.searching import validation
from ddss_tf.errors import Terminated, UserError

SHAPE = (4, 4, 1)
# An eager chain and a graph, which TensorFlow folds and fuses, differ by some
# 1e-6 after three steps in float32.
ROUNDING = 5e-6


@pytest.fixture(scope="module")
def parts(gaussian_parts):
  return gaussian_parts


def options(**changes):
  family = dict(family="ggdm+pred+time", num_steps=3, init="ddpm")
  return {**dict(
      sampler=functools.partial(families.make_sampler, **family),
      num_search_steps=12, batch_size=16, pool_samples=80,
      validation_samples=64,
      validate_every=4, checkpoint_every=4, jit_compile=False), **changes}


@pytest.fixture(scope="module")
def finished(parts, tmp_path_factory):
  """The run directory of an uninterrupted search, and its sampler."""
  run = str(tmp_path_factory.mktemp("finished"))
  return run, ddss_tf.search(run_dir=run, **parts, **options())


def same_arrays(one, other):
  for name, a, b in zip(ddss_tf.Coefficients._fields, one, other):
    np.testing.assert_array_equal(a, b, err_msg=name)


def same_sampler(one, other):
  same_arrays(one.coefficients(), other.coefficients())


def events(run, files="*.search"):
  """All events of a search but the speed: sorted (step, tag, value)."""
  found = []
  for path in glob.glob(os.path.join(run, "tensorboard", files)):
    for event in tf.compat.v1.train.summary_iterator(path):
      for value in event.summary.value:
        if value.tag not in ("search/seconds_per_step", "config"):
          found.append((event.step, value.tag,
                        value.tensor.SerializeToString()))
  return sorted(found)


def interrupted(run, parts, monkeypatch, at, how, expected):
  """Runs a search that is interrupted before step `at`."""
  advance = loop.Search.advance

  def broken(self):
    if int(self.step) == at:
      how()
    return advance(self)

  with monkeypatch.context() as patch:
    patch.setattr(loop.Search, "advance", broken)
    with pytest.raises(expected) as caught:
      ddss_tf.search(run_dir=run, **parts, **options())
  return caught.value


def die():
  raise KeyboardInterrupt


def test_killed_and_resumed_is_uninterrupted(
    parts, finished, tmp_path, monkeypatch):
  run = str(tmp_path)
  for at in (2, 7, 10):  # Before the first checkpoint, then between two.
    interrupted(run, parts, monkeypatch, at, die, KeyboardInterrupt)
  same_sampler(finished[1], ddss_tf.search(run_dir=run, **parts, **options()))
  # Nothing lost, nothing doubled.
  assert events(run) == events(finished[0])
  with open(os.path.join(run, "checkpoints", "ckpt-12.json")) as f:
    assert json.load(f)["seconds"] > 0


@pytest.mark.slow
def test_terminated_and_resumed_is_uninterrupted(
    parts, finished, tmp_path, monkeypatch):
  run = str(tmp_path)
  error = interrupted(
      run, parts, monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM),
      Terminated)
  assert "after step 6 of 12" in str(error) and "ckpt-6" in str(error)
  assert os.path.exists(os.path.join(run, "checkpoints", "ckpt-6.index"))
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  same_sampler(finished[1], ddss_tf.search(run_dir=run, **parts, **options()))
  assert events(run) == events(finished[0])


@pytest.mark.parametrize("damage", [
    "truncated", *(pytest.param(damage, marks=pytest.mark.slow)
                   for damage in ("flipped", "list"))])
def test_a_damaged_checkpoint_falls_back(
    parts, finished, tmp_path, monkeypatch, caplog, damage):
  run = str(tmp_path)
  interrupted(run, parts, monkeypatch, 10, die, KeyboardInterrupt)
  folder = tmp_path / "checkpoints"
  if damage == "list":
    (folder / "checkpoint").write_text("nonsense {")
  else:
    (data_file,) = folder.glob("ckpt-8.data-*")
    content = bytearray(data_file.read_bytes())
    if damage == "truncated":
      content = content[:len(content) // 2]
    else:
      content[len(content) // 2] ^= 255
    data_file.write_bytes(content)
  same_sampler(finished[1], ddss_tf.search(run_dir=run, **parts, **options()))
  assert events(run) == events(finished[0])
  assert (folder / "ckpt-8.index.damaged").exists() == (damage != "list")
  assert ("ckpt-8 is damaged" in caplog.text) == (damage != "list")


def test_checkpoints_that_are_all_damaged(parts, tmp_path, monkeypatch):
  interrupted(str(tmp_path), parts, monkeypatch, 10, die, KeyboardInterrupt)
  indices = sorted((tmp_path / "checkpoints").glob("*.index"))
  for path in indices:
    path.write_bytes(b"nonsense")
  with pytest.raises(UserError, match="must be readable.*ckpt-8, .*ckpt-4"):
    ddss_tf.search(run_dir=str(tmp_path), **parts, **options())
  assert sorted((tmp_path / "checkpoints").glob("*.index")) == indices


@pytest.mark.slow
def test_a_first_checkpoint_that_was_not_finished(
    parts, finished, tmp_path, monkeypatch):
  interrupted(str(tmp_path), parts, monkeypatch, 6, die, KeyboardInterrupt)
  # As SIGKILL leaves it before TensorFlow writes its list.
  (tmp_path / "checkpoints" / "checkpoint").unlink()
  (tmp_path / "checkpoints" / "ckpt-4.index").write_bytes(b"half")
  same_sampler(finished[1], ddss_tf.search(
      run_dir=str(tmp_path), **parts, **options()))
  assert events(str(tmp_path)) == events(finished[0])


@pytest.mark.parametrize(
    "parameterisation", ["real", pytest.param("paper", marks=pytest.mark.slow)])
def test_search_lowers_the_distance(parts, tmp_path, parameterisation):
  # Deterministic DDIM in 2 steps shrinks a Gaussian; the search must see it in
  # the features of fresh noise.
  run = str(tmp_path)
  family = functools.partial(
      families.make_sampler, family="ggdm+pred+time", num_steps=2,
      init="ddim", parameterisation=parameterisation)
  sampler = ddss_tf.search(run_dir=run, **parts, **options(
      sampler=family, num_search_steps=60, batch_size=128, learning_rate=0.3,
      pool_samples=256,
      validate_every=20, checkpoint_every=60, validation_samples=512))
  generator = generator_lib.Generator(parts["denoiser"], 500, jit_compile=False)
  mean = parts["features"](parts["dataset"].images)["pool"].numpy().mean(0)

  def distance(c):
    pool = parts["features"](generator.images(c, 2000, 99))["pool"]
    return float(np.sum((pool.numpy().mean(0) - mean) ** 2))

  start = sampler_lib.SolverSampler(parts["denoiser"].schedule, 2).coefficients()
  assert distance(sampler.coefficients()) < 0.3 * distance(start)


def make_search(parts, **changes):
  sampler = families.make_sampler(
      parts["denoiser"].schedule, changes.pop("family", "ggdm+pred+time"), 4,
      init=changes.pop("init", "ddpm"))
  real = parts["features"](parts["dataset"].images)["pool"].numpy()
  values = {**dict(
      batch_size=64, gradient_samples=64, micro_batch_size=64,
      objective="kid_linear", num_search_steps=5, learning_rate=0.3,
      seed=3, jit_compile=False), **changes}
  objective = objective_lib.Objective(
      values.pop("objective"), [parts["features"]], [real], SHAPE)
  teacher = None
  if objective.uses_teacher:
    teacher = 3 + np.random.default_rng(0).normal(
        size=(256, objective.width)).astype(np.float32)
  control = None
  if values.pop("control", False):
    control = 0.2 + np.random.default_rng(1).normal(
        size=(100, objective.width)).astype(np.float32)
  return search_lib.assemble(
      parts["denoiser"], sampler, objective,
      options_lib.SearchOptions(objective=objective.terms, **values),
      teacher=teacher, control=control, images=parts["dataset"].images)


@pytest.mark.parametrize("objective", [
    pytest.param(name, marks=[] if name == "kid_linear" else [
        pytest.mark.slow]) for name in distances_lib.DISTANCES] + [
            pytest.param({"kid_linear": 1.0, "teacher_pixels": 5.0,
                          "teacher_features": 2.0}, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "control", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_passes_give_the_gradient_of_one(parts, objective, control):
  if control and objective not in distances_lib.MOMENTS:
    pytest.skip("no moments")
  make = functools.partial(make_search, parts, objective=objective,
                           control=control)
  loss, gradient = make().gradient(1)
  # The last micro-batch of 7 has one sample of the 64.
  for size in (1, 7, 32):
    two = make(micro_batch_size=size)
    two_loss, two_gradient = two.gradient(1)
    np.testing.assert_allclose(two_loss, loss, rtol=1e-4, atol=1e-5)
    error = np.linalg.norm(two_gradient - gradient)
    assert error < 1e-5 * np.linalg.norm(gradient), (size, error)


@pytest.mark.parametrize("control", [
    True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_part_in_one_chain_gives_the_gradient_of_two_passes(parts, control):
  make = functools.partial(make_search, parts, objective="frechet",
                           control=control, gradient_samples=16)
  loss, gradient = make(micro_batch_size=16).gradient(1)
  two_loss, two_gradient = make(micro_batch_size=8).gradient(1)
  np.testing.assert_allclose(two_loss, loss, rtol=1e-4, atol=1e-5)
  error = np.linalg.norm(two_gradient - gradient)
  assert error < 1e-5 * np.linalg.norm(gradient)


@pytest.mark.parametrize("changes,calls,embedded", [
    # All of it in one chain: a call and its repetition for each step.
    pytest.param(dict(), 64 * 8, 64, marks=pytest.mark.slow),
    # Two passes: all images once, and those with a gradient again.
    pytest.param(dict(micro_batch_size=16), 64 * 4 + 64 * 8, 64 + 64,
                 marks=pytest.mark.slow),
    pytest.param(dict(micro_batch_size=16, gradient_samples=32),
                 64 * 4 + 32 * 8, 64 + 32, marks=pytest.mark.slow),
    # Those with a gradient in one chain: the others once.
    (dict(micro_batch_size=16, gradient_samples=16), 48 * 4 + 16 * 8, 64),
])
def test_nothing_is_computed_twice(parts, monkeypatch, changes, calls, embedded):
  """Images that both networks see in a step of K = 4, real ones among them."""
  seen = tf.Variable([0, 0])

  def counting(which, function):
    one = tf.one_hot(which, 2, dtype=tf.int32)

    @tf.function(autograph=False)
    def counted(images, *rest):
      seen.assign_add(one * tf.shape(images)[0])
      return function(images, *rest)

    return counted

  denoiser, network = parts["denoiser"], parts["features"]
  eps = counting(0, denoiser.eps)
  fns = {False: eps, True: rematerialise.rematerialise(eps)}
  monkeypatch.setattr(type(denoiser), "compiled_eps",
                      lambda self, jit_compile, remat=False: fns[remat])
  original = type(network).__call__
  count_images = counting(1, lambda images: images)
  monkeypatch.setattr(type(network), "__call__", lambda self, images: original(
      self, count_images(images)))
  search = make_search(parts, **changes)
  seen.assign([0, 0])
  search.gradient(1)
  assert seen.numpy().tolist() == [calls, embedded]


def test_the_gradient_of_the_bound(parts):
  """Of each micro-batch, by differentiating all of `negative_elbo`."""
  search = make_search(
      parts, objective="elbo", gradient_samples=6, micro_batch_size=3)
  step = 2
  loss, gradient = search.gradient(step)
  indices = step * 64 + np.arange(6)
  chosen = np.random.default_rng([3, step]).integers(
      len(parts["dataset"].images), size=6)
  variables = [v.value for v in search.optimizer.variables.variables]
  with tf.GradientTape() as tape:
    expected = tf.add_n([
        elbo.negative_elbo(
            parts["denoiser"].eps, search.sampler.coefficients(),
            parts["dataset"].images[chosen[part]], *chain.draw_noise(
                generator_lib.seed_pair(3), tf.constant(indices[part]), SHAPE, 4))
        for part in (slice(0, 3), slice(3, 6))]) / 2
  gradients = tape.gradient(expected, variables)
  np.testing.assert_allclose(loss, float(expected), rtol=1e-5)
  expected = np.concatenate([np.ravel(g) for g in gradients])
  assert np.linalg.norm(gradient - expected) < 1e-5 * np.linalg.norm(expected)
  assert np.all(gradient != 0)


@pytest.mark.slow
def test_the_start_is_the_control_variate(parts, tmp_path, monkeypatch):
  # At the start both are the same images: what is left is the distance of all
  # of the pool, whichever samples the step has.
  pool_samples, losses = 320, []
  original = population.PopulationGradient.__call__
  monkeypatch.setattr(
      population.PopulationGradient, "__call__", lambda self, step: (
          losses.append([original(self, i)[0] for i in range(3)]),
          original(self, step))[1])
  changes = dict(num_search_steps=1, pool_samples=pool_samples)
  ddss_tf.search(run_dir=str(tmp_path / "a"), **parts, **options(**changes))
  ddss_tf.search(run_dir=str(tmp_path / "b"), **parts, **options(
      **changes, control_variate=False))
  start = options()["sampler"](parts["denoiser"].schedule).coefficients()
  pool = parts["features"](generator_lib.Generator(
      parts["denoiser"], pool_samples, jit_compile=False).images(
          start, pool_samples, 0))["pool"].numpy().mean(0)
  real = parts["features"](parts["dataset"].images)["pool"].numpy().mean(0)
  np.testing.assert_allclose(
      losses[0], np.sum((pool - real) ** 2), rtol=1e-3)
  assert np.std(losses[1]) > 0.01 * np.mean(losses[1])


def test_a_part_of_the_population_estimates_its_gradient(parts):
  _, whole = make_search(parts).gradient(0)
  # The parts of one population average to the whole: unbiased over which part.
  part = make_search(parts, gradient_samples=16, micro_batch_size=16)
  pool = [part.gradient.views(tf.constant(np.arange(i, i + 16)))
          for i in range(0, 64, 16)]
  nothing = tf.zeros([64, pool[0].shape[1]])
  _, cotangents = part.gradient.differentiate(
      tf.concat(pool, axis=0), nothing, None)
  estimates = [
      4 * part.gradient.pull_back([
          (tf.constant(np.arange(i, i + 16)), cotangents[i:i + 16])]).numpy()
      for i in range(0, 64, 16)]
  np.testing.assert_allclose(np.mean(estimates, axis=0), whole, rtol=1e-3,
                             atol=1e-4 * np.abs(whole).max())
  np.testing.assert_allclose(
      part.gradient(0)[1], estimates[0], rtol=1e-4, atol=1e-5)


def test_chains_of_any_size(parts, tmp_path):
  """Of 7, which divides nothing: the metric alone is of other images."""
  moves = []
  for size in (7, 16):
    sampler = ddss_tf.search(
        run_dir=str(tmp_path / str(size)), **parts, **options(
            micro_batch_size=size, num_search_steps=2, validate_every=1))
    first = sampler.coefficients().numpy().state_weights
    moves.append(first - options()["sampler"](
        parts["denoiser"].schedule).coefficients().numpy().state_weights)
  seven, all_at_once = map(np.ravel, moves)
  assert np.linalg.norm(all_at_once) > 1e-4
  assert seven @ all_at_once > 0.95 * (
      np.linalg.norm(seven) * np.linalg.norm(all_at_once))


@pytest.mark.parametrize("family,init", [
    ("ggdm+pred+time", "ddpm"), ("ggdm", "dpm++3m"), ("vars", "ddpm")])
def test_the_metric_is_that_of_the_features(parts, family, init):
  # By finite differences, on other images than those it was measured on.
  search = make_search(parts, family=family, init=init, batch_size=256,
                       gradient_samples=256, micro_batch_size=256)
  search.optimizer.begin(0)
  inverse, measured = (
      search.optimizer.metric.inverse.numpy(),
      search.optimizer.metric.value.numpy())
  indices = tf.constant(np.arange(5000, 5256))
  real = parts["features"](parts["dataset"].images)["pool"].numpy()
  std = np.sqrt(real.var(axis=0).sum())
  moves, position = [], 0
  for number, variable in enumerate(search.optimizer.variables.variables):
    before = variable.numpy()
    for index in np.ndindex(before.shape):
      # A difference that is small, but not beside rounding, in any unit.
      step = 0.02 * np.sqrt(inverse[position, position] / len(inverse))
      # Noise scales are 0 at the least, where this solver has them.
      bound = init == "dpm++3m" and search.optimizer.variables.kinds[number] == "noise_scales"
      ends = (0.1, 0) if bound else (1, -1)
      views = []
      for end in ends:
        moved = np.array(before)
        moved[index] += end * step
        variable.assign(moved)
        views.append(search.gradient.views(indices).numpy().astype(np.float64))
      moves.append((views[0] - views[1]) / ((ends[0] - ends[1]) * step * std))
      position += 1
    variable.assign(before)
  moves = np.stack(moves)  # [n, N, D]
  metric = np.einsum("ind,jnd->ij", moves, moves) / moves.shape[1]
  alone = np.repeat([v.constraint is not None for v in search.optimizer.variables.variables],
                    [int(np.prod(v.shape)) for v in search.optimizer.variables.variables])
  np.testing.assert_array_equal(inverse[alone][:, ~alone], 0)
  np.testing.assert_allclose(inverse, inverse.T, rtol=1e-9)
  effects = np.diag(inverse)[alone] * np.diag(metric)[alone]
  free = metric[~alone][:, ~alone]
  if len(free):
    effects = np.append(effects, np.linalg.eigvals(
        inverse[~alone][:, ~alone] @ free).real)
    scales = 1 / np.sqrt(np.diag(free))
    related = np.linalg.eigvalsh(free * scales[:, None] * scales)
    # In units of equal effect alone, some would move them far more together.
    assert np.max(related) > 2.5
  # Each direction by 1, or hardly at all.
  felt = effects[effects > 0.3]
  assert len(felt) > len(effects) / 3
  assert np.max(felt) < 1.5
  felt = effects[effects > 0.2 * np.max(effects)]
  assert np.max(felt) < 2.5 * np.min(felt)
  # And of any step the effect is known.
  steps = np.random.default_rng(0).normal(size=inverse.shape) @ inverse
  np.testing.assert_allclose(
      np.einsum("ki,ij,kj->k", steps, measured, steps),
      np.einsum("ki,ij,kj->k", steps, metric, steps), rtol=0.5)


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


def test_a_search_that_is_over_makes_nothing_again(
    parts, finished, monkeypatch):
  run, sampler = finished

  def contents():
    return {path: open(path, "rb").read() for path in glob.glob(
        os.path.join(run, "**"), recursive=True) if os.path.isfile(path)}

  def fail(*args, **kwargs):
    raise AssertionError("made again")

  before = contents()
  monkeypatch.setattr(pools, "views", fail)
  monkeypatch.setattr(generator_lib.Generator, "batches", fail)
  monkeypatch.setattr(optimizer_lib.MetricAdam, "begin", fail)
  same_sampler(sampler, ddss_tf.search(run_dir=run, **parts, **options()))
  assert contents() == before


def test_a_worse_validation_takes_the_search_back(
    parts, tmp_path, monkeypatch):
  values = iter([4.0, 3.0, 5.0, np.nan, 2.0, 7.0])
  validated, begun, metrics_of = [], {}, []
  advance = loop.Search.advance
  measure = optimizer_lib.MetricAdam.begin

  def value_of(self, coefficients):
    validated.append(coefficients)
    return next(values)

  def noting(self):
    begun[self.step] = self.rate, self.sampler.coefficients().numpy()
    return advance(self)

  def measuring(self, step):
    metrics_of.append(step)
    return measure(self, step)

  monkeypatch.setattr(validation.Validation, "__call__", value_of)
  monkeypatch.setattr(loop.Search, "advance", noting)
  monkeypatch.setattr(optimizer_lib.MetricAdam, "begin", measuring)
  sampler = ddss_tf.search(run_dir=str(tmp_path), **parts, **options(
      num_search_steps=20, learning_rate=0.1, rate_of_distance=1e9))
  assert metrics_of == [0, 8, 12]
  for step, (source, factor) in {
      0: (0, 1), 4: (1, 1), 8: (1, 0.5), 12: (1, 0.25), 16: (4, 0.25)}.items():
    rate, coefficients = begun[step]
    same_arrays(coefficients, validated[source])
    expected = (0.05 * 0.5 if step == 0 else
                0.05 * (1 + np.cos(np.pi * (step - 1.5) / 18)))
    np.testing.assert_allclose(rate, factor * expected, rtol=1e-4)
  assert np.abs(validated[2].times - validated[1].times).max() > 1e-3
  assert card.read(str(tmp_path / run_dir.SAMPLER)).search["best_step"] == 16
  same_arrays(sampler.coefficients().numpy(), validated[4])


@pytest.mark.slow
def test_automatic_start_takes_the_best_and_says_why(parts, tmp_path):
  run = str(tmp_path)
  arguments = options(
      sampler=functools.partial(
          families.make_sampler, family="ggdm+pred", num_steps=3, init="auto"),
      num_search_steps=1, batch_size=8, start_samples=64, validation_samples=64)
  sampler = ddss_tf.search(run_dir=run, **parts, **arguments)
  with open(os.path.join(run, "starts.json")) as f:
    ranking = json.load(f)["ranking"]
  tried = {tuple(entry["start"].values()) for entry in ranking}
  assert tried == set(itertools.product(solvers.SOLVERS, schedules.STRIDES))
  # The best with noise and the best without it are there again, at the end.
  ranking, again = ranking[:-2], ranking[-2:]
  assert {entry["samples"] for entry in ranking} == {64}
  assert {entry["samples"] for entry in again} == {512}
  for entries in (ranking, again):
    distances = [entry["distance"] for entry in entries]
    assert distances == sorted(distances)
  for noisy in (True, False):
    first = next(entry["start"] for entry in ranking
                 if noisy == (entry["start"]["init"] == "ddpm"))
    assert first in [entry["start"] for entry in again]
  # The better of these is what the search began with, measured anew.
  config = card.read(os.path.join(run, "sampler.json")).search["config"]
  assert again[0]["start"] == {
      "init": config["init"], "stride": config["stride"]}
  generator = generator_lib.Generator(parts["denoiser"], 64, jit_compile=False)
  mean = parts["features"](parts["dataset"].images)["pool"].numpy().mean(0)

  def distance(solver, stride):
    c = solvers.solver_coefficients(
        parts["denoiser"].schedule, solver, 3, stride).numpy()
    pool = parts["features"](generator.images(c, 64, 1))["pool"]
    return float(distances_lib.kid_linear(pool, mean))

  for entry in (ranking[0], ranking[40], ranking[-1]):
    np.testing.assert_allclose(
        distance(*entry["start"].values()), entry["distance"],
        rtol=1e-3, atol=1e-3)
  # Called again it ranks nothing anew and goes on.
  again = ddss_tf.search(run_dir=run, **parts, **arguments)
  for a, b in zip(sampler.coefficients(), again.coefficients()):
    np.testing.assert_array_equal(a, b)
  # What is no candidate any more is not taken, however good.
  few = [entry["start"] for entry in (ranking[-2], ranking[-1])]
  other = ddss_tf.search(
      run_dir=run, **parts, **arguments, start_candidates=few, restart=True)
  config = other.get_config()
  assert {key: config[key] for key in ("init", "stride")} == few[0]


def test_nothing_is_ranked_for_a_search_that_is_refused(
    parts, finished, tmp_path, monkeypatch):
  run = str(tmp_path / "run")
  shutil.copytree(finished[0], run)

  def search(family="ggdm+pred+time", **changes):
    return ddss_tf.search(run_dir=run, **parts, **options(
        sampler=functools.partial(
            families.make_sampler, family=family, num_steps=3, init="auto"),
        **changes))

  def ranked(*args, **kwargs):
    raise AssertionError("ranked")

  def dear(*args, **kwargs):
    raise AssertionError("dear")

  # Neither what is known of the real images nor a ranking comes first.
  monkeypatch.setattr(parts_lib.reference, "reference", dear)
  for changes, message in (
      (dict(family="ggdm"), r"another sampler: .*, or one of \d+ others"),
      (dict(start_candidates=[{"init": "ddim", "stride": "linear"}]),
       "another sampler: .*'init': 'ddpm'.*Received: .*'init': 'ddim'"),
      (dict(start_candidates=[{"init": "dd"}]), "'auto' must have a start"),
      (dict(start_candidates=[]), "start_candidates must be a list.*\\[\\]")):
    with pytest.raises(UserError, match=message):
      search(**changes)
    assert not os.path.exists(os.path.join(run, "starts.json"))
  # Where the earlier start is one of those, the ranking must tell.
  monkeypatch.undo()
  monkeypatch.setattr(starts, "choose", ranked)
  with pytest.raises(AssertionError, match="ranked"):
    search(start_candidates=[{"init": "ddim"}, {"init": "ddpm"}])
  with pytest.raises(AssertionError, match="ranked"):
    search(family="ggdm", restart=True)


def test_a_deterministic_start_has_no_bound(parts, tmp_path, monkeypatch):
  """And no call of the network is spent on it."""
  monkeypatch.setattr(elbo, "squares", None)
  with pytest.raises(UserError, match="no start with a finite distance"):
    ddss_tf.search(run_dir=str(tmp_path), **parts, **options(
        sampler=functools.partial(
            families.make_sampler, family="ggdm+pred", num_steps=3,
            init="auto"), objective="elbo", start_candidates=[
                {"init": "ddim", "stride": stride}
                for stride in schedules.STRIDES]))


def test_starts_without_a_distance_come_last(parts, tmp_path):
  schedule = parts["denoiser"].schedule
  make = functools.partial(
      families.make_sampler, schedule, family="ggdm+pred", num_steps=3)
  path = str(tmp_path / "starts.json")
  candidates = [{"init": "ddim", "stride": "linear"},
                {"init": "ab2", "stride": "karras"},
                {"init": "ddim", "stride": "quadratic"}]
  values = iter([np.nan, 3.0, 2.0])
  candidates = starts.possible(make, candidates)
  choose = functools.partial(starts.choose, candidates)
  best = choose(lambda count: lambda c: next(values), 9, path, {"a": 1})
  assert (best.init, best._stride) == ("ddim", "quadratic")
  with open(path) as f:
    ranking = json.load(f)["ranking"]
  assert [entry["distance"] for entry in ranking] == [2.0, 3.0, None]
  # Other conditions, or another sampler in the same file, are ranked anew.
  values = iter([5.0, 4.0, 6.0])
  best = choose(lambda count: lambda c: next(values), 9, path, {"a": 2})
  assert best.init == "ab2"
  with pytest.raises(UserError, match="no start with a finite distance"):
    choose(lambda count: lambda c: np.inf, 9, path, {"a": 3})
  for content in ("[", '{"conditions": {"a": 3}, "ranking": [{"start": {}}]}'):
    (tmp_path / "starts.json").write_text(content)
    with pytest.raises(UserError, match="damaged.*Delete it"):
      choose(lambda count: lambda c: 1.0, 9, path, {"a": 3})


def test_a_noisy_start_is_compared_on_more_images(parts, tmp_path):
  """For few images tell only those apart that have their noise in common."""
  candidates = starts.possible(functools.partial(
      families.make_sampler, parts["denoiser"].schedule, family="ggdm",
      num_steps=3), [{"init": name, "stride": "linear"}
                     for name in ("ddpm", "ddim", "dpm++2m")])
  names = {fingerprint.coefficients_sha256(sampler.start.numpy()): start["init"]
           for start, sampler in candidates}
  values = {(9, "ddpm"): 1.0, (9, "dpm++2m"): 3.0, (9, "ddim"): 4.0,
            (72, "ddpm"): 0.9, (72, "dpm++2m"): 0.2}
  asked = []

  def distance(count):
    def of(coefficients):
      asked.append((count, names[fingerprint.coefficients_sha256(coefficients)]))
      return values[asked[-1]]
    return of

  choose = functools.partial(
      starts.choose, candidates, distance, 9, str(tmp_path / "starts.json"))
  assert choose({}).init == "dpm++2m"
  assert sorted(asked) == sorted(values)
  assert choose({}).init == "dpm++2m" and len(asked) == 5  # All is known.
  values[72, "ddpm"] = 0.1
  assert choose({"other": "conditions"}).init == "ddpm"
  # Without one that adds noise there is nothing to ask again.
  del asked[:]
  quiet = functools.partial(
      starts.choose, candidates[1:], distance, 9, str(tmp_path / "quiet.json"))
  assert quiet({}).init == "dpm++2m"
  assert sorted(asked) == [(9, "ddim"), (9, "dpm++2m")]


@pytest.mark.slow
def test_a_markov_family_ranks_only_what_it_holds(parts, tmp_path):
  ddss_tf.search(run_dir=str(tmp_path), **parts, **options(
      sampler=functools.partial(
          families.make_sampler, family="rddim", num_steps=3, init="auto"),
      num_search_steps=1, batch_size=8, start_samples=16,
      validation_samples=16))
  with open(os.path.join(str(tmp_path), "starts.json")) as f:
    tried = {entry["start"]["init"] for entry in json.load(f)["ranking"]}
  assert tried == {"ddpm", "ddim"}


def test_a_search_never_ends_worse_than_it_starts(parts, tmp_path):
  # A rate that destroys every sampler: what is kept is the start.
  family = functools.partial(families.make_sampler, family="ggdm+pred",
                             num_steps=3, init="dpm++2m", stride="linear")
  sampler = ddss_tf.search(run_dir=str(tmp_path), **parts, **options(
      sampler=family, learning_rate=300.0, rate_of_distance=1e9,
      max_skipped=100))
  start = solvers.solver_coefficients(
      parts["denoiser"].schedule, "dpm++2m", 3, "linear").numpy()
  for a, b in zip(sampler.coefficients(), start):
    np.testing.assert_array_equal(a, b)


def test_an_objective_is_the_weighted_sum_of_its_terms(parts):
  first = parts["features"]
  other = network_lib.FeatureNetwork(
      keras.models.clone_model(first.model), "other")
  rng = np.random.default_rng(0)
  real, images, teacher = (
      (0.3 + size * rng.normal(size=(60, *SHAPE))).astype(np.float32)
      for size in (0.25, 0.4, 0.1))
  reals = [network(real)["pool"].numpy() for network in (first, other)]
  objective = objective_lib.Objective(
      {"kid_linear": 2.0, "frechet_axes": 1.0, "teacher_features": 3.0,
       "teacher_pixels": 4.0}, [first, other], reals, SHAPE, [1.0, 0.5])
  expected = 4 * np.mean((images - teacher) ** 2)
  for network, values, weight in zip((first, other), reals, (1.0, 0.5)):
    pool = network(images)["pool"].numpy()
    target = network(teacher)["pool"].numpy()
    for name, factor in (("kid_linear", 2.0), ("frechet_axes", 1.0)):
      expected += weight * factor * float(
          distances_lib.make_distance(name, values)(pool))
    expected += 3 * weight * np.mean(
        np.sum((pool - target) ** 2, axis=1)) / values.var(axis=0).sum()
  view = objective.view(images)
  assert view.shape == (60, objective.width)
  np.testing.assert_allclose(
      objective.value(view, objective.view(teacher)), expected, rtol=1e-4)


@pytest.mark.parametrize("terms,message", [
    ("beauty", "kid_linear.*'beauty'"), ({}, "terms"),
    ({"kid_linear": -1.0}, "'kid_linear' must be a number above 0"),
    ({"elbo": 1.0, "kid_linear": 1.0}, "stands alone")])
def test_bad_objectives(parts, terms, message):
  with pytest.raises(ValueError, match=message):
    objective_lib.Objective(terms, [parts["features"]],
                         [np.eye(12, dtype=np.float32)], SHAPE)


@pytest.mark.slow
def test_matching_a_teacher(parts, tmp_path):
  # On Gaussian data the ODE's solution is linear in x_T, and three steps with
  # free coefficients can be right: the distance to the exact solution falls.
  denoiser = parts["denoiser"]
  family = functools.partial(families.make_sampler, family="ggdm+pred",
                             num_steps=3, init="ddim", stride="linear")
  sampler = ddss_tf.search(run_dir=str(tmp_path), **parts, **options(
      sampler=family, objective="teacher_pixels", num_search_steps=30,
      batch_size=32, learning_rate=0.1, pool_samples=64,
      validation_samples=64, teacher={"num_steps": 20}))
  x_T, _ = chain.draw_noise(tf.constant([9, 0]), tf.range(64), SHAPE, 3)
  # From abar_T to a clean image: mean + std (x_T - ...), see solvers_test.
  abar = denoiser.schedule.abar(999)
  exact = 0.3 + 0.25 * (x_T - abar**0.5 * 0.3) / (
      abar * 0.25**2 + 1 - abar) ** 0.5

  def error(c):
    images = chain.run_chain(denoiser.eps, c, x_T)
    return float(tf.reduce_mean((images - exact) ** 2)) ** 0.5

  start = solvers.solver_coefficients(
      denoiser.schedule, "ddim", 3, "linear").numpy()
  assert error(sampler.coefficients()) < 0.3 * error(start)
  # The teacher's views are kept, and used again.
  cached = [name for name in os.listdir(tmp_path / "cache")
            if name.startswith("views-")]
  assert len(cached) == 2  # Of the steps and of the validation.
  with pytest.raises(UserError, match="teacher must be deterministic.*ddpm"):
    ddss_tf.search(run_dir=str(tmp_path / "noisy"), **parts, **options(
        objective="teacher_pixels", teacher={"solver": "ddpm"}))
  with pytest.raises(UserError, match="search.teacher.*colour"):
    ddss_tf.search(run_dir=str(tmp_path / "odd"), **parts, **options(
        objective="teacher_pixels", teacher={"colour": "ddpm"}))


@pytest.mark.slow
def test_searching_for_likelihood(parts, tmp_path):
  family = functools.partial(families.make_sampler, family="ggdm+pred",
                             num_steps=3, init="ddpm", stride="linear")
  sampler = ddss_tf.search(run_dir=str(tmp_path), **parts, **options(
      sampler=family, objective="elbo", num_search_steps=40, batch_size=64,
      learning_rate=0.1, validation_samples=256))
  rng = np.random.default_rng(0)
  draw = lambda *shape: tf.constant(rng.normal(size=shape), tf.float32)
  x_0 = 0.3 + 0.25 * draw(2000, *SHAPE)
  noise = draw(2000, *SHAPE), draw(2000, 2, *SHAPE)

  def bound(c):
    return float(elbo.negative_elbo(parts["denoiser"].eps, c, x_0, *noise))

  start = solvers.solver_coefficients(
      parts["denoiser"].schedule, "ddpm", 3, "linear").numpy()
  assert bound(sampler.coefficients()) < bound(start) - 0.5
  # Deterministic samplers have no bound to lower.
  with pytest.raises(UserError, match="finite"):
    ddss_tf.search(run_dir=str(tmp_path / "ode"), **parts, **options(
        sampler=functools.partial(family, init="ddim"), objective="elbo"))


@pytest.mark.slow
def test_bounded_x0_is_searched_stored_and_exported(parts, tmp_path):
  run = str(tmp_path)
  sampler = ddss_tf.search(run_dir=run, **parts, **options(
      x0_bound="clip", num_search_steps=2, validate_every=1))
  assert card.read(os.path.join(run, "sampler.json")).x0_bound == "clip"
  x_T, noise = chain.draw_noise(tf.constant([4, 0]), tf.range(9), SHAPE, 3)
  bounded, free = (
      chain.run_chain(parts["denoiser"].eps, sampler.coefficients(),
                      3 * x_T, noise, x0_bound=bound)
      for bound in ("clip", None))
  assert np.abs(bounded - np.clip(free, -1, 1)).max() > 1e-3
  served = tf.saved_model.load(ddss_tf.export(run, parts["denoiser"]))
  np.testing.assert_allclose(
      served.signatures["from_noise"](x_T=3 * x_T, step_noise=noise)["images"],
      bounded, atol=ROUNDING)
  records = evaluate(parts, run)
  assert [r["x0_bound"] for r in records] == [None, None, "clip"]


def test_run_directory(finished):
  run, sampler = finished
  for name in ("sampler.json", *run_dir.PICTURES):
    assert os.path.getsize(os.path.join(run, name)) > 500
  found = card.read(os.path.join(run, "sampler.json"))
  for a, b in zip(found.coefficients, sampler.coefficients()):
    np.testing.assert_array_equal(a, b)
  assert found.search["steps"] == 12


def test_tensorboard_has_every_coefficient_by_name(finished):
  tags = set()
  for root, _, files in os.walk(os.path.join(finished[0], "tensorboard")):
    for file in files:
      for event in tf.compat.v1.train.summary_iterator(
          os.path.join(root, file)):
        tags.update(value.tag for value in event.summary.value)
  for name in finished[1].coefficients().named_scalars():
    assert f"coefficients/{name}" in tags
  for name in ("search/loss", "search/gradient_norm",
               "search/seconds_per_step", "validation/objective", "samples"):
    assert name in tags
  assert "config" in tags
  for name in run_dir.PICTURES:
    assert name.removesuffix(".png") in tags
  for name in finished[1].coefficients().arrays():
    assert f"coefficients/{name}" in tags  # Distributions.


def test_tensorboard_has_the_hyper_parameters(finished):
  """As its own table of them is made."""
  # pylint: disable=g-import-not-at-top
  from tensorboard import context
  from tensorboard.backend.event_processing import data_provider
  from tensorboard.backend.event_processing import plugin_event_multiplexer
  from tensorboard.plugins import base_plugin
  from tensorboard.plugins.hparams import backend_context
  folder = os.path.join(finished[0], "tensorboard")
  events_of_runs = plugin_event_multiplexer.EventMultiplexer()
  events_of_runs.AddRunsFromDirectory(folder)
  events_of_runs.Reload()
  request, table = context.RequestContext(), backend_context.Context(
      base_plugin.TBContext(data_provider=data_provider.MultiplexerDataProvider(
          events_of_runs, folder)))
  found = table.experiment_from_metadata(
      request, "", True, table.hparams_metadata(request, ""),
      table.hparams_from_data_provider(request, "", None))
  words = {info.name: [value.string_value
                       for value in info.domain_discrete.values]
           for info in found.hparam_infos}
  assert words["family"] == ["GGDM+PRED+TIME"]
  assert "kid_linear" in words["objective"][0]
  numbers = {info.name: info.domain_interval.max_value
             for info in found.hparam_infos}
  assert numbers["num_steps"] == 3 and numbers["batch_size"] == 16
  assert "validation/objective" in [
      info.name.tag for info in found.metric_infos]


@pytest.mark.slow
def test_pictures_are_of_the_sampler_and_its_start(
    parts, tmp_path, monkeypatch):
  drawn = {}
  for name in ("coefficients_png", "path_png", "samples_png"):
    inner = getattr(comparison, name)
    monkeypatch.setattr(comparison, name, lambda *args, _inner=inner, _name=name: (
        drawn.update({_name: args}), _inner(*args)))
  run = str(tmp_path)
  searched = options(num_search_steps=2)
  sampler = ddss_tf.search(run_dir=run, **parts, **searched)
  start = searched["sampler"](parts["denoiser"].schedule).coefficients().numpy()
  best = sampler.coefficients().numpy()
  _, found, _, first, schedule = drawn["coefficients_png"]
  assert schedule is parts["denoiser"].schedule
  for a, b, c, d in zip(found, best, first, start):
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(c, d)
  # Before and after are made of the same noise.
  before, after = (images for _, images in drawn["samples_png"][1])
  x_T, noise = chain.draw_noise(
      generator_lib.seed_pair(1), tf.range(len(after)), SHAPE, 3)
  for coefficients, images in ((start, before), (best, after)):
    np.testing.assert_allclose(
        chain.run_chain(parts["denoiser"].eps, coefficients, x_T, noise),
        images, atol=ROUNDING)
  assert len(after) == 64
  # The way of the first of them, by the definition of every state.
  _, states, x0_hats, image, times, _ = drawn["path_png"]
  np.testing.assert_allclose(image, after[0], atol=ROUNDING)
  np.testing.assert_allclose(states[0], x_T[0], atol=ROUNDING)
  np.testing.assert_array_equal(times, best.times)
  for k in range(3):
    made = best.x0_weights[k] * x0_hats[k] + sum(
        best.state_weights[k, u] * states[u] for u in range(k + 1))
    if k < 2:
      made += best.noise_scales[k] * noise[0, k]
    np.testing.assert_allclose(
        made, [*states, image][k + 1], atol=ROUNDING)
  # What is there already is not drawn again.
  drawn.clear()
  ddss_tf.search(run_dir=run, **parts, **searched)
  assert not drawn
  os.remove(os.path.join(run, run_dir.PATH))
  ddss_tf.search(run_dir=run, **parts, **searched)
  assert os.path.exists(os.path.join(run, run_dir.PATH))


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
def test_a_sampler_that_was_searched_starts_anew(
    parts, finished, tmp_path, monkeypatch):
  """An object may be given twice, as in a notebook after an interruption."""
  _, expected = finished
  sampler = options()["sampler"](parts["denoiser"].schedule)
  searched = options(sampler=sampler)
  advance = loop.Search.advance

  def broken(self):
    if self.step == 10:
      die()
    return advance(self)

  run = str(tmp_path / "run")
  with monkeypatch.context() as patch:
    patch.setattr(loop.Search, "advance", broken)
    with pytest.raises(KeyboardInterrupt):
      ddss_tf.search(run_dir=run, **parts, **searched)
  # From its checkpoint; and, the third time, from the beginning.
  for folder in (run, str(tmp_path / "other")):
    same_sampler(ddss_tf.search(run_dir=folder, **parts, **searched), expected)


@pytest.mark.parametrize("family", ["ggdm+pred+time", "rddim+pred"])
def test_a_single_step_is_searched(parts, tmp_path, family):
  """K = 1 has no noise to learn, but the rest."""
  make = functools.partial(
      families.make_sampler, family=family, num_steps=1, init="ddpm")
  sampler = ddss_tf.search(
      run_dir=str(tmp_path), **parts, **options(sampler=make))
  assert not np.array_equal(
      sampler.coefficients().x0_from_eps,
      make(parts["denoiser"].schedule).coefficients().x0_from_eps)
  with pytest.raises(UserError, match="nothing to learn"):
    ddss_tf.search(run_dir=str(tmp_path / "none"), **parts, **options(
        sampler=functools.partial(
            families.make_sampler, family="ddim-learned", num_steps=1)))


@pytest.mark.slow
def test_a_kind_with_rate_0_is_held(parts, tmp_path):
  sampler = ddss_tf.search(
      run_dir=str(tmp_path), **parts,
      **options(rate_multipliers={"times": 0.0}))
  start = options()["sampler"](parts["denoiser"].schedule).coefficients()
  found = sampler.coefficients()
  np.testing.assert_array_equal(found.times, start.times)
  assert np.any(np.abs(found.state_weights - start.state_weights) > 1e-3)


def test_a_pool_is_used_up_before_it_comes_again(parts):
  goal = objective_lib.Objective(
      {"kid_linear": 1.0}, [parts["features"]],
      [np.ones((9, 12), np.float32)], SHAPE, None)
  pool = pools.Pool(
      goal, 16, 0, control=np.ones((83, 12), np.float32))
  steps = [pool.indices(step) for step in range(15)]
  np.testing.assert_array_equal(np.concatenate(steps[:5]), np.arange(80))
  for first in (0, 5, 10):
    used = np.concatenate(steps[first:first + 5])
    assert len(set(used)) == 80 and used.min() >= 0 and used.max() < 83
  # Those through which the gradient passes are others in every round.
  passed = [set(np.concatenate([s[:4] for s in steps[i:i + 5]]))
            for i in (0, 5, 10)]
  assert len(set.union(*passed)) > 35


@pytest.mark.slow
def test_the_run_dir_of_a_search_is_its_own(parts, tmp_path, monkeypatch):
  """For as long as it works; of other processes, not of this one."""
  advance = loop.Search.advance
  path = str(tmp_path / ".lock")

  def locked():
    with open(path, "w") as file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        return True
    return False

  seen = []

  def watched(self):
    seen.append(locked())
    return advance(self)

  monkeypatch.setattr(loop.Search, "advance", watched)
  searched = options(num_search_steps=1, validate_every=1)
  ddss_tf.search(run_dir=str(tmp_path), **parts, **searched)
  assert seen == [True] and not locked()
  with open(path, "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    for call in (
        lambda: ddss_tf.search(run_dir=str(tmp_path), **parts, **searched),
        lambda: ddss_tf.export(str(tmp_path), parts["denoiser"])):
      with pytest.raises(UserError, match="in use by another process"):
        call()


@pytest.mark.slow
def test_another_search_in_the_same_place(parts, finished, tmp_path):
  run, sampler = finished
  with pytest.raises(UserError, match=(
      "another batch_size: 16. Received: 32; another gradient_samples: .*; "
      "another seed: 0. Received: 1.*"
      "search.restart = True")):
    ddss_tf.search(run_dir=run, **parts, **options(batch_size=32, seed=1))
  copy = str(tmp_path / "copy")
  shutil.copytree(run, copy)
  changes = dict(batch_size=32, seed=1)
  anew = ddss_tf.search(
      run_dir=copy, **parts, **options(restart=True, **changes))
  fresh = str(tmp_path / "fresh")
  same_sampler(
      anew, ddss_tf.search(run_dir=fresh, **parts, **options(**changes)))
  assert events(copy) == events(fresh)
  # The same search is no other: it goes on, and is done.
  same_sampler(sampler, ddss_tf.search(
      run_dir=run, **parts, **options(restart=True)))


def test_a_restart_that_is_killed_restarts(tmp_path, monkeypatch):
  """Whatever is left then is not taken for the new search's."""
  run = run_dir.RunDir(str(tmp_path))
  names = ("sampler.json", "tensorboard/pictures/events", "checkpoints/ckpt-3",
           "checkpoints/checkpoint", "checkpoints/zzz")
  remove = run_dir.RunDir.remove
  for killed_at in range(len(names) + 1):
    run.claim("search", {"seed": 0}, restart=True)
    for name in names:
      os.makedirs(os.path.dirname(run.path(name)), exist_ok=True)
      storage.write_text(run.path(name), "")
    left = [killed_at]

    def removing(self, *paths):
      for path in paths:
        if not left[0]:
          raise KeyboardInterrupt
        left[0] -= 1
        remove(self, path)

    with monkeypatch.context() as patch:
      patch.setattr(run_dir.RunDir, "remove", removing)
      results = ("sampler.json", "tensorboard/pictures")
      with contextlib.suppress(KeyboardInterrupt):
        run.claim("search", {"seed": 1}, True, results)
        assert killed_at == len(names)
    if killed_at < len(names):
      with pytest.raises(UserError, match="another seed: 0. Received: 1"):
        run.claim("search", {"seed": 1})
      run.claim("search", {"seed": 1}, True, results)
    assert not run.check("search", {"seed": 1})
    assert os.listdir(run.path("checkpoints")) == ["search.json"]
    assert sorted(os.listdir(run.root)) == ["checkpoints", "tensorboard"]
    assert not os.listdir(run.path("tensorboard"))


def test_pictures_come_into_tensorboard_though_it_was_killed(
    parts, finished, tmp_path, monkeypatch):
  """Between the files and the events."""
  copy = str(tmp_path / "copy")
  shutil.copytree(finished[0], copy)
  pictures = os.path.join(copy, "tensorboard", "pictures")
  expected = events(copy, "pictures/*")
  shutil.rmtree(pictures)

  def killed(*_, **__):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(tf.summary, "image", killed)
    with pytest.raises(KeyboardInterrupt):
      ddss_tf.search(run_dir=copy, **parts, **options())
  assert not os.path.exists(pictures)
  ddss_tf.search(run_dir=copy, **parts, **options())
  assert len(expected) == len(run_dir.PICTURES)
  assert events(copy, "pictures/*") == expected


@pytest.mark.parametrize("changes,message", [
    (dict(batch_size=1), "batch_size must be a whole number >= 2"),
    (dict(num_search_steps=0), "num_search_steps must be a whole number >= 1"),
    (dict(rate_multipliers={"colour": 1.0}), "colour"),
    (dict(rate_multipliers={"times": -1.0}), "'times'.*-1.0"),
    (dict(rate_multipliers=0.5), "numbers by kind.*0.5"),
    (dict(teacher="ddim"), "options by name.*'ddim'"),
    (dict(pool_samples=15), "at least batch_size, 16.*15"),
    (dict(objective="beauty"), "kid_linear.*'beauty'"),
    (dict(x0_bound="soft"), "clip or dynamic.*'soft'"),
    (dict(x0_bound="clip", objective="elbo"), "must be None.*'elbo'.*'clip'"),
    (dict(micro_batch_size=17), "micro_batch_size.*at most batch_size, 16.*17"),
    (dict(micro_batch_size=5, objective="elbo"), "must divide.*16.*: 5"),
    (dict(gradient_samples=32), "gradient_samples.*at most batch_size, 16.*32"),
    (dict(sampler=functools.partial(
        families.make_sampler, family="ddim", num_steps=3)),
     "nothing to learn"),
])
def test_bad_arguments(parts, tmp_path, changes, message):
  with pytest.raises(UserError, match=message):
    ddss_tf.search(run_dir=str(tmp_path), **parts, **options(**changes))


def test_parts_that_do_not_fit(parts, tmp_path):
  other = {**parts, "denoiser": ddss_tf.gaussian_denoiser((8, 8, 1))}
  with pytest.raises(UserError, match=r"data set 'gaussian'.*\(8, 8, 1\)"):
    ddss_tf.search(run_dir=str(tmp_path), **other, **options())


def evaluate(parts, run, **changes):
  baselines = [functools.partial(
      families.make_sampler, family=family, num_steps=3)
               for family in ("ddpm", "ddim")]
  return ddss_tf.evaluate(run, **parts, **{**dict(
      heldout_features=parts["features"], baselines=baselines, num_samples=300,
      batch_size=128, jit_compile=False), **changes})


def test_evaluation(parts, finished, monkeypatch):
  run, _ = finished
  records = evaluate(parts, run)
  assert [r["sampler"] for r in records] == [
      "DDPM linear", "DDIM linear", "GGDM+PRED+TIME"]
  for record in records:
    for key in ("num_steps", "fid", "kid", "kid_std", "inception_score",
                "fid_heldout", "num_samples", "num_real", "seed", "features",
                "denoiser", "dataset"):
      assert record[key] is not None or key == "denoiser", key
    assert record["fid"] == pytest.approx(record["fid_heldout"])
    splits = record["inception_score_splits"]
    assert splits["splits"] == 10 and splits["std"] > 0
    # A split's score is lower, as its marginal is nearer to each sample's.
    assert 1 < splits["mean"] < record["inception_score"]
    assert "features pool, logits logits" in record["features"]["protocol"]
    # Of the second of three batches, as the first was compiled in its time.
    timing = record["timing"]
    assert timing["batch_size"] == 128 and "CPU core" in timing["device"]
    assert 0 < timing["seconds_per_image"] < 0.1
  with open(os.path.join(run, "metrics.json")) as f:
    assert json.load(f) == records
  assert os.path.getsize(os.path.join(run, "samples.png")) > 2000
  # Another call measures nothing again, and says the same.
  monkeypatch.setattr(evaluator_lib, "_measure", None)
  assert evaluate(parts, run) == records
  # Other conditions do not take those rows.
  with pytest.raises(TypeError):
    evaluate(parts, run, seed=5)
  text = records_lib.table(records)
  assert text.count("\n") == 4 and "DDPM linear" in text
  assert f"| FID-{records[0]['num_samples']} |" in text
  full = records_lib.table([{**records[0], "num_samples": 50_000}])
  assert "| FID " in full and "FID-" not in full


def test_a_record_is_what_tf_gan_says_of_the_same_images(parts, tmp_path):
  """`features_sources_test.py` does so of a searched sampler and a SavedModel.

  There all images are of one class, and the Inception Score is 1.
  """
  denoiser, network = parts["denoiser"], parts["features"].model
  sampler = sampler_lib.SolverSampler(denoiser.schedule, 2, "ddpm")
  record = evaluator_lib.Evaluator(
      run_dir.RunDir(str(tmp_path)), **parts, batch_size=50,
      jit_compile=False).record(sampler, 100)
  generated = generator_lib.Generator(denoiser, 50, jit_compile=False).images(
      sampler.coefficients(), 100, record["seed"])
  (real, _), (fake, logits) = [
      network(np.clip(np.round(127.5 * images + 127.5), 0, 255).astype(
          np.uint8) / np.float32(127.5) - 1)
      for images in (parts["dataset"].images, generated)]
  tfgan = metrics._tfgan()  # TF-GAN's module itself.
  # Its blocks are consecutive rows; ours are dealt, by one generator each.
  dealt = [tf.gather(pool, np.random.default_rng(seed).permutation(len(pool)))
           for seed, pool in enumerate((real, fake))]
  kid, kid_std = tfgan.kernel_classifier_distance_and_std_from_activations(
      *dealt, max_block_size=len(real) // 2, dtype=tf.float64)
  for name, value in {
      "fid": tfgan.frechet_classifier_distance_from_activations(real, fake),
      "kid": kid, "kid_std": kid_std,
      "inception_score": tfgan.classifier_score_from_logits(logits)}.items():
    np.testing.assert_allclose(record[name], value, rtol=1e-5, err_msg=name)
    assert abs(record[name]) > 1e-3
  assert record["inception_score"] > 1.01


def test_several_held_out_networks_are_measured_in_one_pass(
    parts, tmp_path, monkeypatch):
  denoiser = parts["denoiser"]
  networks = []
  for seed, width in ((1, 5), (2, 9), (3, 7)):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([
        keras.Input(SHAPE), keras.layers.Flatten(),
        keras.layers.Dense(width, activation="tanh", name="pool"),
        keras.layers.Dense(3, name="logits")])
    networks.append(network_lib.FeatureNetwork(model, f"of_{width}"))
  calls = tf.Variable(0)
  plain = denoiser.compiled_eps(False)

  @tf.function
  def counted(x_t, t):
    calls.assign_add(1)
    return plain(x_t, t)

  monkeypatch.setattr(type(denoiser), "compiled_eps", lambda *args: counted)
  sampler = sampler_lib.SolverSampler(denoiser.schedule, 2, "ddpm")

  def measure(folder, heldout, images=100):
    calls.assign(0)
    run = run_dir.RunDir(str(tmp_path / folder), str(tmp_path / "cache"))
    record = evaluator_lib.Evaluator(
        run, **parts, heldout_features=heldout, batch_size=50,
        jit_compile=False).record(sampler, 100)
    assert int(calls) == sampler.num_steps * images // 50
    return record

  together = measure("all", networks)
  alone = [measure(f"only{i}", network) for i, network in enumerate(networks)]
  same = lambda record: {key: value for key, value in record.items() if key
                         not in ("features_heldout", "fid_heldout", "timing")}
  for i, record in enumerate(alone):
    assert record["features_heldout"] == together["features_heldout"][i]
    assert record["fid_heldout"] == together["fid_heldout"][i]
    assert same(record) == same(together)
  assert alone[0]["fid_heldout"] != alone[1]["fid_heldout"] > 0
  # A list of one is that network: what is known of it is not measured again.
  assert measure("only0", networks[:1], images=0) == alone[0]
  assert measure("all", tuple(networks), images=0) == together
  # Other networks are.
  assert measure("all", networks[1:])["fid_heldout"] == together[
      "fid_heldout"][1:]
  none = measure("none", None)
  assert none["features_heldout"] is none["fid_heldout"] is None
  assert measure("none", [], images=0) == none and same(none) == same(together)


def test_evaluation_with_an_unknown_bound(parts, finished):
  with pytest.raises(UserError, match="evaluate.x0_bound.*'soft'"):
    evaluate(parts, finished[0], x0_bound="soft")


def test_image_i_is_the_same_in_any_batch(parts):
  c = sampler_lib.SolverSampler(
      parts["denoiser"].schedule, 3, "ddpm").coefficients()
  whole, parted = (
      generator_lib.Generator(parts["denoiser"], size, False).images(c, 50, 7)
      for size in (50, 13))
  np.testing.assert_allclose(whole, parted, atol=1e-6)


@pytest.mark.parametrize(
    "jit", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_export_needs_only_tensorflow(parts, finished, tmp_path, jit):
  run, sampler = finished
  path = ddss_tf.export(run, parts["denoiser"], jit_compile=jit)
  script = tmp_path / "serve.py"
  script.write_text(f"""
import sys
import numpy as np
import tensorflow as tf
model = tf.saved_model.load({path!r})
serve = model.signatures["serving_default"]
images = serve(seed=tf.constant([4, 0], tf.int32),
               batch_size=tf.constant(9, tf.int32))["images"]
again = serve(seed=tf.constant([4, 0], tf.int32),
              batch_size=tf.constant(5, tf.int32))["images"]
assert not [m for m in sys.modules if m.startswith(("ddss_tf", "gin"))]
np.savez({str(tmp_path / "images.npz")!r}, images=images, again=again)
""")
  subprocess.run([sys.executable, "-I", str(script)], check=True, cwd=tmp_path)
  x_T, noise = chain.draw_noise(tf.constant([4, 0]), tf.range(9), SHAPE, 3)
  images = sampler(x_T, noise, eps_fn=parts["denoiser"].eps)
  with np.load(tmp_path / "images.npz") as served:
    assert served["images"].dtype == np.uint8
    expected = dataset_lib.to_uint8(images.numpy()).astype(int)
    # Compiled, a value on the edge between two may round either way.
    assert np.abs(served["images"] - expected).max() <= (1 if jit else 0)
    np.testing.assert_array_equal(served["again"], served["images"][:5])
  loaded = tf.saved_model.load(path)
  library = loaded.signatures["from_noise"].graph.as_graph_def().library
  assert jit == any(
      function.attr["_XlaMustCompile"].b for function in library.function)
  np.testing.assert_allclose(
      loaded.signatures["from_noise"](x_T=x_T, step_noise=noise)["images"],
      np.clip(images, -1, 1), atol=ROUNDING)


def test_sampling_to_files(parts, finished):
  run, sampler = finished
  path = ddss_tf.sample(
      run, parts["denoiser"], num_images=10, seed=4, jit_compile=False)
  generator = generator_lib.Generator(parts["denoiser"], 10, jit_compile=False)
  with np.load(path) as arrays:
    np.testing.assert_array_equal(
        arrays["images"],
        dataset_lib.to_uint8(generator.images(sampler.coefficients(), 10, 4)))


def test_damaged_or_foreign_sampler(parts, finished, tmp_path):
  with pytest.raises(UserError, match="sampler.json must exist"):
    ddss_tf.sample(str(tmp_path), parts["denoiser"])
  with open(os.path.join(finished[0], "sampler.json")) as f:
    values = json.load(f)
  broken = {**values, "coefficients": {
      **values["coefficients"], "times": [1.0]}}
  foreign = {**values, "denoiser": {"name": "other", "sha256": "00"}}
  newer = {**values, "version": 99}
  for content, message in ((json.dumps(broken), "damaged.*shape"),
                           (json.dumps(foreign), "'other'.*Received"),
                           (json.dumps(newer), "version 1. Received.*99"),
                           ("{", "damaged")):
    (tmp_path / "sampler.json").write_text(content)
    with pytest.raises(UserError, match=message):
      ddss_tf.export(str(tmp_path), parts["denoiser"])
    assert not os.path.exists(tmp_path / "export")


def test_full_disk_loses_nothing(finished, monkeypatch):
  path = os.path.join(finished[0], "sampler.json")
  with open(path) as f:
    before = f.read()

  def full(*args, **kwargs):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "replace", full)
  with pytest.raises(OSError, match="No space left"):
    card.write(path, card.read(path))
  with open(path) as f:
    assert f.read() == before
  assert not [n for n in os.listdir(finished[0]) if n.endswith("sampler.json")
              and n != "sampler.json"]
