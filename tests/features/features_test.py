"""Tests of `ddss_tf.features` and of the embedded classifiers."""

import dataclasses
import json
import os
import shutil

import keras
from keras import layers
import numpy as np
import pytest
import tensorflow as tf

from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.features import load as features_lib
from ddss_tf.features import network as network_lib
from ddss_tf.features import reference
from ddss_tf.runs import fingerprint
from ddss_tf.errors import UserError

NETWORKS = {"digits_cnn": 128, "digits_resnet": 96}
ASSETS = os.path.join(os.path.dirname(features_lib.__file__), "assets")


@pytest.fixture(scope="module", params=sorted(NETWORKS))
def network(request):
  return features_lib.load_features(request.param)


@pytest.fixture(scope="module")
def cnn():
  return features_lib.load_features("digits_cnn")


def tiny_model(activation="relu"):
  """6 -> 3 features -> 2 logits; weights all 0.1."""
  images = keras.Input((2, 3, 1))
  x = layers.Flatten(name="flat")(images)
  x = layers.Dense(3, activation, name="pool", kernel_initializer=(
      keras.initializers.Constant(0.1)))(x)
  return keras.Model(images, layers.Dense(
      2, name="logits", kernel_initializer=keras.initializers.Constant(0.1)
  )(x))


def one_line(error) -> str:
  text = str(error.value)
  assert text and "\n" not in text
  return text


def test_embedded_names():
  assert features_lib.embedded_features() == sorted(NETWORKS)


def test_accuracy_on_held_out_digits(network, digits):
  logits = network(digits.images[9000:])["logits"]
  accuracy = np.mean(np.argmax(logits, 1) == digits.labels[9000:])
  with open(os.path.join(ASSETS, f"{network.name}.json")) as f:
    card = json.load(f)
  assert accuracy >= 0.98
  # One digit may fall on the other side on another processor.
  assert accuracy == pytest.approx(card["held_out_accuracy"], abs=1.5e-3)


def test_shapes_and_types(network, digits):
  outputs = network(digits.images[:3].astype(np.float64))
  assert network.num_features == NETWORKS[network.name]
  assert outputs["pool"].shape == (3, network.num_features)
  assert outputs["logits"].shape == (3, 10)
  assert {value.dtype for value in outputs.values()} == {tf.float32}


def test_sha256_is_of_the_weights(network):
  raw = keras.saving.load_model(
      os.path.join(ASSETS, f"{network.name}.keras"), compile=False)
  assert network.sha256 == fingerprint.arrays_sha256(raw.get_weights())


def test_file_holds_no_optimizer():
  for name in NETWORKS:
    path = os.path.join(ASSETS, f"{name}.keras")
    assert os.path.getsize(path) < 1.5e6
    model = keras.saving.load_model(path)
    assert getattr(model, "optimizer", None) is None


def test_no_tape_watches_the_weights(network, digits):
  assert network.model.weights
  assert not any(v.value.trainable for v in network.model.weights)
  assert not network.model.trainable_weights
  x = tf.constant(digits.images[:2])
  with tf.GradientTape() as tape:
    tape.watch(x)
    y = tf.reduce_sum(network(x)["pool"])
  assert not tape.watched_variables()
  assert np.any(tape.gradient(y, x).numpy())


@pytest.mark.parametrize("output", ["pool", "logits"])
def test_gradient_matches_finite_differences(network, digits, output):
  x = tf.constant(0.9 * digits.images[:4])  # Away from the clip.
  rng = np.random.default_rng(0)
  weights = tf.constant(
      rng.normal(size=network(x)[output].shape).astype(np.float32))

  def value(images):
    return tf.reduce_sum(weights * network(images)[output])

  with tf.GradientTape() as tape:
    tape.watch(x)
    y = value(x)
  gradient = tape.gradient(y, x)
  direction = rng.normal(size=x.shape).astype(np.float32)
  direction += 10 * gradient / tf.norm(gradient)
  direction /= tf.norm(direction)
  step = 1e-2
  difference = (value(x + step * direction) - value(x - step * direction)
                ) / (2 * step)
  np.testing.assert_allclose(
      tf.reduce_sum(gradient * direction), difference, rtol=5e-3)


def test_graph_equals_eager(network, digits):
  x = digits.images[:5]
  graph = tf.function(network, input_signature=[
      tf.TensorSpec([None, 16, 16, 1])])(x)
  for key, value in network(x).items():
    np.testing.assert_allclose(graph[key], value, atol=1e-5)


def test_clips(cnn, digits):
  inside = digits.images[:2]
  outside = np.where(inside == -1, -1.7, inside).astype(np.float32)
  outside[0, 0, 0] = 5
  inside = inside.copy()
  inside[0, 0, 0] = 1
  np.testing.assert_array_equal(cnn(outside)["pool"], cnn(inside)["pool"])


@pytest.mark.parametrize("shape", [(2, 28, 28, 1), (2, 16, 16, 3), (16, 16, 1)])
def test_wrong_shape(cnn, shape):
  with pytest.raises(UserError) as error:
    cnn(np.zeros(shape))
  text = one_line(error)
  assert "[?, 16, 16, 1]" in text
  assert str(list(shape)) in text


def test_changed_weight_is_refused(tmp_path):
  model = keras.saving.load_model(
      os.path.join(ASSETS, "digits_cnn.keras"), compile=False)
  path = str(tmp_path / "digits_cnn.keras")
  card = shutil.copy(os.path.join(ASSETS, "digits_cnn.json"), tmp_path)
  model.save(path)
  features_lib.load_features(path)
  weights = model.get_weights()
  weights[-1][3] += 1e-3
  model.set_weights(weights)
  model.save(path)
  with pytest.raises(UserError) as error:
    features_lib.load_features(path)
  assert "SHA-256" in one_line(error)
  os.remove(card)
  features_lib.load_features(path)  # Nothing on record to differ from.


def test_damaged_card(tmp_path):
  path = shutil.copy(os.path.join(ASSETS, "digits_cnn.keras"), tmp_path)
  for text in ["", "[]", "{}"]:
    (tmp_path / "digits_cnn.json").write_text(text)
    with pytest.raises(UserError) as error:
      features_lib.load_features(path)
    assert "'sha256'" in one_line(error)


def test_not_a_keras_file(tmp_path):
  truncated = tmp_path / "a.keras"
  with open(os.path.join(ASSETS, "digits_cnn.keras"), "rb") as f:
    truncated.write_bytes(f.read()[:5000])
  text = tmp_path / "b.keras"
  text.write_text("weights")
  other = tmp_path / "c.h5"
  other.write_text("weights")
  for path in [truncated, text, other, tmp_path / "missing.keras", tmp_path,
               "no_such_network"]:
    with pytest.raises(UserError) as error:
      features_lib.load_features(str(path))
    assert str(path) in one_line(error)


def test_code_in_a_file_is_refused(tmp_path):
  path = str(tmp_path / "lambda.keras")
  images = keras.Input((2, 3, 1))
  keras.Model(images, layers.Lambda(lambda x: x * 2)(images)).save(path)
  with pytest.raises(UserError) as error:
    features_lib.load_features(path)
  assert path in one_line(error)


def test_layers():
  model = tiny_model()
  with pytest.raises(UserError) as error:
    network_lib.FeatureNetwork(model, pool_layer="pol")
  text = one_line(error)
  assert "'pol'" in text and "flat, pool, logits" in text
  with pytest.raises(UserError) as error:
    network_lib.FeatureNetwork(model, logits_layer=model.layers[0].name)
  assert "[?, 2, 3, 1]" in one_line(error)
  flat = network_lib.FeatureNetwork(model, pool_layer="flat")
  assert flat.num_features == 6


def test_key_tells_networks_of_equal_weights_apart():
  relu = network_lib.FeatureNetwork(tiny_model())
  tanh = network_lib.FeatureNetwork(tiny_model("tanh"))
  flat = network_lib.FeatureNetwork(tiny_model(), pool_layer="flat")
  assert relu.sha256 == tanh.sha256 == flat.sha256
  # What results record beside the hash of the weights.
  assert relu.protocol != flat.protocol
  assert len({relu.key, tanh.key, flat.key}) == 3
  # Nor do results of one stand for those of another.
  assert relu.identity != tanh.identity
  assert "key" not in features_lib.load_features("digits_cnn").identity


def test_weights_that_are_not_finite(tmp_path):
  model = tiny_model()
  kernel = model.weights[0]
  kernel.assign(np.where(np.arange(kernel.shape[-1]) == 1, np.nan, kernel))
  path = str(tmp_path / "nan.keras")
  model.save(path)
  with pytest.raises(UserError, match=f"nan.keras.*finite.*{kernel.path}"):
    features_lib.load_features(path)


def test_a_reference_that_is_not_finite(some, tmp_path, caplog):
  images = keras.Input((16, 16, 1))
  pool = layers.Flatten(name="pool")(images)
  logits = layers.Lambda(lambda x: x[:, :2] / 0.0, name="logits")(pool)
  network = network_lib.FeatureNetwork(keras.Model(images, logits))
  found = reference.reference(
      network, some, quantise=True, cache_dir=str(tmp_path))
  # It costs what depends on it, and no other.
  assert "logits 'features' of 'some' have NaN" in caplog.text
  assert np.all(np.isfinite(found.pool)) and not np.any(
      np.isfinite(found.logits))
  assert not os.listdir(tmp_path)


def test_key_is_stable():
  keys = {features_lib.load_features("digits_resnet").key for _ in range(2)}
  assert len(keys) == 1


@pytest.fixture(name="some")
def fixture_some(digits):
  images = digits.images[:70]
  return dataset_lib.ImageDataset("some", images, None,
                           fingerprint.arrays_sha256([images]))


def test_cache(cnn, some, tmp_path, monkeypatch):
  folder = str(tmp_path / "cache")

  def get(cache_dir=folder, quantise=False):
    return reference.reference(
        cnn, some, quantise=quantise, cache_dir=cache_dir, batch_size=32)

  first = get()
  np.testing.assert_allclose(first.pool, cnn(some.images)["pool"], atol=1e-5)
  assert first.logits.shape == (70, 10)
  [file] = os.listdir(folder)
  path = os.path.join(folder, file)
  calls = []
  original = network_lib.FeatureNetwork.__call__
  monkeypatch.setattr(
      network_lib.FeatureNetwork, "__call__",
      lambda self, images: calls.append(1) or original(self, images))

  def assert_same(arrays):
    for value, same in zip(tf.nest.flatten(first), tf.nest.flatten(arrays)):
      np.testing.assert_array_equal(same, value)

  assert_same(get())
  assert not calls
  with open(path, "rb") as f:
    content = f.read()
  flipped = bytearray(content)
  flipped[len(content) // 2] ^= 1
  for damaged in [content[:-100], content[:10], b"", bytes(flipped)]:
    with open(path, "wb") as f:
      f.write(damaged)
    calls.clear()
    assert_same(get())
    assert len(calls) == 3  # 70 images, 32 at a time.
    calls.clear()
    assert_same(get())
    assert not calls
  assert os.listdir(folder) == [file]  # No temporary file is left.
  get(quantise=True)
  assert len(os.listdir(folder)) == 2
  other = dataclasses.replace(some, sha256="0" * 64)
  reference.reference(cnn, other, quantise=True, cache_dir=folder)
  assert len(os.listdir(folder)) == 3
  assert_same(get(cache_dir=None))


def test_quantise_rounds_to_bytes(cnn):
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (20, 16, 16, 1))
  offset = rng.uniform(-0.4, 0.4, pixels.shape)
  images = ((pixels + offset) / 127.5 - 1).astype(np.float32)
  noise = dataset_lib.ImageDataset("noise", images, None, "")
  got = reference.reference(
      cnn, noise, quantise=True, cache_dir=None).pool
  np.testing.assert_allclose(
      got, cnn(pixels / 127.5 - 1)["pool"], rtol=1e-4, atol=1e-4)
  assert np.any(abs(got - cnn(images)["pool"]) > 1e-2)
