"""The teacher and the control variate."""

import functools
import os

import numpy as np
import pytest
import tensorflow as tf

import ddss_tf
from ddss_tf.objectives import objective as objective_lib
from ddss_tf.samplers import chain
from ddss_tf.samplers import families
from ddss_tf.samplers import generator as generator_lib
from ddss_tf.samplers import solvers
from ddss_tf.searching import pools
from ddss_tf.searching import population
from ddss_tf.errors import UserError
from small_searches import SHAPE, options


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
