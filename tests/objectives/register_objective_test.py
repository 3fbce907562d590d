"""An objective from outside: the distance of mean features, in L1."""

import functools
import json
import os

import pytest
import tensorflow as tf

import ddss_tf
from ddss_tf.objectives import distances


@pytest.fixture(autouse=True, scope="module")
def registered():
  yield ddss_tf.register_objective("mean_l1")(mean_l1)
  del distances.DISTANCES["mean_l1"]


def mean_l1(real):
  mean = tf.constant(real.mean(axis=0), tf.float32)
  return lambda features: tf.reduce_sum(
      tf.abs(tf.reduce_mean(features, axis=0) - mean))


@pytest.mark.slow
def test_an_objective_from_outside(parts, tmp_path, bind):
  run = str(tmp_path)
  bind("search.objective = {'mean_l1': 2.0, 'kid_linear': 1.0}")
  ddss_tf.search(
      run_dir=run, **parts, sampler=functools.partial(
          ddss_tf.make_sampler, family="ggdm", num_steps=2),
      num_search_steps=4, batch_size=8, pool_samples=16,
      validation_samples=16, validate_every=2, jit_compile=False)
  with open(os.path.join(run, "sampler.json"), encoding="utf-8") as f:
    card = json.load(f)
  assert card["search"]["objective"] == {"mean_l1": 2.0, "kid_linear": 1.0}
  ddss_tf.evaluate(run, **parts, num_samples=16, jit_compile=False)
  assert ddss_tf.export(run, parts["denoiser"], jit_compile=False)
  with open(ddss_tf.report(run), encoding="utf-8") as page:
    assert "GGDM" in page.read()


@pytest.mark.slow
def test_it_is_compared(parts, tmp_path, bind):
  bind("search.num_search_steps = 2\nsearch.batch_size = 8\n"
       "search.pool_samples = 16\nsearch.validation_samples = 16")
  records = ddss_tf.compare(
      str(tmp_path), **parts, num_steps=[2], solvers=[], families=["rddim"],
      objectives={"l1": "mean_l1"}, num_samples=16, stride_samples=16,
      jit_compile=False)
  assert records[0]["objective"] == {"mean_l1": 1.0}


def test_names_are_taken_once():
  for name in ("frechet", "elbo", "teacher_pixels"):
    with pytest.raises(ValueError, match=f"must be new.*{name}"):
      ddss_tf.register_objective(name)(lambda real: None)
