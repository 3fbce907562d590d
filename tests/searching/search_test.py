"""Whole searches on a Gaussian data set."""

import fcntl
import functools
import os
import shutil

import numpy as np
import pytest
import tensorflow as tf

import ddss_tf
from ddss_tf.runs import run_dir
from ddss_tf.samplers import card
from ddss_tf.samplers import chain
from ddss_tf.samplers import families
from ddss_tf.samplers import generator as generator_lib
from ddss_tf.samplers import sampler as sampler_lib
from ddss_tf.searching import loop
from ddss_tf.errors import UserError
from run_files import is_locked
from small_searches import (
    ROUNDING, SHAPE, check_picture, evaluate, events, options, same_sampler)


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
      optimizer="adam" if parameterisation == "paper" else "metric",
      pool_samples=256,
      validate_every=20, checkpoint_every=60, validation_samples=512))
  generator = generator_lib.Generator(parts["denoiser"], 500, jit_compile=False)
  mean = parts["features"](parts["dataset"].images)["pool"].numpy().mean(0)

  def distance(c):
    pool = parts["features"](generator.images(c, 2000, 99))["pool"]
    return float(np.sum((pool.numpy().mean(0) - mean) ** 2))

  start = sampler_lib.SolverSampler(parts["denoiser"].schedule, 2).coefficients()
  assert distance(sampler.coefficients()) < 0.3 * distance(start)


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
  for name in run_dir.PICTURES:
    check_picture(os.path.join(run, name))
  found = card.read(os.path.join(run, "sampler.json"))
  for a, b in zip(found.coefficients, sampler.coefficients()):
    np.testing.assert_array_equal(a, b)
  assert found.search["steps"] == 12


@pytest.mark.slow
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
def test_the_run_dir_of_a_search_is_its_own(parts, tmp_path, monkeypatch):
  """For as long as it works; of other processes, not of this one."""
  advance = loop.Search.advance
  path = str(tmp_path / ".lock")

  seen = []

  def watched(self):
    seen.append(is_locked(path))
    return advance(self)

  monkeypatch.setattr(loop.Search, "advance", watched)
  searched = options(num_search_steps=1, validate_every=1)
  ddss_tf.search(run_dir=str(tmp_path), **parts, **searched)
  assert seen == [True] and not is_locked(path)
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
