"""The search for likelihood."""

import functools

import numpy as np
import pytest
import tensorflow as tf

import ddss_tf
from ddss_tf.objectives import elbo
from ddss_tf.samplers import chain
from ddss_tf.samplers import families
from ddss_tf.samplers import generator as generator_lib
from ddss_tf.samplers import solvers
from ddss_tf.errors import UserError
from small_searches import SHAPE, make_search, options


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
