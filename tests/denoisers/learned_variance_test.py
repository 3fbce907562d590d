"""Tests of DDPM with the variance that a network predicts."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import checkpoint_files
import ddss_tf
from ddss_tf.formats import openai as openai_lib
from ddss_tf.samplers import card
from ddss_tf.samplers import generator as generator_lib
from ddss_tf.samplers import sampler as sampler_lib
from ddss_tf.errors import UserError

fake_torch = checkpoint_files.fake_torch  # A fixture.
SHAPE = (4, 4, 2)


def network(variance, predicts=True):
  """Any prediction, and the same variance for every pixel, or two halves."""
  x, t = keras.Input(SHAPE), keras.Input(())
  h = keras.layers.Rescaling(0.3, 0.05)(x)
  if not predicts:
    return keras.Model([x, t], h)
  rows = np.broadcast_to(variance, SHAPE).astype(np.float32)
  told = keras.layers.Lambda(lambda x: 0.0 * x + rows)(x)
  return keras.Model([x, t], keras.layers.Concatenate()([h, told]))


def images(denoiser, sampler, **options):
  return generator_lib.Generator(denoiser, 4, **options).images(
      sampler.coefficients(), 4, seed=7)


@pytest.mark.slow
@pytest.mark.parametrize("steps,prediction", [
    (8, "eps"), (8, "x0"), (8, "v"), (101, "eps")])
def test_the_ends_of_the_range_are_the_fixed_variances(steps, prediction):
  """A chain in one graph, and one of more than 100 steps, step by step."""
  schedule = ddss_tf.make_schedule("linear", steps)
  learned, small, large = (
      sampler_lib.full_chain(schedule, variance)
      for variance in ("learned", "posterior", "fixed_large"))
  assert learned.label == "DDPM (full chain, learned variance)"
  for told, fixed in ((-1.0, small), (1.0, large)):
    denoiser = ddss_tf.Denoiser(network(told), schedule, prediction)
    expected = images(denoiser, fixed, jit_compile=False)
    found = images(denoiser, learned, jit_compile=False)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
  assert np.max(np.abs(images(denoiser, small, jit_compile=False)
                       - expected)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("jit_compile", [False, True])
def test_each_pixel_has_its_own_variance(jit_compile):
  """The left half between both, the right half beyond the larger one."""
  schedule = ddss_tf.make_schedule("cosine", 20)
  told = np.zeros(SHAPE)
  told[:, 2:] = 1.5
  denoiser = ddss_tf.Denoiser(network(told), schedule)
  learned = sampler_lib.full_chain(schedule, "learned")
  found = images(denoiser, learned, jit_compile=jit_compile)
  coefficients = learned.coefficients().numpy()
  small, large = (
      sampler_lib.full_chain(schedule, variance).coefficients().numpy()
      .noise_scales for variance in ("posterior", "fixed_large"))
  np.testing.assert_allclose(
      coefficients.noise_scales * coefficients.noise_ratios, large, rtol=1e-6)
  # log sigma is linear in the prediction (Nichol and Dhariwal 2021, eq. 15).
  for half, v in ((np.s_[:, :, :2], 0.5), (np.s_[:, :, 2:], 1.25)):
    scales = np.append(small[:-1] ** (1 - v) * large[:-1] ** v, 0.0)
    fixed = sampler_lib.FixedSampler(
        schedule, coefficients._replace(
            noise_scales=scales, noise_ratios=None), "fixed")
    # The network acts on every pixel alone.
    np.testing.assert_allclose(
        found[half], images(denoiser, fixed, jit_compile=False)[half],
        rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_checkpoint_keeps_it_when_asked_to(fake_torch, tmp_path):
  weights, golden = checkpoint_files.read_fixture("openai_learned_sigma")
  told = json.loads(str(golden["card"]))
  fake_torch.state = {name: checkpoint_files.FakeTensor(value)
                      for name, value in weights.items()}
  path = tmp_path / "model.pt"
  path.write_text("PyTorch reads this, not we")
  (tmp_path / "model.pt.json").write_text(json.dumps(told))
  load = lambda **given: ddss_tf.load_denoiser(
      str(path), cache_dir=str(tmp_path / "cache"), **given)
  plain, kept = load(), load(learned_variance=True)
  assert plain.sha256 != kept.sha256
  assert load(learned_variance=False).sha256 == plain.sha256
  kept.save(str(tmp_path / "own"))
  for denoiser in (kept, ddss_tf.load_denoiser(str(tmp_path / "own"))):
    eps, exponent = denoiser.output_and_variance(golden["x"], golden["t"])
    np.testing.assert_allclose(eps, golden["output"][..., :3], atol=1e-4)
    np.testing.assert_allclose(
        2 * exponent - 1, golden["output"][..., 3:], atol=2e-4)
    np.testing.assert_allclose(
        denoiser.eps(golden["x"], golden["t"]),
        plain.eps(golden["x"], golden["t"]), atol=1e-5)
  with pytest.raises(UserError, match="learned_variance = True, where there is"):
    plain.check_variance()
  kept.check_variance()
  weights, golden = checkpoint_files.read_fixture("openai_plain")
  with pytest.raises(UserError, match="must not be given.* none. Received: 3"):
    openai_lib.convert("here", weights, json.loads(str(golden["card"])), True)


def test_what_cannot_have_it_is_refused(gaussian_parts, tmp_path):
  schedule = ddss_tf.make_schedule("linear", 20)
  plain = ddss_tf.Denoiser(network(0.0, predicts=False), schedule)
  learned = sampler_lib.full_chain(schedule, "learned")
  with pytest.raises(UserError, match="must predict a variance"):
    images(plain, learned, jit_compile=False)
  with pytest.raises(UserError, match="must predict a variance"):
    ddss_tf.compare(
        str(tmp_path / "compared"), **gaussian_parts, solvers=(), families=(),
        cards=(), num_steps=(), full_chain=["learned"], full_chain_steps=5,
        num_samples=8)
  with pytest.raises(UserError, match="without a learned variance"):
    card.write(str(tmp_path / "card.json"), card.SamplerCard(
        learned.label, learned.coefficients().numpy(), plain.identity, {}, None))
  assert not (tmp_path / "card.json").exists()
  values = learned.coefficients().to_dict()
  with pytest.raises(ValueError, match="may be .*guidance_scales"):
    ddss_tf.Coefficients.from_dict(values)


def test_it_has_no_gradient_to_lose():
  """A chain with it is differentiable in the ratios as well."""
  schedule = ddss_tf.make_schedule("linear", 5)
  denoiser = ddss_tf.Denoiser(network(0.4), schedule)
  start = sampler_lib.full_chain(schedule, "learned").coefficients()
  x_T, noise = ddss_tf.draw_noise(
      tf.constant([0, 1]), tf.range(3), SHAPE, 5)

  def total(ratios):
    return tf.reduce_sum(ddss_tf.run_chain(
        denoiser.output_and_variance, start._replace(noise_ratios=ratios),
        x_T, noise) ** 2)

  with tf.GradientTape() as tape:
    tape.watch(start.noise_ratios)
    value = total(start.noise_ratios)
  slope = tape.gradient(value, start.noise_ratios).numpy()
  step = np.zeros(5, np.float32)
  step[1] = 1e-2
  difference = (total(start.noise_ratios + step)
                - total(start.noise_ratios - step)) / 2e-2
  np.testing.assert_allclose(slope[1], difference, rtol=2e-2)
  assert slope[1] != 0
