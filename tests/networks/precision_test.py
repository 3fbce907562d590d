"""Tests of the network's number format, and of what XLA cannot compile."""

import os

import keras
import numpy as np
import pytest
import tensorflow as tf

import ddss_tf
from ddss_tf.denoisers import compiling
from ddss_tf.networks import precision
from ddss_tf.runs import run_dir as run_dir_lib
from ddss_tf.samplers import card
from ddss_tf.samplers import chain
from ddss_tf.errors import UserError

NAME = "digits16-ddpm"


@pytest.fixture(scope="module")
def both():
  return (ddss_tf.load_denoiser(NAME),
          ddss_tf.load_denoiser(NAME, dtype_policy="mixed_bfloat16"))


@pytest.mark.slow
def test_bfloat16_is_close_at_every_time(both):
  """Times beyond 256 that bfloat16 would merge stay apart."""
  exact, rough = both
  x = tf.random.stateless_normal([8, 16, 16, 1], [0, 1])
  t = tf.constant([0.0, 1.0, 257.0, 258.0, 700.5, 701.0, 998.0, 999.0])
  wanted, got = exact.eps(x, t).numpy(), rough.eps(x, t).numpy()
  assert got.dtype == np.float32
  error = np.sqrt(np.mean((got - wanted) ** 2, axis=(1, 2, 3)))
  size = np.sqrt(np.mean(wanted**2, axis=(1, 2, 3)))
  assert np.all(error < 0.03 * size) and np.all(error > 0)
  embedding = rough.model.get_layer(next(
      layer.name for layer in rough.model.layers
      if type(layer).__name__ == "TimeEmbedding"))
  assert embedding.compute_dtype == "float32"
  # What computes is not what is kept.
  assert {v.dtype for v in rough.model.variables} == {"float32"}
  inner = [layer.compute_dtype for outer in rough.model.layers
           for layer in outer._flatten_layers()
           if isinstance(layer, (keras.layers.Conv2D, keras.layers.Dense))]
  assert inner.count("bfloat16") == len(inner) - 1
  assert rough.model.layers[-1].compute_dtype == "float32"


@pytest.mark.slow
def test_gradients_in_bfloat16_reach_float32_coefficients(both):
  gradients = []
  for denoiser in both:
    sampler = ddss_tf.make_sampler(
        denoiser.schedule, "ggdm+pred+time", num_steps=2)
    x_T, noise = chain.draw_noise([0, 1], tf.range(4), (16, 16, 1), 2)
    with tf.GradientTape() as tape:
      images = chain.run_chain(
          denoiser.compiled_eps(False), sampler.coefficients(), x_T, noise)
      loss = tf.reduce_mean(tf.square(images))
    gradients.append(np.concatenate([np.ravel(g) for g in tape.gradient(
        loss, [v.value for v in sampler.trainable_variables])]))
  wanted, got = gradients
  assert got.dtype == np.float32
  assert np.linalg.norm(got - wanted) < 0.1 * np.linalg.norm(wanted)


@pytest.mark.slow
def test_the_format_decides_who_it_is(both, tmp_path):
  exact, rough = both
  assert exact.sha256 == rough.sha256 and exact.key != rough.key
  assert exact.key == exact.sha256
  assert "dtype_policy" not in exact.identity
  assert rough.identity["dtype_policy"] == "mixed_bfloat16"
  rough.save(str(tmp_path / "own"))
  again = ddss_tf.load_denoiser(str(tmp_path / "own"))
  assert (again.key, again.dtype_policy) == (rough.key, rough.dtype_policy)
  back = again.with_policy("float32")
  assert (again.key, again.dtype_policy) == (rough.key, rough.dtype_policy)
  assert back.key == exact.key
  x = tf.random.stateless_normal([2, 16, 16, 1], [0, 1])
  np.testing.assert_array_equal(
      back.eps(x, [3.0, 500.0]), exact.eps(x, [3.0, 500.0]))


@pytest.mark.slow
def test_an_export_in_bfloat16(both, tmp_path):
  """A graph rounds elsewhere than single calls do, within bfloat16's own."""
  _, rough = both
  run = str(tmp_path)
  card.write(os.path.join(run, run_dir_lib.SAMPLER), card.SamplerCard(
      "DDIM", ddss_tf.solver_coefficients(
          rough.schedule, "ddim", 3).numpy(), rough.identity, {}))
  served = tf.saved_model.load(ddss_tf.export(run, rough)).signatures[
      "from_noise"]
  x_T, noise = chain.draw_noise([0, 1], tf.range(2), (16, 16, 1), 3)
  images = chain.run_chain(
      both[0].eps, card.read(os.path.join(run, run_dir_lib.SAMPLER)).coefficients, x_T)
  np.testing.assert_allclose(
      served(x_T=x_T, step_noise=noise)["images"],
      tf.clip_by_value(images, -1, 1), atol=0.15)


def test_formats_that_are_refused():
  with pytest.raises(UserError, match="float32, mixed_bfloat16.*'bf16'"):
    ddss_tf.load_denoiser(NAME, dtype_policy="bf16")
  with pytest.raises(UserError, match="functional Keras model.*Module"):
    precision.with_policy(tf.Module(), "mixed_bfloat16")


def upsampled(interpolation):
  x, t = keras.Input((4, 4, 1)), keras.Input(())
  small = keras.layers.AveragePooling2D(2)(x)
  large = keras.layers.Lambda(lambda v: tf.image.resize(
      v, [4, 4], interpolation))(small)
  return ddss_tf.Denoiser(
      keras.Model([x, t], large), ddss_tf.make_schedule("linear", 100))


def test_what_xla_cannot_compile_is_not_compiled(caplog):
  denoiser = upsampled("bicubic")
  eps = denoiser.compiled_eps(True)
  assert "not compiled by XLA: it has no kernel for ResizeBicubic" in (
      caplog.text)
  assert eps is denoiser.compiled_eps(False) is denoiser.compiled_eps(True)
  x = tf.random.stateless_normal([2, 4, 4, 1], [0, 1])
  with tf.GradientTape() as tape:
    tape.watch(x)
    out = eps(x, tf.zeros([2]))
  assert np.any(tape.gradient(out, x))


@pytest.mark.slow
def test_what_xla_compiles_is_compiled(both, caplog):
  assert compiling.obstacle(upsampled("bilinear")) is None
  assert compiling.obstacle(both[0]) is None
  gaussian = ddss_tf.gaussian_denoiser()
  # Asked in the middle of a graph, too.
  tf.function(lambda: gaussian.compiled_eps(True) and 0.0)()
  assert gaussian.compiled_eps(True) is not gaussian.compiled_eps(False)
  assert not caplog.records
