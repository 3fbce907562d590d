"""Tests of Stable Diffusion 3 from KerasHub: its objects, presets and files.

Oracles are KerasHub's own `generate` and `encode_text_step`, and diffusers' folder
with the same weights. The models are tiny, of random weights.
"""

import gc
import os
import subprocess
import sys
import weakref

from checkpoint_files import DATA, refusal
import keras
import numpy as np
import pytest
import tensorflow as tf

import ddss_tf
from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.features import network as feature_network
from ddss_tf.formats import keras_hub as formats
from ddss_tf.networks import keras_hub as networks
from ddss_tf.samplers import generator

keras_hub = pytest.importorskip("keras_hub")

# What imports KerasHub is imported after it was found.
import keras_hub_models as tiny  # pylint: disable=g-import-not-at-top,wrong-import-position

PROMPTS = ["a cat", "dog", "a dog"]
NEGATIVE = "cat"
GUIDANCE = 7.0


@pytest.fixture(scope="module")
def task():
  return tiny.make_task(tiny.filled_backbone())


@pytest.fixture(scope="module")
def denoiser(task):
  return ddss_tf.of_keras_hub(
      task, PROMPTS, NEGATIVE, guidance_scale=GUIDANCE, name="tiny")


@pytest.fixture(scope="module")
def folder(task, tmp_path_factory):
  """A folder with a preset and with `task.keras`."""
  root = tmp_path_factory.mktemp("models")
  task.save_to_preset(str(root / "preset"))
  task.save(str(root / "task.keras"))
  return root


@pytest.fixture(scope="module")
def preset(folder):
  return ddss_tf.load_denoiser(
      str(folder / "preset"), prompts=PROMPTS, negative_prompt=NEGATIVE,
      guidance_scale=GUIDANCE)


def tokens(task, texts):
  return dict(task.preprocessor.generate_preprocess(texts))


def embedded(task):
  """What KerasHub says of each prompt alone, and of the negative one."""
  negative = tokens(task, [NEGATIVE])
  rows = [task.backbone.encode_text_step(tokens(task, [text]), negative)
          for text in PROMPTS]
  return (np.concatenate([*(row[0] for row in rows), rows[0][1]]),
          np.concatenate([*(row[2] for row in rows), rows[0][3]]))


def close(value, truth, tolerance=1e-4):
  value, truth = np.asarray(value), np.asarray(truth)
  assert value.shape == truth.shape
  assert np.max(np.abs(value - truth)) < tolerance * np.std(truth)


@pytest.mark.slow
def test_prompts_become_a_table(task, denoiser):
  table = denoiser.table
  assert table.prompts == (*PROMPTS, NEGATIVE) and table.null_row == 3
  context, pooled = embedded(task)
  assert np.abs(context[0] - context[1]).max() > 0.1
  rows = table.rows(tf.range(4))
  close(rows["context"], context)
  close(rows["pooled"], pooled)
  assert table.shapes == {"context": (2 * tiny.TOKENS, 4096), "pooled": (16,)}
  assert denoiser.conditions == ("context", "pooled")
  # The size of a batch is nobody's business.
  arrays = networks.encode(task, PROMPTS, NEGATIVE, batch_size=2)
  close(arrays["context"], context)
  close(arrays["pooled"], pooled)
  assert arrays["context"].dtype == np.float32


def test_token_ids_do_without_tokenizers(task, denoiser):
  bare = ddss_tf.of_keras_hub(task.backbone)
  assert bare.table is None and bare.identity["sha256"] == denoiser.sha256
  table = formats.encoded(
      task.backbone, tokens(task, PROMPTS), tokens(task, [NEGATIVE]))
  assert table.prompts is None and table.null_row == 3
  for name, value in table.rows(tf.range(4)).items():
    np.testing.assert_array_equal(
        value, denoiser.table.rows(tf.range(4))[name])
  assert bare.with_table(denoiser.table).guided(GUIDANCE).key == denoiser.key


def test_a_table_without_a_negative_prompt(task, denoiser):
  table = formats.encoded(task, "dog", None)
  assert table.prompts == ("dog",) and table.null_row is None
  close(table.rows(tf.constant([0]))["pooled"],
        denoiser.table.rows(tf.constant([1]))["pooled"])


def test_weights_of_prompts(task):
  table = formats.encoded(task, PROMPTS, NEGATIVE, [3, 0, 1])
  np.testing.assert_array_equal(table.frequencies, [0.75, 0, 0.25, 0])


@pytest.mark.slow
def test_images_of_prompts_are_those_of_generate(task, preset):
  """From texts to bytes: KerasHub's own call, and a preset that we read."""
  task.compile(run_eagerly=True)
  truth = task.generate(
      {"prompts": PROMPTS[:2], "negative_prompts": [NEGATIVE] * 2},
      num_steps=2, guidance_scale=GUIDANCE, seed=5)
  assert truth.shape == (2, 32, 48, 3) and truth.std() > 20
  noise = keras.random.normal((2, 4, 6, 16), dtype="float32", seed=5)
  sampler = ddss_tf.make_sampler(
      preset.schedule, "ddim", 2, stride="flow-euler")

  def images(labels):
    return dataset_lib.to_uint8(generator.decoded_chain(
        preset, preset.compiled_output(False),
        preset.for_chain(sampler.coefficients().numpy()), noise, None,
        tf.constant(labels))).numpy().astype(int)

  difference = np.abs(images([0, 1]) - truth)
  # A value on the edge between two bytes may round either way.
  assert difference.max() <= 1 and np.mean(difference > 0) < 0.01
  assert np.abs(images([2, 1]) - truth)[0].max() > 10


@pytest.mark.slow
def test_a_preset_is_the_same_denoiser(denoiser, preset):
  assert preset.name == "preset" and preset.key == denoiser.key
  assert preset.decoder.sha256 == denoiser.decoder.sha256
  assert preset.schedule.card() == denoiser.schedule.card()
  assert preset.architecture["format"] == "KerasHub"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["task", "backbone"])
def test_files_are_the_same_denoiser(task, denoiser, folder, name):
  task.backbone.save(str(folder / "backbone.keras"))
  path = str(folder / "conditions.npz")
  denoiser.table.save(path)
  given = (dict(prompts=PROMPTS, negative_prompt=NEGATIVE) if name == "task"
           else dict(conditions=path))
  read = ddss_tf.load_denoiser(
      str(folder / f"{name}.keras"), guidance_scale=GUIDANCE, **given)
  assert read.name == name and read.key == denoiser.key


@pytest.mark.quick("denoiser")
@pytest.mark.parametrize("name", ["denoiser", "preset"])
def test_no_gradient_reaches_a_weight(name, request):
  each = request.getfixturevalue(name)
  z = tf.random.stateless_normal([1, 4, 6, 16], [0, 1])
  with tf.GradientTape() as tape:
    tape.watch(z)
    value = tf.reduce_sum(each.decode(each.output(z, 500.0, 0)))
  assert not tape.watched_variables() and not each.model.trainable_weights
  assert np.all(np.isfinite(tape.gradient(value, z)))


@pytest.mark.slow
def test_text_encoders_are_let_go():
  task = tiny.make_task(tiny.make_backbone())
  parts = [task.backbone, task.backbone.clip_l, task.backbone.clip_g.weights[0],
           task.backbone.vae.encoder]
  seen = [weakref.ref(part) for part in parts]
  kept = ddss_tf.of_keras_hub(task, PROMPTS[:1])
  del task, parts
  gc.collect()
  assert [part() for part in seen] == [None] * 4
  assert kept.decode(tf.zeros([1, 4, 6, 16])).shape == (1, 32, 48, 3)


@pytest.mark.slow
def test_diffusers_weights_give_the_same_identity():
  """A sampler that was found with either fits the other."""
  from keras_hub.src.models.stable_diffusion_3.t5_encoder import T5Encoder  # pylint: disable=g-import-not-at-top
  read = ddss_tf.load_denoiser(os.path.join(DATA, "latent_sd3"))
  backbone = tiny.make_backbone(
      clip_widths=(4, 6), t5=T5Encoder(16, 1, 2, 12, 8),
      mmdit_num_layers=2, mmdit_position_size=12, image_shape=(64, 64, 3),
      shift=3.0)
  networks.of_backbone(backbone)[0].set_weights(read.model.get_weights())
  found = ddss_tf.of_keras_hub(backbone, {
      "clip_l": [[1, 2, 15]], "clip_g": [[1, 2, 15]], "t5": [[3, 4]]}, None,
                               name=read.name)
  assert found.identity == read.identity
  assert found.table.shapes == {"context": (5, 12), "pooled": (10,)}
  # T5's tokens follow those of CLIP.
  truth = backbone.t5({"token_ids": tf.constant([[3, 4]], tf.int32),
                       "padding_mask": tf.ones([1, 2], tf.int32)})
  close(found.table.rows(tf.constant([0]))["context"][:, 3:], truth)


@pytest.mark.slow
def test_other_sizes(task, folder):
  """The middle of the table of positions is used, as KerasHub itself does."""
  preset = str(folder / "preset")
  read = ddss_tf.load_denoiser(preset, image_size=(8, 4))
  assert read.state_shape == (8, 4, 16) and read.image_shape == (64, 32, 3)
  theirs = keras_hub.models.Backbone.from_preset(preset, image_shape=(64, 32, 3))
  x = tf.random.stateless_normal([2, 8, 4, 16], [0, 2])
  t = tf.constant([12.5, 870.0])
  context, pooled = (value[:2] for value in embedded(task))
  close(read.network(x, t, (context, pooled)), theirs.diffuser({
      "latent": x, "timestep": t, "context": tf.constant(context),
      "pooled_projection": tf.constant(pooled)}))
  close(read.decode(x), theirs.decode_step(x))


@pytest.mark.slow
def test_half_precision_is_read_in_float32(tmp_path):
  backbone = tiny.filled_backbone(dtype="float16")
  backbone.save_to_preset(str(tmp_path / "half"))
  read = ddss_tf.load_denoiser(str(tmp_path / "half"))
  assert read.dtype_policy == "float32"
  for model, source in ((read.model, backbone.diffuser),
                        (read.decoder.model, backbone.vae.decoder)):
    # The orders of the network's and the layer's weights differ.
    found, expected = (
        sorted([np.asarray(v, np.float32) for v in weights],
               key=lambda value: (value.shape, value.tobytes()))
        for weights in (model.weights, source.weights))
    assert {v.dtype for v in model.weights} == {"float32"}
    for one, truth in zip(found, expected, strict=True):
      np.testing.assert_array_equal(one, truth)
  z = tf.random.stateless_normal([1, 4, 6, 16], [0, 3])
  close(read.decode(z), np.float32(backbone.decode_step(z)), 0.05)
  # The object itself stays in half precision, but for its decoder.
  half = ddss_tf.of_keras_hub(backbone)
  assert half.dtype_policy == "mixed_float16"
  np.testing.assert_array_equal(half.decode(z), read.decode(z))


@pytest.mark.slow
def test_our_own_format_is_bit_equal(denoiser, tmp_path):
  denoiser.save(str(tmp_path / "own"))
  again = ddss_tf.load_denoiser(str(tmp_path / "own"))
  assert again.key == denoiser.key and again.setting == denoiser.setting
  assert again.table.prompts == denoiser.table.prompts
  x = tf.random.stateless_normal([2, 4, 6, 16], [0, 4])
  for call in (lambda d: d.output(x, 700.5, tf.constant([0, 2])),
               lambda d: d.decode(x)):
    np.testing.assert_array_equal(call(again), call(denoiser))


def test_a_model_without_tokenizers(task, tmp_path):
  task.backbone.save_to_preset(str(tmp_path / "bare"))
  assert "preset with tokenizers" in refusal(
      ddss_tf.load_denoiser, str(tmp_path / "bare"), prompts=PROMPTS)
  message = refusal(ddss_tf.of_keras_hub, task.backbone, PROMPTS)
  assert "token ids by clip_l, clip_g" in message and "'a cat'" in message
  message = refusal(
      ddss_tf.of_keras_hub, task.backbone, tokens(task, PROMPTS))
  assert message.startswith("negative_prompt must be token ids")


@pytest.mark.parametrize("options, words", [
    (dict(prompts=[]), ["prompts must be texts", "[]"]),
    (dict(prompts=["a", 1]), ["prompts must be texts"]),
    (dict(prompts={"clip_l": [[1]]}), ["clip_l, clip_g", "int64 [1, 1]"]),
    (dict(prompts={"clip_l": [[1]], "clip_g": [[1], [2]]}), ["[2, 1]"]),
    (dict(prompts={"clip_l": [[1.5]], "clip_g": [[1]]}), ["float64"]),
])
def test_prompts_that_mean_nothing(task, options, words):
  message = refusal(ddss_tf.of_keras_hub, task, **options)
  for word in words:
    assert word in message


@pytest.mark.parametrize("options, words", [
    (dict(weights=[1, 2]), "weights must be 3 numbers"),
    (dict(prompts=None, weights=[1]), "no prompts"),
    (dict(prompts=None, guidance_scale=2.0), "null_row"),
])
def test_arguments_that_do_not_fit(task, options, words):
  with pytest.raises(ValueError, match=words):
    ddss_tf.of_keras_hub(task, **{"prompts": PROMPTS, **options})


@pytest.mark.parametrize("options, words", [
    (dict(negative_prompt="a"), ["with prompts", "'a' alone"]),
    (dict(prompts=["a"], conditions="table.npz"), ["with prompts"]),
    (dict(image_size=5), ["multiples of 2, at most 16", "(5, 5)"]),
    (dict(image_size=18), ["(18, 18)"]),
    (dict(prediction="eps"), ["prediction must not be given"]),
])
def test_arguments_of_a_preset(folder, options, words):
  message = refusal(
      ddss_tf.load_denoiser, str(folder / "preset"), **options)
  for word in words:
    assert word in message


def test_files_have_a_size_of_their_own(folder):
  message = refusal(ddss_tf.load_denoiser, str(folder / "task.keras"),
                    image_size=8)
  assert "image_size must not be given" in message


@pytest.mark.parametrize("options", [
    dict(prompts=["a cat"]), dict(negative_prompt="a cat")])
def test_other_formats_encode_nothing(options):
  message = refusal(ddss_tf.load_denoiser, "digits16-ddpm", **options)
  assert "tools/encode_prompts.py" in message and "a cat" in message


def test_other_models_are_refused_by_name(task, tmp_path):
  clip = task.backbone.clip_l
  clip.save(str(tmp_path / "clip.keras"))
  message = refusal(ddss_tf.load_denoiser, str(tmp_path / "clip.keras"))
  assert "'CLIPTextEncoder'" in message and "StableDiffusion3Backbone" in message
  (tmp_path / "preset").mkdir()
  (tmp_path / "preset" / "config.json").write_text(
      '{"module": "keras_hub.src.models.flux.flux_model",'
      ' "class_name": "FluxBackbone"}')
  assert "'FluxBackbone'" in refusal(
      ddss_tf.load_denoiser, str(tmp_path / "preset"))
  assert "CLIPTextEncoder" in refusal(ddss_tf.of_keras_hub, clip)


@pytest.mark.slow
def test_damaged_presets(task, tmp_path):
  preset = tmp_path / "preset"
  task.backbone.save_to_preset(str(preset))
  weights = preset / "model.weights.h5"
  whole = weights.read_bytes()
  weights.write_bytes(whole[:len(whole) // 2])
  assert "not a complete preset" in refusal(ddss_tf.load_denoiser, str(preset))
  weights.unlink()
  assert "not a complete preset" in refusal(ddss_tf.load_denoiser, str(preset))


def test_a_damaged_file(folder, tmp_path):
  cut = tmp_path / "task.keras"
  cut.write_bytes((folder / "task.keras").read_bytes()[:5000])
  assert "not a complete and safe Keras file" in refusal(
      ddss_tf.load_denoiser, str(cut), prediction="eps",
      schedule={"name": "linear", "num_train_steps": 10})


@pytest.mark.slow
def test_weights_that_are_not_finite(tmp_path):
  backbone = tiny.make_backbone()
  backbone.diffuser.weights[3].assign(backbone.diffuser.weights[3] * np.nan)
  backbone.save_to_preset(str(tmp_path / "preset"))
  assert "NaN" in refusal(ddss_tf.load_denoiser, str(tmp_path / "preset"))


def test_without_keras_hub(folder, monkeypatch):
  for name in [name for name in sys.modules if name.split(".")[0] == "keras_hub"]:
    monkeypatch.setitem(sys.modules, name, None)
  for path in ("preset", "task.keras"):
    message = refusal(ddss_tf.load_denoiser, str(folder / path))
    assert "pip install ddss_tf[kerashub]" in message
  assert "pip install" in refusal(ddss_tf.of_keras_hub, None)


@pytest.mark.slow
def test_a_search_and_its_export(task, denoiser, tmp_path):
  """Three steps of a search, then a process that knows TensorFlow alone."""
  rng = np.random.default_rng(0)
  images = rng.uniform(-1, 1, (12, 32, 48, 3)).astype(np.float32)
  keras.utils.set_random_seed(0)
  inputs = keras.Input((32, 48, 3))
  pool = keras.layers.Dense(6, name="pool")(keras.layers.Flatten()(
      keras.layers.AveragePooling2D(8)(inputs)))
  features = feature_network.FeatureNetwork(
      keras.Model(inputs, keras.layers.Dense(3, name="logits")(pool)), "random")
  run = str(tmp_path / "run")
  sampler = ddss_tf.search(
      denoiser,
      lambda schedule: ddss_tf.make_sampler(
          schedule, "ggdm", num_steps=2),
      features, images, run_dir=run, num_search_steps=3, batch_size=2,
      optimizer="adam", validation_samples=2, jit_compile=False)
  path = ddss_tf.export(run, denoiser)
  context, pooled = embedded(task)
  np.savez(tmp_path / "given.npz", context=context[:2], pooled=pooled[:2])
  script = tmp_path / "serve.py"
  script.write_text(f"""
import sys
import numpy as np
import tensorflow as tf
given = {{name: tf.constant(value) for name, value in
         np.load({str(tmp_path / "given.npz")!r}).items()}}
signatures = tf.saved_model.load({path!r}).signatures
seed = tf.constant([4, 0], tf.int32)
images = signatures["of_conditions"](seed=seed, **given)["images"]
rows = signatures["of_classes"](seed=seed, labels=tf.constant([0, 1]))["images"]
assert not [m for m in sys.modules if m.startswith(("ddss_tf", "keras_hub"))]
np.savez({str(tmp_path / "images.npz")!r}, images=images, rows=rows)
""")
  environment = {name: value for name, value in os.environ.items()
                 if name != "PYTHONPATH"}
  subprocess.run([sys.executable, "-I", str(script)], check=True, cwd=tmp_path,
                 env=environment)
  expected = dataset_lib.to_uint8(generator.sample_chain(
      denoiser, denoiser.output,
      denoiser.for_chain(sampler.coefficients().numpy()), tf.constant([4, 0]),
      tf.range(2), tf.constant([0, 1]))).numpy().astype(int)
  with np.load(tmp_path / "images.npz") as served:
    for images in (served["images"], served["rows"]):
      assert images.shape == (2, 32, 48, 3)
      assert np.abs(images - expected).max() <= 1
  assert np.abs(expected[0] - expected[1]).max() > 10
  picture = ddss_tf.sample(run, denoiser, 2, prompt="a dog", jit_compile=False)
  with np.load(picture) as arrays:
    assert arrays["images"].shape == (2, 32, 48, 3)
