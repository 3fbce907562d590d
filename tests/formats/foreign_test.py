"""Tests of denoisers in SavedModels and Keras files.

All of them hold the exact network of Gaussian images, whose eps is known.
"""

import json
import os
import re

from checkpoint_files import refusal
import keras
import numpy as np
import pytest
import tensorflow as tf

import ddss_tf
from ddss_tf.exporting import export as export_lib
from ddss_tf.features import network as network_lib
from ddss_tf.reporting import inspection
from ddss_tf.samplers import chain
from ddss_tf.samplers import families
from ddss_tf.errors import UserError
from foreign_models import SHAPE, small_network, write  # pylint: disable=unused-import

SCHEDULE = {"name": "linear", "num_train_steps": 1000}
TOLD = {"prediction": "eps", "schedule": SCHEDULE}
TIMES = [0.0, 100.5, 400.0, 999.0]


@pytest.fixture(scope="module")
def exact():
  return ddss_tf.gaussian_denoiser(SHAPE, mean=0.3, std=0.25)


def states():
  return (tf.random.stateless_normal([4, *SHAPE], [0, 1]),
          tf.constant(TIMES))


def images_of(denoiser):
  sampler = ddss_tf.make_sampler(denoiser.schedule, "ddim", 4)
  x_T, noise = chain.draw_noise([0, 1], tf.range(3), denoiser.image_shape, 4)
  return chain.run_chain(denoiser.eps, sampler.coefficients(), x_T, noise)


def refused(path, *words, **keywords):
  message = refusal(ddss_tf.load_denoiser, path, **keywords)
  for word in words:
    assert word in message, message


# --- SavedModels ---


@pytest.mark.quick("True-names0")
@pytest.mark.parametrize("as_call,names", [
    (True, ("x", "t")), (False, ("x", "t")), (False, ("noisy", "clock"))])
def test_saved_model_is_the_network(exact, tmp_path, as_call, names):
  folder = write(tmp_path / "net", exact.eps, names=names, as_call=as_call)
  denoiser = ddss_tf.load_denoiser(folder, **TOLD)
  assert denoiser.image_shape == SHAPE
  assert denoiser.name == "net"
  assert denoiser.continuous_time
  x, t = states()
  np.testing.assert_allclose(
      denoiser.eps(x, t), exact.eps(x, t), atol=1e-6)
  np.testing.assert_allclose(
      images_of(denoiser), images_of(exact), atol=1e-5)
  with tf.GradientTape() as tape:
    tape.watch([x, t])
    eps = denoiser.compiled_eps()(x, t)
  with tf.GradientTape() as other:
    other.watch([x, t])
    expected = exact.eps(x, t)
  for gradient, wanted in zip(tape.gradient(eps, [x, t]),
                              other.gradient(expected, [x, t])):
    np.testing.assert_allclose(gradient, wanted, atol=1e-5)
  assert not any(v.trainable for v in tape.watched_variables())
  # The hash is of the files: another gain is another denoiser.
  assert len(denoiser.sha256) == 64
  assert denoiser.model.count_params() >= 1


def test_keras_export_is_the_network(exact, tmp_path):
  folder = str(tmp_path / "exported")
  exact.model.export(folder, verbose=False)
  denoiser = ddss_tf.load_denoiser(folder, **TOLD)
  x, t = states()
  np.testing.assert_allclose(
      denoiser.eps(x, t), exact.eps(x, t), atol=1e-6)


def test_card_beside_a_saved_model(exact, tmp_path):
  v = lambda x, t: exact.network(x, t) * 0.5
  folder = write(tmp_path / "net", v, shape=(None, None, None, 1))
  refused(folder, "image_shape must be given", "[?, ?, 1]", **TOLD)
  card = {"prediction": "score", "image_shape": [4, 4, 1],
          "schedule": {"name": "cosine", "num_train_steps": 50}}
  with open(folder + ".json", "w") as f:
    json.dump(card, f)
  denoiser = ddss_tf.load_denoiser(folder + "/")
  assert (denoiser.prediction, denoiser.image_shape) == ("score", SHAPE)
  assert denoiser.schedule.num_train_steps == 50
  # Arguments count more; a run of the one is not a run of the other.
  other = ddss_tf.load_denoiser(folder, prediction="v")
  assert other.prediction == "v" and other.sha256 != denoiser.sha256
  assert other.sha256 == ddss_tf.load_denoiser(
      folder, prediction="v").sha256
  refused(folder, "image_shape must be [?, ?, 1]", "[4, 4, 3]",
          image_shape=(4, 4, 3))
  with open(folder + ".json", "w") as f:
    json.dump(card | {"beta": 1}, f)
  refused(folder, "keys must be among", "beta")


@pytest.mark.slow
def test_rounded_times(exact, tmp_path, gaussian_parts):
  folder = write(
      tmp_path / "net", lambda x, t: exact.network(
          x, tf.cast(t[:, 0], tf.float32)), time=((None, 1), tf.int64))
  denoiser = ddss_tf.load_denoiser(folder, **TOLD)
  x, _ = states()
  np.testing.assert_allclose(
      denoiser.eps(x, tf.constant([0.4, 99.6, 400.0, 999.0])),
      exact.eps(x, tf.constant([0.0, 100.0, 400.0, 999.0])), atol=1e-6)
  assert not denoiser.continuous_time
  np.testing.assert_allclose(
      images_of(denoiser), images_of(exact), atol=1e-5)
  # Weights are searched, times are not.
  with pytest.raises(UserError, match="GGDM.TIME.*whole steps"):
    denoiser.check_times("GGDM+TIME")
  arguments = dict(
      denoiser=denoiser, dataset=gaussian_parts["dataset"],
      features=gaussian_parts["features"], num_search_steps=1, batch_size=8,
      pool_samples=8, validation_samples=8, jit_compile=False)
  with pytest.raises(UserError, match="net.*whole steps.*without \\+time"):
    ddss_tf.search(run_dir=str(tmp_path / "run"), sampler=lambda s: (
        families.make_sampler(s, "ggdm+time", num_steps=2)), **arguments)
  sampler = ddss_tf.search(run_dir=str(tmp_path / "run2"), sampler=lambda s: (
      families.make_sampler(s, "ggdm", num_steps=2)), **arguments)
  assert np.all(np.isfinite(sampler.coefficients().numpy().state_weights))


def test_times_without_gradient_are_not_learned(exact, tmp_path):
  folder = write(tmp_path / "net", lambda x, t: exact.network(
      x, tf.cast(tf.cast(t, tf.int32), tf.float32)))
  assert not ddss_tf.load_denoiser(folder, **TOLD).continuous_time


def test_learned_variance_is_left_out(exact, tmp_path):
  folder = write(tmp_path / "net", lambda x, t: tf.concat(
      [exact.network(x, t), tf.fill(tf.shape(x), 7.0)], -1))
  denoiser = ddss_tf.load_denoiser(folder, **TOLD)
  x, t = states()
  np.testing.assert_allclose(
      denoiser.eps(x, t), exact.eps(x, t), atol=1e-6)


@pytest.mark.parametrize("network,words", [
    (lambda x, t: tf.stop_gradient(x), ["gradient", "images"]),
    (lambda x, t: x * 0.0, ["gradient", "images"]),
    (lambda x, t: x / tf.where(t > 400.0, 0.0, 1.0)[:, None, None, None],
     ["finite", "666", "999"]),
    (lambda x, t: x[:, :2], ["[?, 4, 4, 1]", "2 channels", "[2, 2, 4, 1]"]),
    (lambda x, t: tf.concat([x, x, x], -1), ["[2, 4, 4, 3]"]),
    (lambda x, t: x + tf.reshape(t, [1, 1, 1, 1]), ["must take images", "[2]"]),
])
def test_networks_that_are_refused(tmp_path, network, words):
  refused(write(tmp_path / "net", network), *words, **TOLD)


@pytest.mark.parametrize("options", [
    dict(shape=(1, *SHAPE)), dict(time=((), tf.float32)),
    dict(time=((None, 2), tf.float32)), dict(shape=(None, 4, 4)),
])
def test_inputs_that_are_refused(tmp_path, options):
  folder = write(tmp_path / "net", lambda x, t: x, **options)
  refused(folder, "must be callable", "a time for each", "TensorSpec", **TOLD)


def test_signatures(exact, tmp_path):
  module = tf.Module()
  specs = dict(x=tf.TensorSpec((None, *SHAPE)), t=tf.TensorSpec((None,)))
  network = lambda gain: tf.function(
      lambda x, t: {"out": gain * exact.network(x, t)}
      ).get_concrete_function(**specs)
  folder = str(tmp_path / "net")
  tf.saved_model.save(module, folder, signatures={
      "average": network(1.0), "raw": network(2.0)})
  x, t = states()
  for name, gain in (("average", 1), ("raw", 2)):
    denoiser = ddss_tf.load_denoiser(folder, signature=name, **TOLD)
    np.testing.assert_allclose(
        denoiser.eps(x, t), gain * exact.eps(x, t), atol=1e-5)
  refused(folder, "average, raw", "'ema'", signature="ema", **TOLD)
  refused(folder, "name one of the signatures average, raw", **TOLD)


@pytest.mark.parametrize("told,words", [
    ({}, ["prediction, schedule must be given"]),
    (dict(TOLD, prediction="mean"), ["'mean'", "score"]),
    (dict(TOLD, schedule="linear"), ["make_schedule", "'linear'"]),
    (dict(TOLD, schedule={"name": "sigmoid"}), ["schedule", "'sigmoid'"]),
    (dict(TOLD, schedule={"nam": "linear"}), ["schedule", "nam"]),
    (dict(TOLD, image_shape=(4, 4)), ["image_shape", "(4, 4)"]),
    (dict(TOLD, num_heads=2), ["num_heads must not be given"]),
    (dict(TOLD, time_scale="a"), ["time_scale", "'a'"]),
])
def test_arguments_that_are_refused(exact, tmp_path, told, words):
  refused(write(tmp_path / "net", exact.eps), *words, **told)


def test_arguments_of_other_formats_are_refused():
  refused("nowhere", "path must be a folder", **TOLD)
  refused("digits16-ddpm", "prediction must not be given", prediction="eps")


def test_damaged_saved_model(exact, tmp_path):
  folder = write(tmp_path / "net", exact.eps)
  with open(os.path.join(folder, "saved_model.pb"), "r+b") as f:
    f.truncate(100)
  refused(folder, "not a complete SavedModel", **TOLD)
  os.remove(os.path.join(folder, "saved_model.pb"))
  refused(folder, "without saved_model.pb", **TOLD)


def test_a_saved_model_is_exported_with_its_sampler(exact, tmp_path):
  denoiser = ddss_tf.load_denoiser(
      write(tmp_path / "net", exact.eps), **TOLD)
  coefficients = ddss_tf.make_sampler(
      denoiser.schedule, "ddim", 4).coefficients().numpy()
  module = export_lib.SamplerModule(denoiser, coefficients)
  path = str(tmp_path / "export")
  tf.saved_model.save(module, path, signatures={
      "from_noise": module.endpoints["from_noise"]})
  x_T, noise = chain.draw_noise([0, 1], tf.range(3), SHAPE, 4)
  images = tf.saved_model.load(path).signatures["from_noise"](
      x_T=x_T, step_noise=noise)["images"]
  np.testing.assert_allclose(
      images, tf.clip_by_value(images_of(exact), -1, 1), atol=1e-5)
  with pytest.raises(UserError, match="SavedModel: copy its folder"):
    denoiser.save(str(tmp_path / "own"))


# --- Keras models ---


def other_way_round(exact, dtype="int32"):
  """The exact network from [times [B, 1], images]."""
  t = keras.Input((1,), dtype=dtype, name="when")
  x = keras.Input(SHAPE, name="image")
  flat = keras.layers.Reshape(())(keras.layers.Rescaling(1.0)(t))
  return keras.Model([t, x], exact.model([x, flat]))


def test_keras_file(exact, tmp_path):
  path = str(tmp_path / "model.keras")
  exact.model.save(path)
  denoiser = ddss_tf.load_denoiser(path, **TOLD)
  assert denoiser.name == "model"
  x, t = states()
  np.testing.assert_allclose(
      denoiser.eps(x, t), exact.eps(x, t), atol=1e-6)
  with open(path + ".json", "w") as f:
    json.dump(TOLD, f)
  assert ddss_tf.load_denoiser(path).continuous_time
  refused(path, "signature", "serve", signature="serve")
  with open(path, "r+b") as f:
    f.truncate(os.path.getsize(path) // 2)
  refused(path, "not a complete and safe Keras file")
  refused(str(tmp_path / "none.keras"), ".keras")


@pytest.mark.slow
def test_layers_are_part_of_what_a_keras_file_is(tmp_path):
  hashes = []
  weights = small_network().get_weights()
  for activation in ("silu", "relu", "silu"):
    model = small_network(activation)
    model.set_weights(weights)
    # Compiling is for training.
    model.compile("adam" if len(hashes) == 2 else "sgd", "mse")
    path = str(tmp_path / f"{len(hashes)}.keras")
    model.save(path)
    hashes.append(ddss_tf.load_denoiser(path, **TOLD).sha256)
  assert hashes[0] == hashes[2] != hashes[1]


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_keras_models_of_other_inputs(exact, tmp_path, dtype):
  x, _ = states()
  t = tf.constant([0.4, 99.6, 400.0, 999.0])
  seen = tf.round(t) if dtype == "int32" else t
  path = str(tmp_path / "model.keras")
  model = other_way_round(exact, dtype)
  model.save(path)
  for denoiser in (ddss_tf.Denoiser(model, exact.schedule),
                   ddss_tf.load_denoiser(path, **TOLD)):
    assert denoiser.image_shape == SHAPE
    assert denoiser.continuous_time == (dtype == "float32")
    np.testing.assert_allclose(
        denoiser.eps(x, t), exact.eps(x, seen), atol=1e-6)
  # Our own format keeps it.
  denoiser.save(str(tmp_path / "own"))
  again = ddss_tf.load_denoiser(str(tmp_path / "own"))
  assert again.continuous_time == denoiser.continuous_time
  np.testing.assert_array_equal(again.eps(x, t), denoiser.eps(x, t))


def test_keras_models_that_are_refused(exact, tmp_path):
  x = keras.Input(SHAPE)
  path = str(tmp_path / "model.keras")
  keras.Model(x, keras.layers.Rescaling(2.0)(x)).save(path)
  refused(path, "two inputs", "[?, 4, 4, 1]", **TOLD)
  with pytest.raises(ValueError, match="two inputs"):
    ddss_tf.Denoiser(keras.Model(x, x), exact.schedule)
  anywhere, t = keras.Input((None, None, 1)), keras.Input(())
  open_model = keras.Model([anywhere, t], keras.layers.Rescaling(2.0)(anywhere))
  with pytest.raises(ValueError, match="image_shape must be given"):
    ddss_tf.Denoiser(open_model, exact.schedule)
  with pytest.raises(ValueError, match=r"must be \[\?, \?, 1\].*4, 4, 3"):
    ddss_tf.Denoiser(open_model, exact.schedule, image_shape=(4, 4, 3))
  open_model.save(path)
  refused(path, "image_shape must be given", **TOLD)
  keras.Model([x, t], keras.layers.Conv2D(3, 1)(x)).save(path)
  refused(path, "[?, 4, 4, 1], or 2 channels", "[2, 4, 4, 3]", **TOLD)


def test_subclassed_model(exact):
  class Network(keras.Model):
    def call(self, inputs, training=False):
      return exact.model(inputs)

  denoiser = ddss_tf.Denoiser(Network(), exact.schedule, image_shape=SHAPE)
  x, t = states()
  np.testing.assert_allclose(
      denoiser.eps(x, t), exact.eps(x, t), atol=1e-6)


# --- Mode inspect ---


@pytest.mark.slow
def test_inspecting_a_saved_model(tmp_path):
  schedule = {"name": "linear", "num_train_steps": 100}
  model = small_network()
  plain = ddss_tf.Denoiser(model, ddss_tf.make_schedule(**schedule))
  folder = str(tmp_path / "net")
  model.export(folder, verbose=False)
  denoiser = ddss_tf.load_denoiser(
      folder, prediction="v", schedule=schedule, time_scale=0.01)
  text = inspection.inspect(denoiser=denoiser)
  for words in ("prediction   v\n", "8 x 8 x 1",
                f"{model.count_params():,} in 8", denoiser.sha256,
                "1 SavedModelNetwork", "time_scale = 0.01",
                "may be learned", "T = 100, beta from 0.0001 to 0.02"):
    assert words in text, text
  assert "not told: see the layers" in text and "feature network is not" in text
  # Features in the open, and as a SavedModel: a convolution for each pixel.
  images = keras.Input((8, 8, 1))
  pool = keras.layers.Flatten(name="pool")(
      keras.layers.Conv2D(4, 3, padding="same")(images))
  logits = keras.layers.Dense(2, name="logits")(pool)
  network = network_lib.FeatureNetwork(keras.Model(images, logits))
  counted = inspection.feature_bytes(network, (8, 8, 1))
  # The image clipped, the convolution and its bias.
  assert 2 * 4 * 8 * 8 * 4 <= counted < 3 * 4 * 8 * 8 * 4
  before, after = (
      float(re.search("about (.*) GiB", inspection.inspect(
          denoiser=denoiser, features=features,
          micro_batch_size=2**20)).group(1)) for features in (
              None, [network] * 50))
  state = 2**20 * 2 * 10 * 8 * 8 * 4 / 2**30
  np.testing.assert_allclose(
      after, 0.7 + state + 2**20 * 50 * counted / 2**30, atol=0.01)
  assert before < after
  # As much as of the same network in the open, but for what is not kept.
  ratio = inspection.activation_bytes(denoiser) / inspection.activation_bytes(
      plain)
  assert 0.5 < ratio < 1.2


def test_inspecting_rounded_times():
  exact = ddss_tf.gaussian_denoiser((4, 4, 1))
  x, t = keras.Input((4, 4, 1)), keras.Input((), dtype="int32")
  scaled = keras.layers.Rescaling(1.0)(t)
  denoiser = ddss_tf.Denoiser(
      keras.Model([x, t], exact.model([x, scaled])), exact.schedule, "score")
  text = inspection.inspect(denoiser=denoiser)
  assert "prediction   score" in text
  assert "whole steps" in text and "no +time" in text


# --- Class labels ---

CLASSES = 3
WITH_LABELS = dict(TOLD, num_classes=CLASSES)
LABELS = [2, 0, 1, 2]


def of_labels(x, t, label):
  """A prediction that tells times and labels apart, in floats [B]."""
  pixel = lambda v: tf.reshape(tf.cast(v, tf.float32), [-1, 1, 1, 1])
  return x * (1.0 + pixel(label)) + 0.001 * pixel(t)


@pytest.mark.slow
def test_labels_of_a_saved_model(tmp_path):
  """Found by dtype, by name, or by being one-hot; all give the same images."""
  ways = [
      [("a", 4, tf.float32), ("b", 1, tf.float32), ("c", 1, tf.int64)],
      [("c", 1, tf.int32), ("b", 1, tf.float32), ("a", 4, tf.float32)],
      [("class_id", 1, tf.int32), ("noisy", 4, tf.float32), ("t", 1, tf.int32)],
      [("x", 4, tf.float32), ("t", 1, tf.int32), ("z", 1, tf.int32)],
      [("y", 2, tf.float32), ("x", 4, tf.float32), ("t", 1, tf.int32)],
  ]
  labels_of = ["c", "c", "class_id", "z", "y"]
  x, t = states()
  t = tf.round(t)
  wanted = of_labels(x, t, LABELS)
  for number, (way, named) in enumerate(zip(ways, labels_of)):
    shapes = {4: (None, *SHAPE), 1: (None,), 2: (None, CLASSES)}
    specs = [tf.TensorSpec(shapes[rank], dtype, name)
             for name, rank, dtype in way]

    def network(*inputs, way=way, named=named):
      by_name = {name: value for (name, *_), value in zip(way, inputs)}
      label = by_name.pop(named)
      if label.shape.rank == 2:
        label = tf.argmax(label, 1)
      [image] = [v for v in by_name.values() if v.shape.rank == 4]
      [time] = [v for v in by_name.values() if v.shape.rank == 1]
      return of_labels(image, time, label)

    module = tf.Module()
    module.__call__ = tf.function(network, input_signature=specs)
    folder = str(tmp_path / str(number))
    tf.saved_model.save(module, folder, signatures={
        "serving_default": tf.function(
            lambda network=network, way=way, **k: {
                "eps": network(*(k[name] for name, *_ in way))}
            ).get_concrete_function(**{s.name: s for s in specs})})
    denoiser = ddss_tf.load_denoiser(folder, **WITH_LABELS)
    assert denoiser.num_classes == CLASSES
    np.testing.assert_allclose(
        denoiser.network(x, t, LABELS), wanted, rtol=1e-6)
  assert "classes      3" in inspection.inspect(denoiser=denoiser)
  refused(folder, "with two inputs", **TOLD)
  other = ddss_tf.load_denoiser(folder, **dict(WITH_LABELS, null_label=1))
  assert other.sha256 == denoiser.sha256
  guided = ddss_tf.load_denoiser(
      folder, **dict(WITH_LABELS, null_label=1, guidance_scale=3.0))
  free = of_labels(x, t, [1] * 4)
  np.testing.assert_allclose(
      guided.eps(x, t, LABELS), free + 3.0 * (wanted - free), rtol=1e-5)
  # Told by the card, too; another number of classes is another denoiser.
  with open(folder + ".json", "w") as f:
    json.dump(WITH_LABELS | {"null_label": 2}, f)
  assert ddss_tf.load_denoiser(folder).null_label == 2
  assert ddss_tf.load_denoiser(folder).sha256 == denoiser.sha256
  assert ddss_tf.load_denoiser(
      folder, num_classes=4).sha256 != denoiser.sha256


@pytest.mark.parametrize("column,one_hot", [
    (False, 0), (True, 0), (False, CLASSES), (False, CLASSES - 1)])
def test_labels_of_a_keras_file(tmp_path, column, one_hot):
  image = keras.Input(SHAPE, name="image")
  when = keras.Input((), name="when")
  width = (1,) if column else (one_hot,) if one_hot else ()
  label = keras.Input(width, name="which",
                      dtype="float32" if one_hot else "int64")
  flat = keras.layers.Flatten()(label)
  if not one_hot:
    flat = keras.layers.CategoryEncoding(
        CLASSES, output_mode="one_hot")(flat)
  gain = keras.layers.Dense(1, kernel_initializer="ones")
  value = keras.layers.Reshape((1, 1, 1))(gain(flat))
  scale = keras.layers.Reshape((1, 1, 1))(
      keras.layers.Rescaling(0.001)(when))
  ones = keras.layers.Rescaling(0.0, 1.0)(image)
  factor = keras.layers.Rescaling(1.0, 1.0)(value)
  out = keras.layers.Add()([keras.layers.Multiply()([image, factor]),
                            keras.layers.Multiply()([ones, scale])])
  model = keras.Model([label, when, image], out)
  values = np.arange(1.0, 1.0 + (one_hot or CLASSES), dtype=np.float32)
  gain.set_weights([values[:, None], np.zeros(1, np.float32)])
  path = str(tmp_path / "model.keras")
  model.save(path)
  denoiser = ddss_tf.load_denoiser(path, **WITH_LABELS)
  x, t = states()
  # The label after the last of a narrower one-hot vector is all zeros.
  by_label = np.append(values, np.zeros(CLASSES - len(values)))
  wanted = (x * (1.0 + by_label[LABELS].astype(np.float32)[
      :, None, None, None]) + 0.001 * t[:, None, None, None])
  np.testing.assert_allclose(
      denoiser.network(x, t, LABELS), wanted, rtol=1e-6)
  denoiser.save(str(tmp_path / "own"))
  np.testing.assert_array_equal(
      ddss_tf.load_denoiser(str(tmp_path / "own")).network(x, t, LABELS),
      denoiser.network(x, t, LABELS))
  refused(path, "exactly for a model of three inputs", **TOLD)


@pytest.mark.parametrize("told,words", [
    ({"num_classes": 0}, ["num_classes", ">= 1", "0"]),
    ({"num_classes": 2.5}, ["num_classes", "2.5"]),
    ({"num_classes": 3, "null_label": True}, ["null_label", "True"]),
    ({"num_classes": 3, "null_label": 3}, ["null_label", "3"]),
    ({"num_classes": 5}, ["three inputs", "[B, 5]", "which"]),
])
def test_told_labels_that_are_refused(tmp_path, told, words):
  image, when = keras.Input(SHAPE), keras.Input(())
  which = keras.Input((CLASSES,), name="which")
  path = str(tmp_path / "model.keras")
  keras.Model([image, when, which], keras.layers.Rescaling(2.0)(image)).save(
      path)
  with open(path + ".json", "w") as f:
    json.dump(TOLD | told, f)
  refused(path, *words)
