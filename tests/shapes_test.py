"""Images of any channels, height and width, through all that there is.

And networks of other outputs and number formats than most have.
"""

import functools
import importlib.util
import os
import subprocess

import checkpoint_files
import keras
import numpy as np
import pytest
import tensorflow as tf

import ddss_tf
from ddss_tf import storage
from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.exporting import diffusers_scheduler
from ddss_tf.features import network as network_lib
from ddss_tf.features import preprocessing
from ddss_tf.networks import unet
from ddss_tf.reporting import grids
from ddss_tf.reporting import sampler as sampler_figures
from ddss_tf.runs import records as records_lib
from ddss_tf.runs import run_dir as run_dir_lib
from ddss_tf.samplers import card
from ddss_tf.samplers import chain
from ddss_tf.samplers import generator as generator_lib
from ddss_tf.errors import UserError

TORCH = os.environ.get("DDSS_TORCH_PYTHON")
CHANNELS = (1, 2, 3, 4, 5, 8, 40)


def noise(*shape):
  return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


# --- Pictures ---


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("height,width", [(4, 4), (8, 12), (5, 3), (1, 6)])
def test_every_channel_is_in_a_grid(channels, height, width):
  images = noise(5, height, width, channels)
  grid = grids.image_grid(images, columns=3)
  if channels in (1, 3):
    assert grid.shape == (2 * height + 2, 3 * width + 4, channels)
    panels = [(0, images)]
  else:
    drawn = min(channels, 16)
    wide = drawn * (width + 1) - 1
    assert grid.shape == (2 * height + 2, 3 * wide + 4, 1)
    panels = [(i * (width + 1), images[..., i:i + 1]) for i in range(drawn)]
  for offset, channel in panels:
    for i, image in enumerate(channel):
      y, x = i // 3 * (height + 2), i % 3 * (grid.shape[1] + 2) // 3 + offset
      np.testing.assert_array_equal(
          grid[y:y + height, x:x + width], image)
  # Nothing else but the light gaps.
  shown = np.prod(images.shape[:-1]) * (
      channels if channels in (1, 3) else len(panels))
  assert np.sum(grid != 235) <= shown


@pytest.fixture
def shown(monkeypatch):
  """What imshow was given, in order."""
  found = []
  from matplotlib import axes  # pylint: disable=g-import-not-at-top
  imshow = axes.Axes.imshow
  monkeypatch.setattr(
      axes.Axes, "imshow", lambda self, image, *args, **kwargs: (
          found.append(np.asarray(image)), imshow(
              self, image, *args, **kwargs))[1])
  return found


@pytest.mark.parametrize("shape", [
    (4, 4, 2), (8, 12, 4), (24, 16, 5), (6, 1, 8), (1, 1, 1), (2, 9, 3)])
def test_every_picture_of_images(shape, shown, tmp_path):
  images = noise(9, *shape)
  states = images[:4] / np.float32(127.5) - 1
  grids.samples_png(str(tmp_path / "samples.png"), [
      ("a", images), ("b", images[::-1])], columns=3)
  grids.sample_rows_png(str(tmp_path / "rows.png"), "K", [
      ("DDIM linear", "1", images), ("GGDM", "2", images)])
  sampler_figures.path_png(str(tmp_path / "path.png"), states, states[::-1], states[0],
                   np.arange(4)[::-1], "GGDM")
  for name in ("samples", "rows", "path"):
    content = (tmp_path / f"{name}.png").read_bytes()
    pixels = tf.io.decode_png(content, channels=3)
    assert min(pixels.shape[:2]) > 40 and np.std(pixels) > 5
  # Grey or RGB: Matplotlib would take a fourth channel for transparency.
  assert all(image.ndim == 2 or image.shape[2] == 3 for image in shown)
  # Every pixel of every channel is in the samples.
  last = images[-1, ..., 0] if shape[2] != 3 else images[-1]
  height, width = shape[:2]
  grid = shown[0]
  assert any(np.array_equal(grid[y:y + height, x:x + width], last)
             for y in range(grid.shape[0] - height + 1)
             for x in range(grid.shape[1] - width + 1))


# --- A whole run ---


def parts_of(shape):
  """Denoiser, data set and features of Gaussian images of a shape."""
  keras.utils.set_random_seed(0)
  large = keras.initializers.RandomNormal(stddev=1.0, seed=0)
  inputs = keras.Input(shape)
  x = keras.layers.Conv2D(
      8, 2, activation="relu", kernel_initializer=large)(inputs)
  x = keras.layers.Dense(12, activation="relu", name="pool",
                         kernel_initializer=large)(keras.layers.Flatten()(x))
  images = 0.3 + 0.25 * np.random.default_rng(0).normal(size=(60, *shape))
  return dict(
      denoiser=ddss_tf.gaussian_denoiser(shape, mean=0.3, std=0.25),
      dataset=dataset_lib.as_dataset(images.clip(-1, 1).astype(np.float32)),
      features=network_lib.FeatureNetwork(keras.Model(
          inputs, keras.layers.Dense(3, name="logits")(x)), "random"))


SEARCH = dict(
    num_search_steps=2, batch_size=8, pool_samples=16, validation_samples=16,
    validate_every=2, checkpoint_every=2, log_every=1, jit_compile=False)
EXPORTS = ["tflite", "diffusers"] + (
    ["onnx"] if all(map(importlib.util.find_spec, ("tf2onnx", "onnxruntime")))
    else [])


@pytest.mark.slow
@pytest.mark.parametrize("shape", [
    (8, 12, 2), (24, 16, 5),
    *(pytest.param(shape, marks=pytest.mark.slow) for shape in (
        (4, 4, 4), (12, 8, 3), (3, 9, 1), (4, 6, 8), (2, 2, 40)))])
def test_a_run_of_images_of_a_shape(shape, tmp_path):
  run, parts = str(tmp_path), parts_of(shape)
  denoiser = parts["denoiser"]
  ddss_tf.search(run_dir=run, **parts, **SEARCH, sampler=functools.partial(
      ddss_tf.make_sampler, family="ggdm+pred+time", num_steps=2, init="ddpm"))
  records = ddss_tf.evaluate(
      run, **parts, heldout_features=parts["features"], num_samples=20,
      batch_size=10, jit_compile=False, baselines=[functools.partial(
          ddss_tf.make_sampler, family="ddim", num_steps=2)])
  assert all(record["fid"] > 0 and None not in (
      record["kid"], record["inception_score"]) for record in records)
  found = card.read(os.path.join(run, run_dir_lib.SAMPLER)).coefficients
  # The export is compared with the images in memory by itself; and here.
  served = tf.saved_model.load(ddss_tf.export(run, denoiser, also=EXPORTS))
  x_T, step_noise = chain.draw_noise(
      generator_lib.seed_pair(3), tf.range(3), shape, 2)
  expected = np.clip(
      chain.run_chain(denoiser.eps, found, x_T, step_noise), -1, 1)
  np.testing.assert_allclose(
      served.signatures["from_noise"](x_T=x_T, step_noise=step_noise)["images"],
      expected, atol=1e-4)
  with np.load(ddss_tf.sample(
      run, denoiser, num_images=5, jit_compile=False)) as file:
    assert file["images"].shape == (5, *shape)
    assert file["images"].dtype == np.uint8 and np.std(file["images"]) > 1
  images = {records_lib.sample_key(r): noise(8, *shape) for r in records}
  storage.save_arrays(
      os.path.join(run, run_dir_lib.SAMPLES_NPZ), images, compressed=True)
  with open(ddss_tf.report(run), encoding="utf-8") as f:
    page = f.read()
  for name in ("samples.png", "generated.png", "path.png", "before_after.png",
               "samples_k2.png", "fid_by_steps.png"):
    assert f"<code>{name}</code>" in page, name
  pictures = [summary.tag for event in _events(tmp_path / "tensorboard")
              for summary in event.summary.value]
  assert "samples" in pictures and "path" in pictures


def _events(folder):
  for root, _, names in os.walk(folder):
    for name in names:
      if "tfevents" in name:
        for record in tf.data.TFRecordDataset(os.path.join(root, name)):
          yield tf.compat.v1.Event.FromString(record.numpy())


# --- Sizes of networks ---


def unet_folder(folder, **changes):
  """A folder in diffusers' layout; its configuration changed."""
  return checkpoint_files.write_folder(str(folder), "diffusers_relu", **changes)


@pytest.mark.slow
@pytest.mark.parametrize("told,given,shape", [
    (8, None, (8, 8, 3)), ([8, 8], None, (8, 8, 3)),
    ([12, 8], None, (12, 8, 3)), ([8, 16], [8, 16], (8, 16, 3)),
    (None, (16, 12), (16, 12, 3)),
    pytest.param(None, 8, (8, 8, 3), marks=pytest.mark.slow),
    pytest.param(8, (8, 8), (8, 8, 3), marks=pytest.mark.slow)])
def test_sizes_of_diffusers_networks(told, given, shape, tmp_path):
  _, golden = unet_folder(tmp_path / "net", sample_size=told)
  denoiser = ddss_tf.load_denoiser(str(tmp_path / "net"), image_size=given)
  assert denoiser.image_shape == shape
  x = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
  predicted = denoiser.network(x, [3.0, 90.0]).numpy()
  assert predicted.shape == x.shape and np.all(np.isfinite(predicted))
  if shape == golden["x"].shape[1:]:
    np.testing.assert_allclose(
        denoiser.network(golden["x"], golden["t"]), golden["output"], atol=1e-4)
  # What is one size is one network, however it is told.
  denoiser.save(str(tmp_path / "own"))
  again = ddss_tf.load_denoiser(str(tmp_path / "own"))
  assert again.image_shape == shape and again.identity == denoiser.identity
  if shape[0] == shape[1]:
    unet_folder(tmp_path / "net", sample_size=8)
    assert ddss_tf.load_denoiser(
        str(tmp_path / "net")).sha256 == denoiser.sha256


@pytest.mark.parametrize("told,given,words", [
    (None, None, "sample_size is null.*image_size must be given"),
    (8, 16, "image_size must be 8, as sample_size"),
    ([8, 12], 8, "image_size must be .8, 12., as sample_size"),
    ("8", None, "sample_size must be a whole number, or height.*'8'"),
    (True, None, "sample_size must be"), (8.0, None, "sample_size must be"),
    ([8], None, "sample_size must be"), ([8, 8, 8], None, "sample_size must be"),
    ([8, None], None, "sample_size must be"), (0, None, "sample_size must be"),
    ([8, -8], None, "sample_size must be"), ({}, None, "sample_size must be"),
    (None, 0, "image_size must be a whole number, or .height, width."),
    (None, "8", "image_size must be a whole number"),
    (None, (8, 8, 3), "image_size must be a whole number"),
    (9, None, "image_size must be a multiple of 4"),
    ([8, 9], None, "image_size must be a multiple of 4"),
    (None, [7, 8], "image_size must be a multiple of 4")])
def test_sizes_that_are_refused(told, given, words, tmp_path):
  unet_folder(tmp_path, sample_size=told)
  with pytest.raises(UserError, match=words) as refused:
    ddss_tf.load_denoiser(str(tmp_path), image_size=given)
  assert "\n" not in str(refused.value)


@pytest.mark.parametrize("size", [(8, 16), (12, 4)])
def test_a_network_of_other_sides_is_the_same_function(size):
  """Of an image that repeats along a side, without edges: the same values."""
  config = dict(in_channels=2, out_channels=2, channels=(4, 8),
                blocks_per_level=1, norm_groups=2, symmetric_downsample=True)
  keras.utils.set_random_seed(0)
  wide = unet.build_unet(unet.UNetConfig(image_size=size, **config))
  tall = unet.build_unet(unet.UNetConfig(image_size=size[::-1], **config))
  assert wide.input_shape[0] == (None, *size, 2)
  # Kernels with height and width swapped make the same of swapped images.
  tall.set_weights([
      w.transpose(1, 0, 2, 3) if w.ndim == 4 else w for w in (
          np.random.default_rng(i).normal(size=w.shape).astype(np.float32) / 3
          for i, w in enumerate(wide.get_weights()))])
  wide.set_weights([
      np.random.default_rng(i).normal(size=w.shape).astype(np.float32) / 3
      for i, w in enumerate(wide.get_weights())])
  x = np.random.default_rng(0).normal(size=(2, *size, 2)).astype(np.float32)
  t = np.array([3.0, 500.0], np.float32)
  np.testing.assert_allclose(
      wide([x, t]), np.swapaxes(tall([np.swapaxes(x, 1, 2), t]), 1, 2),
      rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not TORCH, reason="DDSS_TORCH_PYTHON is not set")
@pytest.mark.parametrize("name", ["diffusers_relu", "diffusers_timestep"])
def test_a_network_of_other_sides_is_that_of_diffusers(name, tmp_path):
  weights, golden = checkpoint_files.write_folder(
      str(tmp_path), name, sample_size=[12, 8])
  del weights
  x = np.random.default_rng(0).normal(size=(2, 12, 8, 3)).astype(np.float32)
  labels = golden["labels"][:1].repeat(2) if "labels" in golden else None
  np.savez(tmp_path / "x.npz", x=x, **(
      {} if labels is None else {"labels": labels}))
  subprocess.run([TORCH, "-c", """
import diffusers, numpy, sys, torch
unet = diffusers.UNet2DModel.from_pretrained(sys.argv[1]).eval()
arrays = numpy.load(sys.argv[1] + "/x.npz")
x = torch.from_numpy(arrays["x"]).movedim(-1, 1)
labels = {"class_labels": torch.from_numpy(arrays["labels"]).long()} if (
    "labels" in arrays) else {}
with torch.no_grad():
  y = unet(x, torch.tensor([3, 90]), **labels).sample
numpy.save(sys.argv[1] + "/y.npy", y.movedim(1, -1).numpy())
""", str(tmp_path)], check=True)
  predicted = ddss_tf.load_denoiser(str(tmp_path)).network(
      x, [3.0, 90.0], labels)
  np.testing.assert_allclose(
      predicted, np.load(tmp_path / "y.npy")[..., :3], atol=1e-4)


# --- Learned variances ---


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_learned_variances_in_every_export(channels, tmp_path):
  shape = (4, 6, channels)
  exact = ddss_tf.gaussian_denoiser(shape, mean=0.3, std=0.25)
  x, t = keras.Input(shape), keras.Input(())
  eps = exact.model([x, t])
  model = keras.Model(
      [x, t], keras.layers.Concatenate()([eps, 9.0 * eps]))
  denoiser = ddss_tf.Denoiser(model, exact.schedule, name="learned")
  run = str(tmp_path)
  coefficients = ddss_tf.solver_coefficients(
      exact.schedule, "ddpm", 2, "linear").numpy()
  card.write(os.path.join(run, run_dir_lib.SAMPLER), card.SamplerCard(
      "DDPM", coefficients, denoiser.identity, {}))
  # Each but the scheduler, which is tested in PyTorch, is compared as it is
  # written with images of `denoiser.eps`; here are those of the network alone.
  path = ddss_tf.export(run, denoiser, also=EXPORTS)
  x_T, step_noise = chain.draw_noise(
      generator_lib.seed_pair(1), tf.range(3), shape, 2)
  np.testing.assert_allclose(
      tf.saved_model.load(path).signatures["from_noise"](
          x_T=x_T, step_noise=step_noise)["images"],
      np.clip(chain.run_chain(exact.eps, coefficients, x_T, step_noise), -1, 1),
      atol=1e-4)
  for name in ("sampler.tflite", diffusers_scheduler.MODULE):
    folder = "diffusers_scheduler" if name.endswith(".py") else ""
    assert os.path.exists(os.path.join(run, folder, name))


# --- Number formats ---


def network(dtype, inputs=None):
  """A small Keras network of the step as a number, in a format."""
  keras.utils.set_random_seed(0)
  x = keras.Input((6, 4, 2), dtype=inputs)
  t = keras.Input((), dtype=inputs)
  h = keras.layers.Conv2D(4, 3, padding="same", dtype=dtype)(x)
  time = keras.layers.Rescaling(1e-3, dtype=dtype)(keras.layers.Reshape(
      (1, 1, 1), dtype=dtype)(t))
  h = keras.layers.Activation("silu", dtype=dtype)(
      keras.layers.Multiply(dtype=dtype)([h, time]))
  return keras.Model(
      [x, t], keras.layers.Conv2D(2, 3, padding="same", dtype=dtype)(h))


TOLD = {"prediction": "eps", "schedule": {"name": "linear",
                                          "num_train_steps": 1000}}
FORMATS = ["float16", "mixed_float16", "bfloat16", "mixed_bfloat16"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype,inputs", [
    *(pytest.param(dtype, None, marks=() if "mixed" in dtype else
                   pytest.mark.slow) for dtype in FORMATS),
    ("float32", "float16")])
def test_a_network_in_half_precision(dtype, inputs, tmp_path, caplog):
  path = str(tmp_path / "net.keras")
  network(dtype, inputs).save(path)
  denoiser = ddss_tf.load_denoiser(path, **TOLD)
  x = np.random.default_rng(0).normal(size=(3, 6, 4, 2)).astype(np.float32)
  t = np.array([1.0, 300.0, 900.0], np.float32)
  exact = network("float32")
  exact.set_weights([np.float32(w) for w in denoiser.model.get_weights()])
  found = denoiser.eps(x, t)
  assert found.dtype == tf.float32
  np.testing.assert_allclose(found, exact([x, t]), atol=0.02)
  run = str(tmp_path / "run")
  sampler = ddss_tf.search(
      run_dir=run, **{**parts_of((6, 4, 2)), "denoiser": denoiser}, **SEARCH,
      sampler=functools.partial(ddss_tf.make_sampler, family="ggdm+pred",
                                num_steps=2, init="ddim"))
  coefficients = sampler.coefficients()
  assert {v.dtype for v in coefficients.arrays().values()} == {tf.float32}
  # Alone in its search it is told of; its name says what it computes in.
  warned = "float16, whose gradients" in caplog.text
  half = dtype.endswith("float16") and "bfloat16" not in dtype
  assert warned == half
  assert denoiser.identity.get("dtype_policy") == (
      None if dtype == "float32" else
      "mixed_float16" if half else "mixed_bfloat16")
  served = tf.saved_model.load(ddss_tf.export(run, denoiser))
  images = served.signatures["serving_default"](
      seed=tf.constant([1, 0]), batch_size=tf.constant(3))["images"]
  assert images.shape == (3, 6, 4, 2) and images.dtype == tf.uint8


def test_formats_that_weights_do_not_allow(tmp_path):
  for dtype, other in (("mixed_float16", "float32"),
                       ("mixed_float16", "mixed_bfloat16")):
    path = str(tmp_path / f"{dtype}.keras")
    network(dtype).save(path)
    denoiser = ddss_tf.load_denoiser(path, **TOLD, dtype_policy=other)
    assert denoiser.dtype_policy == other
  for dtype in ("float16", "bfloat16"):
    path = str(tmp_path / f"{dtype}.keras")
    network(dtype).save(path)
    with pytest.raises(UserError, match=f"not float32.*weights in {dtype}"):
      ddss_tf.load_denoiser(path, **TOLD, dtype_policy="float32")


@pytest.mark.parametrize("dtype", [tf.float16, tf.float32])
def test_a_saved_model_in_half_precision(dtype, tmp_path):
  module = tf.Module()
  module.scale = tf.Variable(0.5, dtype=tf.float16)

  @tf.function(input_signature=[tf.TensorSpec((None, 6, 4, 2), dtype, "x"),
                                tf.TensorSpec((None,), dtype, "t")])
  def call(x, t):
    time = tf.cast(t, tf.float16)[:, None, None, None] / 1000
    return tf.cast(x, tf.float16) * time * module.scale

  module.call = call
  path = str(tmp_path / "saved")
  tf.saved_model.save(module, path, signatures=call.get_concrete_function())
  denoiser = ddss_tf.load_denoiser(path, **TOLD)
  x = np.random.default_rng(0).normal(size=(2, 6, 4, 2)).astype(np.float32)
  found = denoiser.eps(x, [200.0, 800.0])
  assert found.dtype == tf.float32
  np.testing.assert_allclose(
      found, x * np.reshape([0.1, 0.4], (2, 1, 1, 1)), atol=2e-3)


# --- Feature networks ---


@pytest.mark.parametrize("value_range", sorted(preprocessing.VALUE_RANGES))
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_ranges_of_colours_are_of_three_channels(value_range, channels):
  inputs = keras.Input((4, 4, channels))
  pool = keras.layers.Flatten(name="pool")(inputs)
  model = keras.Model(inputs, keras.layers.Dense(3, name="logits")(pool))
  make = functools.partial(
      network_lib.FeatureNetwork, model,
      preprocessing=preprocessing.Preprocessing(value_range=value_range))
  if value_range in ("caffe", "torch") and channels != 3:
    with pytest.raises(UserError, match=f"3 channels. Received: one of "
                                        f"{channels}"):
      make()
    return
  found = make()(np.zeros((2, 4, 4, channels)))
  assert found["pool"].shape == (2, 16 * channels)


def test_a_network_of_any_channels_takes_those_that_it_can():
  inputs = keras.Input((4, 4, None))
  pool = keras.layers.Lambda(
      lambda x: tf.reduce_mean(x, axis=3), output_shape=(4, 4))(inputs)
  pool = keras.layers.Flatten(name="pool")(pool)
  model = keras.Model(inputs, keras.layers.Dense(3, name="logits")(pool))
  found = network_lib.FeatureNetwork(
      model, preprocessing=preprocessing.Preprocessing(value_range="torch"))
  assert [c for c in range(1, 6) if found.accepts((4, 4, c))] == [3]
  with pytest.raises(UserError, match="must have the shape"):
    found(np.zeros((2, 4, 4, 2)))
