"""Tests of feature networks from SavedModels, TF-Hub and keras.applications."""

import functools
import hashlib
import importlib
import importlib.util
import json
import os
import shutil
import sys
import types

import gin
import keras
import numpy as np
from PIL import Image
import pytest
import tensorflow as tf

import ddss_tf
from ddss_tf import metrics
from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.features import hub as hub_lib
from ddss_tf.features import keras_models
from ddss_tf.features import load as features_lib
from ddss_tf.features import preprocessing
from ddss_tf.features import reference
from ddss_tf.runs import fingerprint
from ddss_tf.samplers import families
from ddss_tf.samplers import generator as generator_lib
from ddss_tf import configuration  # pylint: disable=unused-import
from ddss_tf.errors import UserError
from project import ROOT, load_tool

HANDLE = "https://tfhub.dev/tensorflow/tfgan/eval/inception/1"
WIDTH, CLASSES = 12, 7


def small_network(images, kernels):
  """A smooth network; pool_3 is [B, 1, 1, 12], as some Inceptions have it."""
  x = tf.nn.softplus(tf.nn.conv2d(images, kernels[0], 4, "SAME"))
  x = tf.nn.softplus(tf.nn.conv2d(x, kernels[1], 2, "SAME"))
  # The spread as well as the mean, or all noise would look alike.
  pool = 30 * tf.concat([tf.reduce_mean(x, [1, 2], keepdims=True),
                         tf.math.reduce_std(x, [1, 2], keepdims=True)], -1)
  return {"pool_3": pool, "logits": pool[:, 0, 0] @ kernels[2]}


def small_kernels():
  rng = np.random.default_rng(5)
  return [rng.normal(size=shape, scale=scale).astype(np.float32)
          for shape, scale in (((5, 5, 3, 8), 0.3), ((3, 3, 8, 6), 0.3),
                               ((WIDTH, CLASSES), 0.5))]


class Small(tf.Module):
  """What there is to save, without a `__call__`."""

  def __init__(self, size=299, outputs=lambda outputs: outputs,
               dtype=tf.float32):
    super().__init__()
    self.kernels = [tf.Variable(kernel) for kernel in small_kernels()]
    self.function = tf.function(
        lambda images: outputs(small_network(
            tf.cast(images, tf.float32), self.kernels)),
        input_signature=[tf.TensorSpec([None, size, size, 3], dtype)])


class Callable(Small):
  """As TF-GAN's Inception is called in TensorFlow 2."""

  @tf.function(input_signature=[tf.TensorSpec([None, 299, 299, 3])])
  def __call__(self, images):
    return small_network(images, self.kernels)


def save(folder, function=None, **arguments):
  """Saves a `Small` with nothing but the signature "serving_default"."""
  module = Small(**arguments)
  tf.saved_model.save(module, str(folder), signatures={
      "serving_default": function or module.function})
  return str(folder)


def save_tensorflow_1(folder, signature):
  """TensorFlow 1's builder; "default" is how TF-Hub's first format has it."""
  hub = signature == "default"
  builder = tf.compat.v1.saved_model.Builder(str(folder))
  graph = tf.Graph()
  with graph.as_default(), tf.compat.v1.Session() as session:
    images = tf.compat.v1.placeholder(tf.float32, [None, 299, 299, 3])
    kernels = [tf.compat.v1.Variable(kernel) for kernel in small_kernels()]
    outputs = small_network(images, kernels)
    session.run(tf.compat.v1.global_variables_initializer())
    builder.add_meta_graph_and_variables(
        session, [] if hub else ["serve"], {
            signature: tf.compat.v1.saved_model.predict_signature_def(
                {"images": images}, outputs)})
  builder.save()
  if hub:
    with open(os.path.join(folder, "tfhub_module.pb"), "wb") as f:
      f.write(b"\x08\x03")
  return str(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
  """Folder of a small SavedModel with the interface of TF-GAN's Inception."""
  folder = str(tmp_path_factory.mktemp("small") / "small_inception")
  tf.saved_model.save(Callable(), folder)
  return folder


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
  """Folder of the tool's full-size SavedModel."""
  tool = load_tool("make_random_inception")
  folder = str(tmp_path_factory.mktemp("inception") / "random_inception")
  tf.saved_model.save(tool.RandomInception(0), folder)
  return folder


@pytest.fixture(params=["small", pytest.param("inception",
                                              marks=pytest.mark.slow)])
def folder(request):
  return request.getfixturevalue(request.param)


def rgb(count, seed=0, mean=0.1, std=0.3):
  rng = np.random.default_rng(seed)
  return np.clip(mean + std * rng.normal(size=(count, 8, 8, 3)), -1, 1).astype(
      np.float32)


def refused(call, *words):
  with pytest.raises(UserError) as error:
    call()
  # The command line cuts off where gin says it was called.
  text = str(error.value).split("\n  In call to configurable")[0]
  assert "\n" not in text
  for word in words:
    assert word in text, text


def bilinear(images, size, offset=0.5):
  """Rows of weights by hand: output i lies at (i + offset) in/out - offset."""

  def weights(old, new):
    rows = np.zeros((new, old))
    for i in range(new):
      at = min(max((i + offset) * old / new - offset, 0), old - 1)
      left = min(int(at), old - 2)
      rows[i, left] += 1 - (at - left)
      rows[i, left + 1] += at - left
    return rows

  return np.einsum("ih,jw,bhwc->bijc", weights(images.shape[1], size[0]),
                   weights(images.shape[2], size[1]), images, optimize=True)


@pytest.mark.parametrize("resize, offset", [
    ("bilinear", 0.5), ("bilinear_antialias", 0.5), ("bilinear_tf1", 0.0)])
def test_enlarging_is_bilinear(resize, offset):
  images = rgb(2)
  rule = preprocessing.Preprocessing(resize, (29, 35))
  np.testing.assert_allclose(
      rule(tf.constant(images)), bilinear(images, (29, 35), offset), atol=2e-6)


@pytest.mark.parametrize("resize", ["bilinear", "bilinear_antialias"])
def test_shrinking_with_and_without_antialias(resize):
  images = np.random.default_rng(1).uniform(-1, 1, (1, 40, 40, 1)).astype("f")
  result = preprocessing.Preprocessing(resize, (15, 15))(tf.constant(images))
  if resize == "bilinear":
    expected = bilinear(images, (15, 15))[0, ..., 0]
  else:  # Pillow widens its filter when it shrinks.
    expected = np.asarray(Image.fromarray(images[0, ..., 0]).resize(
        (15, 15), Image.Resampling.BILINEAR))
  np.testing.assert_allclose(result[0, ..., 0], expected, atol=1e-5)


def test_applications_get_what_keras_says():
  x = tf.constant(rgb(2))
  checked = 0
  for name, function in vars(keras.applications).items():
    if not name[0].isupper():
      continue
    module = importlib.import_module(function.__module__)
    expected = module.preprocess_input(127.5 * (x.numpy() + 1))
    rule = preprocessing.VALUE_RANGES[keras_models.application_range(name)]
    np.testing.assert_allclose(rule(x), expected, atol=2e-5, err_msg=name)
    checked += 1
  assert checked > 30
  np.testing.assert_allclose(preprocessing.VALUE_RANGES["[0, 1]"](x),
                             (x + 1) / 2, atol=1e-7)


def test_protocol_names_the_rules(small):
  network = features_lib.load_features(small)
  assert network.protocol == (
      "tfgan: images clipped to [-1, 1], bilinear, half-pixel centres, "
      "no antialias, 299x299, 1 channel repeated to 3, [-1, 1]; "
      "features pool_3, logits logits")
  assert "no resize" in features_lib.load_features("digits_cnn").protocol


def classifier_fn(loaded, key):
  """As `tfgan.eval.classifier_fn_from_tfhub`, whose flatten Keras 3 lacks."""

  def call(images):
    output = loaded(images)[key]
    return tf.reshape(output, [output.shape[0], -1])

  return call


def test_metrics_equal_tf_gans_own(folder):
  real, generated = rgb(40), rgb(32, 1, mean=0.3, std=0.2)
  network = features_lib.load_features(folder)
  ours = [reference.reference(
      network, dataset_lib.ImageDataset("some", images, None, ""), quantise=False,
      cache_dir=None) for images in (real, generated)]
  tfgan = metrics._tfgan()
  loaded = tf.saved_model.load(folder)
  large = [tf.constant(bilinear(images, (299, 299)), tf.float32)
           for images in (real, generated)]
  pool, logits = (classifier_fn(loaded, key) for key in ("pool_3", "logits"))
  for images, own in zip(large, ours):
    for fn, key in ((pool, "pool"), (logits, "logits")):
      theirs = tfgan.run_classifier_fn(
          images, fn, num_batches=4, dtypes=tf.float32).numpy()
      np.testing.assert_allclose(getattr(own, key), theirs, rtol=1e-3,
                                 atol=1e-4 * np.abs(theirs).max())
      # The images are told apart by much more than this.
      assert np.std(theirs, axis=0).max() > 0.03 * np.abs(theirs).mean()
  fid = metrics.fid(ours[0].pool, ours[1].pool)
  assert fid == pytest.approx(float(tfgan.frechet_classifier_distance(
      *large, pool, num_batches=4)), rel=1e-3)
  assert fid > 0.1
  kid, _ = metrics.kid(ours[0].pool, ours[1].pool, block_size=16)
  theirs = tfgan.kernel_classifier_distance(
      *large, pool, num_batches=4, max_block_size=14)
  assert kid == pytest.approx(float(theirs), rel=1e-3)
  score = metrics.inception_score(ours[0].logits)[0]
  assert score == pytest.approx(float(
      tfgan.classifier_score(large[0], logits, num_batches=4)), rel=1e-4)
  print(f"{os.path.basename(folder)}: FID {fid:.5g} KID {kid:.5g} "
        f"IS {score:.5g}")


@pytest.mark.parametrize("output", ["pool", "logits"])
def test_gradient_matches_finite_differences(folder, output):
  network = features_lib.load_features(folder)
  x = tf.constant(rgb(2, mean=0.0, std=0.2))
  rng = np.random.default_rng(0)
  weights = tf.constant(rng.normal(
      size=network(x)[output].shape).astype(np.float32))

  @tf.function
  def gradient_of(images):
    with tf.GradientTape() as tape:
      tape.watch(images)
      value = tf.reduce_sum(weights * network(images)[output])
    return tape.gradient(value, images)

  gradient = gradient_of(x)
  assert gradient is not None and np.abs(gradient).max() > 0
  direction = gradient / tf.norm(gradient)
  # Deep random rectifiers bend soon: 4 % off at 1e-3, under 1 % at 1e-4.
  step = 1e-4 if folder.endswith("random_inception") else 1e-2
  ends = [network(x + sign * step * direction)[output].numpy().astype(float)
          for sign in (1, -1)]
  difference = np.sum(weights * (ends[0] - ends[1])) / (2 * step)
  np.testing.assert_allclose(tf.reduce_sum(gradient * direction), difference,
                             rtol=1e-2)


@pytest.fixture(scope="module")
def four_ways(small, tmp_path_factory):
  root = tmp_path_factory.mktemp("ways")
  return [small, save(root / "signature"),
          save_tensorflow_1(root / "one", "serving_default"),
          save_tensorflow_1(root / "hub", "default")]


def test_all_kinds_of_saved_models_are_one_network(four_ways):
  x = tf.constant(rgb(3))
  kernels = small_kernels()
  large = tf.constant(bilinear(x.numpy(), (299, 299)), tf.float32)
  expected = small_network(large, kernels)
  for path in four_ways:
    network = features_lib.load_features(path)
    with tf.GradientTape() as tape:
      tape.watch(x)
      outputs = network(x)
    assert outputs["pool"].shape == (3, WIDTH) == (3, network.num_features)
    np.testing.assert_allclose(
        outputs["pool"], expected["pool_3"][:, 0, 0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        outputs["logits"], expected["logits"], rtol=1e-4, atol=1e-4)
    assert not tape.watched_variables(), path
    assert np.any(tape.gradient(outputs["pool"], x).numpy()), path


def test_loaded_once(small, monkeypatch):
  load, calls = tf.saved_model.load, []
  monkeypatch.setattr(tf.saved_model, "load", lambda *args, **kwargs: (
      calls.append(args), load(*args, **kwargs))[1])
  network = features_lib.load_features(small)
  images = rgb(30)
  reference.reference(
      network, dataset_lib.ImageDataset("some", images, None, ""), quantise=True,
      cache_dir=None, batch_size=7)
  function = tf.function(network)
  function(images[:3])
  function(images[:4])
  assert len(calls) == 1


def test_graph_equals_eager_and_clips(small):
  network = features_lib.load_features(small)
  graph = tf.function(network, input_signature=[
      tf.TensorSpec([None, 8, 8, 3])])
  x = 3 * rgb(3)
  for key, value in network(np.clip(x, -1, 1)).items():
    np.testing.assert_allclose(graph(x)[key], value, rtol=1e-5, atol=1e-5)


def test_grey_images_are_repeated(small):
  network = features_lib.load_features(small)
  grey = rgb(2)[..., :1]
  np.testing.assert_allclose(
      network(grey)["pool"], network(np.repeat(grey, 3, -1))["pool"],
      rtol=1e-6)
  assert network.accepts((8, 8, 1)) and network.accepts((32, 20, 3))
  assert not network.accepts((8, 8, 2))
  refused(lambda: network(np.zeros((1, 8, 8, 4))), "[?, ?, ?, 3]",
          "[1, 8, 8, 4]")


@pytest.fixture
def hub(monkeypatch):
  """Stands in for tensorflow_hub; without a network, unless it is given one."""
  module = types.ModuleType("tensorflow_hub")

  def resolve(handle):
    raise OSError(f"<urlopen error>\n{handle}: Name or service not known")

  module.resolve = resolve
  monkeypatch.setitem(sys.modules, "tensorflow_hub", module)
  return module


def test_a_handle_is_fetched_where_there_is_a_network(
    small, hub, tmp_path, monkeypatch):
  monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path))
  fetched = []

  def resolve(handle):
    fetched.append(handle)
    folder = tmp_path / hashlib.sha1(handle.encode()).hexdigest()
    shutil.copytree(small, folder)
    return str(folder)

  hub.resolve = resolve
  network = features_lib.load_features(HANDLE)
  assert network.key == features_lib.load_features(small).key
  features_lib.load_features(HANDLE)
  assert fetched == [HANDLE]  # Once.


def test_handle_in_the_cache_of_tf_hub(small, hub, tmp_path, monkeypatch):
  del hub
  monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path / "cache"))
  get = functools.partial(features_lib.load_features, HANDLE)
  name = hashlib.sha1(HANDLE.encode()).hexdigest()
  refused(get, f"{HANDLE}?tf-hub-format=compressed", name, str(tmp_path),
          "TFHUB_CACHE_DIR", "load_features.path", "no such folder",
          "Name or service not known")
  (tmp_path / "cache").mkdir()
  lock = tmp_path / "cache" / f"{name}.lock"
  lock.write_text("host.1234")
  refused(get, str(lock), "has not ended")
  shutil.copytree(small, tmp_path / "cache" / name)
  network = get()
  assert network.name == "tfgan_inception"
  folder = features_lib.load_features(small)
  # The same network under the same rules: reference features serve both.
  assert network.key == folder.key and network.sha256 == folder.sha256
  assert network.protocol == folder.protocol
  np.testing.assert_array_equal(network(rgb(2))["pool"], folder(rgb(2))["pool"])
  # Without the variable it is the folder of temporary files.
  monkeypatch.delenv("TFHUB_CACHE_DIR")
  monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "tmp"))
  refused(get, str(tmp_path / "tmp" / "tfhub_modules" / name))


def test_folder_is_that_of_tensorflow_hub(tmp_path, monkeypatch):
  resolver = pytest.importorskip("tensorflow_hub.compressed_module_resolver")
  monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path))
  theirs = resolver._module_dir(HANDLE)
  os.makedirs(theirs)
  assert hub_lib.hub_folder(HANDLE) == theirs


def test_keys_tell_protocols_and_files_apart(small, tmp_path):
  load = functools.partial(features_lib.load_features, small)
  networks = [load(), load(resize="bilinear_tf1"),
              load(resize="bilinear_antialias"), load(value_range="[0, 1]"),
              load(pool_layer="logits"),
              features_lib.load_features("digits_cnn"),
              features_lib.load_features("digits_cnn", image_size=16),
              features_lib.load_features("digits_cnn", value_range="[0, 1]")]
  changed = str(tmp_path / "changed")
  module = Callable()
  module.kernels[0].assign_add(1e-3 * tf.ones_like(module.kernels[0]))
  tf.saved_model.save(module, changed)
  networks.append(features_lib.load_features(changed))
  assert len({network.key for network in networks}) == len(networks)
  assert len({(n.sha256, n.protocol) for n in networks}) == len(networks)
  assert load().key == networks[0].key
  some = dataset_lib.ImageDataset("some", rgb(5), None, "0")
  for count, network in enumerate(networks[:3], start=1):
    arrays = reference.reference(
        network, some, quantise=False, cache_dir=str(tmp_path / "cache"))
    assert len(os.listdir(tmp_path / "cache")) == count
    np.testing.assert_allclose(arrays.pool, network(some.images)["pool"],
                               rtol=1e-5)


def test_embedded_networks_keep_what_results_recorded():
  # Caches and run directories of before there was any preprocessing.
  for name in features_lib.embedded_features():
    network = features_lib.load_features(name)
    model = keras.saving.load_model(os.path.join(
        os.path.dirname(features_lib.__file__), "assets", f"{name}.keras"))
    model.trainable = False
    weights = fingerprint.arrays_sha256(model.get_weights())
    assert network.sha256 == weights
    assert network.key == fingerprint.text_sha256(
        json.dumps([weights, "pool", "logits", model.to_json()]))


@pytest.mark.slow
def test_keras_file_with_a_resize(digits):
  own = features_lib.load_features("digits_cnn")
  resized = features_lib.load_features("digits_cnn", resize="bilinear")
  images = digits.images[:3]
  np.testing.assert_allclose(resized(images)["pool"], own(images)["pool"],
                             rtol=1e-5, atol=1e-6)
  large = tf.image.resize(images, (28, 28)).numpy()
  assert resized.accepts((28, 28, 1)) and not own.accepts((28, 28, 1))
  assert not resized.accepts((28, 28, 3))  # The network takes one channel.
  np.testing.assert_allclose(
      resized(large)["pool"], own(bilinear(large, (16, 16)))["pool"],
      rtol=1e-4, atol=1e-5)


def test_incomplete_saved_models(small, tmp_path):

  def broken(damage):
    shutil.rmtree(tmp_path / "model", ignore_errors=True)
    shutil.copytree(small, tmp_path / "model")
    damage(tmp_path / "model")
    return functools.partial(features_lib.load_features,
                             str(tmp_path / "model"))

  path = str(tmp_path / "model")
  data_file = "variables/variables.data-00000-of-00001"
  refused(broken(lambda p: (p / "saved_model.pb").unlink()), path,
          "without saved_model.pb", "half-written", "unpack it again")
  refused(broken(lambda p: (p / data_file).unlink()), path, "half-written",
          "variables.index")
  refused(broken(lambda p: (p / "variables/variables.index").unlink()), path,
          "half-written", "all its data files")
  refused(broken(lambda p: shutil.rmtree(p / "variables")), path,
          "not a complete SavedModel", "variables.index is missing")
  for file in ("saved_model.pb", data_file):
    refused(broken(lambda p, file=file: (p / file).write_bytes(
        (p / file).read_bytes()[:300])), path, "not a complete SavedModel")
  (tmp_path / "empty").mkdir()
  refused(lambda: features_lib.load_features(str(tmp_path / "empty")),
          "saved_model.pb")


@pytest.mark.slow
def test_saved_models_of_another_interface(tmp_path):
  load = features_lib.load_features
  any_size = save(tmp_path / "any", size=None)
  refused(lambda: load(any_size, pool_layer="features"), "image_size",
          "resize must be 'none'")
  refused(lambda: load(any_size, pool_layer="features", image_size=16),
          "logits, pool_3", "'features'")
  # Images of their own size, when the network takes any.
  network = load(any_size, resize="none")
  x = rgb(2)
  np.testing.assert_allclose(
      network(x)["logits"], small_network(x, small_kernels())["logits"],
      rtol=1e-4, atol=1e-4)
  assert network.accepts((8, 8, 3)) and "no resize" in network.protocol
  fixed = save(tmp_path / "fixed", size=16)
  assert not load(fixed, resize="none").accepts((8, 8, 3))
  assert load(fixed).protocol.count("16x16") == 1
  refused(lambda: load(fixed, image_size=17), "(16, 16)", "(17, 17)")
  spatial = save(tmp_path / "map", outputs=lambda outputs: {
      **outputs, "pool_3": tf.tile(outputs["pool_3"], [1, 2, 2, 1])})
  refused(lambda: load(spatial), "'pool_3'", "[2, 2, 2, 12]", "[B, features]")
  infinite = save(tmp_path / "infinite", outputs=lambda outputs: {
      **outputs, "logits": outputs["logits"] / 0.0})
  refused(lambda: load(infinite), "'logits'", "finite")
  integer = save(tmp_path / "integer", dtype=tf.uint8)
  refused(lambda: load(integer), "float images", "uint8")
  pair = save(tmp_path / "pair", function=tf.function(
      lambda a, b: {"pool_3": a + b}, input_signature=[
          tf.TensorSpec([None, 3], name=name) for name in "ab"]))
  refused(lambda: load(pair), "one input")
  stuck = save(tmp_path / "stuck", outputs=lambda outputs: {
      key: tf.ensure_shape(x, [1, *x.shape[1:]])
      for key, x in outputs.items()})
  refused(lambda: load(stuck), "must take images [2, 299, 299, 3]")
  nothing = tf.Module()
  nothing.variable = tf.Variable(1.0)
  tf.saved_model.save(nothing, str(tmp_path / "nothing"))
  refused(lambda: load(str(tmp_path / "nothing")), "serving_default", "neither")

  class Tensor(tf.Module):

    @tf.function(input_signature=[tf.TensorSpec([None, 16, 16, 3])])
    def __call__(self, images):
      return images

  tf.saved_model.save(Tensor(), str(tmp_path / "tensor"))
  refused(lambda: load(str(tmp_path / "tensor")), "dictionary", "'pool_3'")


def test_rules_that_do_not_fit(small):
  load = features_lib.load_features
  refused(lambda: load(small, resize="cubic"), "'bilinear_tf1'", "'cubic'")
  refused(lambda: load(small, value_range="byte"), "'[0, 255]'", "'byte'")
  for size in (0, -3, "299", [1, 2, 3], 2.5):
    refused(lambda size=size: load(small, image_size=size), "image_size",
            repr(size))
  refused(lambda: load(small, image_size=299, resize="none"),
          "none without a resize")


@pytest.mark.slow
def test_application_with_random_weights():
  load = functools.partial(features_lib.load_features, "keras:EfficientNetB0",
                           image_size=32)
  random = load(weights=None, seed=3)
  assert random.name == "keras:EfficientNetB0-random"
  assert "RANDOM weights, seed 3" in random.protocol
  assert "32x32" in random.protocol and "[0, 255]" in random.protocol
  x = rgb(6)
  outputs = random(x)
  assert outputs["pool"].shape == (6, 1280) == (6, random.num_features)
  assert outputs["logits"].shape == (6, 1000)
  assert np.mean(np.std(outputs["pool"], axis=0)) > (
      0.05 * np.mean(np.abs(outputs["pool"])))
  state = np.random.get_state()[1].copy()
  again, other = load(weights=None, seed=3), load(weights=None, seed=4)
  # The seed alone decides, and it is no one else's.
  np.testing.assert_array_equal(state, np.random.get_state()[1])
  assert again.key == random.key != other.key
  np.testing.assert_allclose(again(x)["pool"], outputs["pool"], rtol=1e-3,
                             atol=1e-4)
  assert not np.allclose(other(x)["pool"], outputs["pool"], atol=1e-2)


@pytest.mark.slow
def test_application_from_a_file(tmp_path):
  model = keras.applications.EfficientNetB0(
      weights=None, classifier_activation=None, input_shape=(32, 32, 3))
  keras_models.randomise(model, 7)
  keras_models.calibrate(model, "[0, 255]", 7)
  path = str(tmp_path / "b0.weights.h5")
  model.save_weights(path)
  network = features_lib.load_features(
      "keras:EfficientNetB0", image_size=32, weights=path)
  assert network.name == "keras:EfficientNetB0"
  x = rgb(6)
  assert "RANDOM" not in network.protocol
  images = keras.applications.efficientnet.preprocess_input(
      127.5 * (bilinear(x, (32, 32)) + 1))
  np.testing.assert_allclose(
      network(x)["logits"], model(images, training=False), rtol=1e-3,
      atol=1e-3 * np.std(network(x)["logits"]))
  with tf.GradientTape() as tape:
    tape.watch(images := tf.constant(x))
    y = tf.reduce_sum(network(images)["pool"])
  assert not tape.watched_variables()
  assert np.any(tape.gradient(y, images).numpy())


@pytest.mark.slow
def test_applications_that_cannot_be_built(tmp_path, monkeypatch):
  load = features_lib.load_features
  refused(lambda: load("keras:Inception"), "InceptionV3", "'Inception'")
  refused(lambda: load("keras:InceptionV3", weights="none.h5"), "'none.h5'",
          "must be a file")
  (tmp_path / "bad.weights.h5").write_text("no")
  refused(lambda: load("keras:MobileNetV2",
                       weights=str(tmp_path / "bad.weights.h5")),
          "keras:MobileNetV2", "bad.weights.h5")
  refused(lambda: load("keras:MobileNetV2", weights=None, image_size=32),
          "predictions", "'avg_pool'")

  def offline(**kwargs):
    raise ValueError("URL fetch failure\non https://storage")

  monkeypatch.setattr(keras.applications, "InceptionV3", offline)
  refused(lambda: load("keras:InceptionV3"), "URL fetch failure",
          "'imagenet'", "load_features.weights")
  monkeypatch.setattr(keras.applications, "Novel", offline, raising=False)
  refused(lambda: load("keras:Novel"), "value_range", "None")


@pytest.mark.slow
def test_search_and_evaluate(folder, tmp_path):
  shape = (8, 8, 3)
  images = rgb(40, mean=0.3, std=0.25)
  parts = dict(
      denoiser=ddss_tf.gaussian_denoiser(shape, mean=0.3, std=0.25),
      dataset=dataset_lib.ImageDataset(
          "gaussian", images, None, fingerprint.arrays_sha256([images])),
      features=features_lib.load_features(folder))
  run = str(tmp_path / "run")
  make_sampler = functools.partial(
      families.make_sampler, family="ggdm+pred+time", num_steps=2, init="ddim")
  sampler = ddss_tf.search(
      run_dir=run, **parts, sampler=make_sampler, num_search_steps=2,
      batch_size=4, pool_samples=8, validation_samples=4, validate_every=1,
      jit_compile=False)
  start = make_sampler(parts["denoiser"].schedule).coefficients()
  found = sampler.coefficients().arrays()
  moved = [np.abs(found[name] - value).max()
           for name, value in start.arrays().items()]
  assert 0 < max(moved) < np.inf
  [record] = ddss_tf.evaluate(
      run, **parts, num_samples=12, batch_size=4, jit_compile=False,
      baselines=[])
  assert record["features"] == {"name": os.path.basename(folder),
                                "sha256": parts["features"].sha256,
                                "protocol": parts["features"].protocol,
                                "key": parts["features"].key}
  expected = tf_gan_metrics(
      tf.saved_model.load(folder), images,
      generator_lib.Generator(parts["denoiser"], 4, jit_compile=False).images(
          sampler.coefficients(), 12, record["seed"]))
  for name, value in expected.items():
    np.testing.assert_allclose(record[name], value, rtol=1e-4, err_msg=name)
  assert record["fid"] > 0.1 and record["inception_score"] >= 1


def tf_gan_metrics(model, real, generated):
  """FID, KID and IS of float images by TF-GAN's functions and none of ours.

  Images are rounded to bytes and go through the SavedModel as they are in a
  file: none of this is done by the package.
  """
  pools, logits = [], []
  for images in (real, generated):
    pixels = np.clip(np.round(127.5 * images + 127.5), 0, 255).astype(np.uint8)
    assert np.any(pixels != 127.5 * images + 127.5)  # Or nothing was rounded.
    outputs = model(tf.image.resize(pixels / np.float32(127.5) - 1, (299, 299)))
    pools.append(np.reshape(outputs["pool_3"], (len(images), -1)))
    logits.append(outputs["logits"])
  tfgan = metrics._tfgan()  # TF-GAN's module itself.
  fid = tfgan.frechet_classifier_distance_from_activations(
      *map(tf.constant, pools))
  # Its blocks are consecutive rows; ours are dealt, by one generator each.
  dealt = [pool[np.random.default_rng(seed).permutation(len(pool))]
           for seed, pool in enumerate(pools)]
  kid, kid_std = tfgan.kernel_classifier_distance_and_std_from_activations(
      *map(tf.constant, dealt), max_block_size=len(real) // 2,
      dtype=tf.float64)  # In float32 the error has three digits.
  return {"fid": fid, "kid": kid, "kid_std": kid_std,
          "inception_score": tfgan.classifier_score_from_logits(logits[1])}


def test_search_names_the_network_that_does_not_fit(small, tmp_path):
  parts = dict(
      denoiser=ddss_tf.gaussian_denoiser((8, 8, 3), mean=0.3, std=0.25),
      dataset=dataset_lib.ImageDataset("gaussian", rgb(4), None, "0"))
  arguments = dict(sampler=None, num_search_steps=1, batch_size=2)
  refused(lambda: ddss_tf.search(
      run_dir=str(tmp_path), **parts, **arguments,
      features=features_lib.load_features(small, resize="none")),
          "feature network 'small_inception'", "(8, 8, 3)", "(299, 299, 3)")
  refused(lambda: ddss_tf.search(
      run_dir=str(tmp_path), **parts, **arguments,
      features=features_lib.load_features("digits_cnn")),
          "feature network 'digits_cnn'", "(16, 16, 1)")


@pytest.mark.slow
def test_random_inception_tells_images_apart(inception):
  tool = load_tool("make_random_inception")
  outputs = tf.saved_model.load(inception)(
      keras_models.smooth_images(16, (299, 299), 1))
  assert outputs["pool_3"].shape == (16, 2048)
  assert outputs["logits"].shape == (16, 1008)
  values = tool.spread(outputs)
  assert values["pool_3 std"] > 0.1 * values["pool_3 mean"]
  assert 0.3 < values["logits std"] < 3
  # No dead features: nearly all differ between images.
  assert np.mean(np.std(outputs["pool_3"], axis=0) > 1e-3) > 0.95


# clip.gin adds a measure, and is tested with it.
@pytest.mark.parametrize("name", sorted({*os.listdir(
    os.path.join(ROOT, "gin_configs", "features"))} - {"clip.gin"}))
def test_gin_files_replace_the_features_of_a_recipe(name, monkeypatch):
  monkeypatch.setenv("TFHUB_CACHE_DIR", "/nonexistent")
  scope = "heldout" if name.startswith("heldout") else "loss"
  # There gin looks for what a file includes.
  monkeypatch.chdir(os.path.join(ROOT, "gin_configs"))
  try:
    for file in ("digits.gin", os.path.join("features", name)):
      gin.parse_config_file(file)
    path = gin.query_parameter(f"{scope}/load_features.path")
    if scope == "heldout":
      gin.bind_parameter("heldout/load_features.weights", "none.h5")
    with gin.config_scope(scope):
      # Every argument is one that the function has; the weights are not here.
      refused(gin.get_configurable("load_features"),
              path if scope == "loss" else "'none.h5'")
  finally:
    gin.clear_config()
