"""Feature networks from outside: pooled pixels, of as many as are asked for."""

import functools

import keras
import pytest

import ddss_tf
from ddss_tf.features import load


@ddss_tf.register_features("pixels")
def pooled_pixels(argument):
  inputs = keras.Input((4, 4, 1))
  x = keras.layers.AveragePooling2D(int(argument or 1))(inputs)
  pool = keras.layers.Flatten(name="pool")(x)
  logits = keras.layers.Dense(3, name="logits", kernel_initializer="ones")(pool)
  return ddss_tf.FeatureNetwork(
      keras.Model(inputs, [pool, logits]), f"pixels-{argument}")


@pytest.mark.slow
def test_features_from_outside(parts, tmp_path, bind):
  run = str(tmp_path / "run")
  bind("search.features = @load_features()\n"
       "evaluate.heldout_features = @load_features()\n"
       "load_features.path = 'pixels:2'")
  own = {name: parts[name] for name in ("denoiser", "dataset")}
  sizes = dict(num_search_steps=4, batch_size=8, pool_samples=16,
               validation_samples=16, validate_every=2)
  ddss_tf.search(run_dir=run, **own, **sizes, sampler=functools.partial(
      ddss_tf.make_sampler, family="ggdm", num_steps=2), jit_compile=False)
  records = ddss_tf.evaluate(
      run, **parts, num_samples=16, jit_compile=False)
  assert records[0]["features_heldout"]["name"] == "pixels-2"
  assert ddss_tf.export(run, own["denoiser"], jit_compile=False)
  with open(ddss_tf.report(run), encoding="utf-8") as page:
    assert "pixels-2" in page.read()


@pytest.mark.slow
def test_they_compare(parts, tmp_path):
  records = ddss_tf.compare(
      str(tmp_path), **{**parts, "features": ddss_tf.load_features("pixels")},
      num_steps=[2], solvers=["ddim"], families=[], num_samples=16,
      stride_samples=16, jit_compile=False)
  assert records[0]["features"]["name"] == "pixels-"


def test_bad_names():
  with pytest.raises(ValueError, match="must be new.*'digits_cnn'"):
    ddss_tf.register_features("digits_cnn")(pooled_pixels)
  with pytest.raises(ddss_tf.UserError, match="resize must not be given.*pixels"):
    load.load_features("pixels:2", resize="none")
