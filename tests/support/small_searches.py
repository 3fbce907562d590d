"""Short searches on a Gaussian data set, shared by tests."""

import functools
import glob
import os

import numpy as np
from PIL import Image
import pytest
import tensorflow as tf

import ddss_tf
from ddss_tf.objectives import objective as objective_lib
from ddss_tf.samplers import families
from ddss_tf.searching import loop
from ddss_tf.searching import options as options_lib
from ddss_tf.searching import search as search_lib

SHAPE = (4, 4, 1)
# TensorFlow folds and fuses the operations of a graph. So a chain in a graph
# and an eager chain differ by some 1e-6 after three steps in float32.
ROUNDING = 5e-6


def options(**changes):
  family = dict(family="ggdm+pred+time", num_steps=3, init="ddpm")
  return {**dict(
      sampler=functools.partial(families.make_sampler, **family),
      num_search_steps=12, batch_size=16, pool_samples=80,
      validation_samples=64,
      validate_every=4, checkpoint_every=4, jit_compile=False), **changes}


def same_arrays(one, other):
  for name, a, b in zip(ddss_tf.Coefficients._fields, one, other):
    np.testing.assert_array_equal(a, b, err_msg=name)


def same_sampler(one, other):
  same_arrays(one.coefficients(), other.coefficients())


def events(run, files="*.search"):
  """The events of a search, sorted: (step, tag, value).

  Those of the speed and the configuration are left out.
  """
  found = []
  for path in glob.glob(os.path.join(run, "tensorboard", files)):
    for event in tf.compat.v1.train.summary_iterator(path):
      for value in event.summary.value:
        if value.tag not in ("search/seconds_per_step", "config"):
          found.append((event.step, value.tag,
                        value.tensor.SerializeToString()))
  return sorted(found)


def interrupted(run, parts, monkeypatch, at, how, expected, **changes):
  """Runs a search, its options changed, that is interrupted before step `at`."""
  advance = loop.Search.advance

  def broken(self):
    if int(self.step) == at:
      how()
    return advance(self)

  with monkeypatch.context() as patch:
    patch.setattr(loop.Search, "advance", broken)
    with pytest.raises(expected) as caught:
      ddss_tf.search(run_dir=run, **parts, **options(**changes))
  return caught.value


def die():
  raise KeyboardInterrupt


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


def evaluate(parts, run, **changes):
  baselines = [functools.partial(
      families.make_sampler, family=family, num_steps=3)
               for family in ("ddpm", "ddim")]
  return ddss_tf.evaluate(run, **parts, **{**dict(
      heldout_features=parts["features"], baselines=baselines, num_samples=300,
      batch_size=128, jit_compile=False, page=False), **changes})


def check_picture(path):
  """Checks that a PNG is whole, and that something is drawn in it."""
  with Image.open(path) as picture:
    pixels = np.asarray(picture.convert("RGB"))
  assert min(pixels.shape[:2]) >= 30, pixels.shape
  # More than 8 shades, and no single one in nearly all pixels.
  shades, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
  assert len(shades) > 8 and counts.max() < 0.995 * counts.sum()
