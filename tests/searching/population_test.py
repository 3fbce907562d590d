"""The gradient of a population."""

import functools

import numpy as np
import pytest
import tensorflow as tf

import ddss_tf
from ddss_tf.denoisers import rematerialise
from ddss_tf.objectives import distances as distances_lib
from small_searches import make_search, options


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
