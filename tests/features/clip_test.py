"""Tests of the CLIP score, on a tiny CLIP with random weights.

Oracles are the network's own head, which has the cosines of all pairs, Pillow's
resize, tokens by hand, and finite differences.
"""

import json
import os
import shutil
import sys

import gin
import keras
import numpy as np
from PIL import Image
import pytest
import tensorflow as tf

import ddss_tf
from ddss_tf.denoisers import denoiser as denoiser_lib
from ddss_tf.evaluation import evaluator as evaluator_lib
from ddss_tf.features import clip as clip_lib
from ddss_tf.reporting import report
from ddss_tf.runs import records as records_lib
from ddss_tf.runs import run_dir as run_dir_lib
from ddss_tf.samplers import sampler as sampler_lib
from ddss_tf.errors import UserError
import conditional_parts
import gaussian_parts
import small_clip
from project import ROOT

keras_hub = pytest.importorskip("keras_hub")

PROMPTS = ["a cat", "", "a dog", "cat dog a dog cat"]


@pytest.fixture(scope="module")
def clip():
  return ddss_tf.Clip(small_clip.backbone(), tokenizer=small_clip.tokenizer())


def drawn(count, height=small_clip.SIZE, width=small_clip.SIZE, channels=3, seed=0):
  return np.random.default_rng(seed).uniform(
      -1, 1, (count, height, width, channels)).astype(np.float32)


def cosines(clip, images, tokens):
  """float64 [images, texts], from the network's own pairs of logits."""
  pixels = ((0.5 * images + 0.5) - np.array(clip_lib.MEAN)) / np.array(clip_lib.STD)
  logits = clip.backbone({"images": tf.constant(pixels, tf.float32),
                          "token_ids": tf.constant(tokens)})["vision_logits"]
  scale = np.exp(float(clip.backbone.clip_head.logit_scale.numpy()))
  return logits.numpy().astype(np.float64) / scale


def test_score_is_the_cosine_in_percent_and_never_negative(clip):
  images, tokens = drawn(5), clip.tokens(PROMPTS)
  expected = cosines(clip, images, tokens)
  assert expected.min() < -0.05 and expected.max() > 0.3
  texts = clip.text_embeddings(tokens)
  np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, rtol=1e-5)
  for row in range(len(PROMPTS)):
    np.testing.assert_allclose(
        clip.scores(images, tf.repeat(texts[row:row + 1], 5, axis=0)),
        np.maximum(100 * expected[:, row], 0), atol=2e-4)


def test_tokens_are_those_of_the_words(clip):
  start, end = small_clip.START, small_clip.END
  expected = [[start, 4, 7, end, 0, 0, 0],   # a</w> cat</w>
              [start, end, 0, 0, 0, 0, 0],
              [start, 4, 13, end, 0, 0, 0],
              [start, 7, 13, 4, 13, 7, end]]  # The longest that fits.
  np.testing.assert_array_equal(clip.tokens(PROMPTS), expected)
  np.testing.assert_array_equal(clip.tokens(["A  Cat", "cat dog a dog cat cat"]),
                                [expected[0], expected[3]])
  given = ddss_tf.Clip(clip.backbone, token_ids={
      "a cat": expected[0][:4], "a dog": np.array(expected[2])})
  np.testing.assert_array_equal(
      given.tokens(["a dog", "a cat"]), [expected[2], expected[0]])
  with pytest.raises(UserError, match="of all 2 prompts.*'a pig', and 1 lost"):
    given.tokens(["a cat", "a pig"])


@pytest.mark.parametrize("bad", [
    [14, 99, 15], [14, -1, 15], [14, 0.5, 15], [], [[14, 15]], [15] * 8, "ab"])
def test_tokens_that_mean_nothing(clip, bad):
  given = ddss_tf.Clip(clip.backbone, token_ids={"a cat": bad})
  with pytest.raises(UserError, match="1 to 7 whole numbers from 0 to 15"):
    given.tokens(["a cat"])


@pytest.mark.parametrize("height,width", [(8, 8), (5, 5), (24, 24), (13, 30), (31, 9)])
def test_preprocessing_is_pillows(clip, height, width):
  # Of a tall image Pillow resizes the height first, which differs where the cubic
  # overshoots the range. So these do not reach it.
  least, most = (0, 256) if height <= width else (90, 166)
  pixels = np.random.default_rng(1).integers(
      least, most, (height, width, 3), np.uint8)
  shorter = min(height, width)
  high, wide = 8 * height // shorter, 8 * width // shorter
  top, left = (high - 8) // 2, (wide - 8) // 2
  with Image.fromarray(pixels) as image:
    expected = np.asarray(image.resize((wide, high), Image.Resampling.BICUBIC))
  seen = clip.preprocessed(pixels[None] / np.float32(127.5) - 1)[0]
  assert seen.shape == (8, 8, 3)
  seen = 255 * (seen * np.array(clip_lib.STD) + np.array(clip_lib.MEAN))
  # Pillow rounds to bytes after each of two passes.
  np.testing.assert_allclose(
      seen, expected[top:top + 8, left:left + 8].astype(float), atol=1.5)


def test_grey_is_colour_and_values_are_clipped(clip):
  grey = drawn(2, channels=1)
  np.testing.assert_array_equal(
      clip.preprocessed(grey), clip.preprocessed(np.repeat(grey, 3, -1)))
  wild = 3 * drawn(2)
  np.testing.assert_allclose(
      clip.preprocessed(wild), clip.preprocessed(np.clip(wild, -1, 1)), atol=1e-6)
  for shape in ((2, 8, 8, 2), (8, 8, 3)):
    with pytest.raises(UserError, match=r"\[B, H, W, 1 or 3\]"):
      clip.preprocessed(np.zeros(shape, np.float32))


@pytest.mark.slow
def test_gradient_under_xla_is_the_slope(clip):
  images = tf.constant(0.9 * drawn(3, 12, 10))
  # Each for the direction at 45 degrees to its own, where the slope is large.
  own = clip.image_embeddings(images)
  across = tf.math.l2_normalize(
      tf.constant(np.random.default_rng(2).standard_normal(own.shape), tf.float32)
      - own, axis=-1)
  texts = tf.math.l2_normalize(own + across, axis=-1)

  def score(images):
    return tf.reduce_mean(clip.scores(images, texts))

  @tf.function(jit_compile=True)
  def gradient(images):
    with tf.GradientTape() as tape:
      tape.watch(images)
      value = score(images)
    return value, tape.gradient(value, images)

  value, slope = gradient(images)
  assert 0 < value < 100
  np.testing.assert_allclose(value, score(images), rtol=1e-4)
  direction = tf.constant(drawn(3, 12, 10, seed=3))
  step = 1e-3
  difference = (score(images + step * direction)
                - score(images - step * direction)) / (2 * step)
  expected = float(tf.reduce_sum(slope * direction))
  assert abs(expected) > 0.1
  np.testing.assert_allclose(difference, expected, rtol=2e-2)


def denoiser(prompts=PROMPTS, **options):
  """A network of 4 x 4 Gaussian images, whose mean a row of the table tells."""
  inputs = [keras.Input(conditional_parts.SHAPE), keras.Input(()),
            keras.Input((1,), name="context")]

  @keras.saving.register_keras_serializable(package="tests_clip")
  class MeanEps(keras.layers.Layer):

    def call(self, x_t, t, context):
      alpha_t, sigma_t = ddss_tf.make_schedule("linear", 1000).alpha_sigma(t)
      alpha_t, sigma_t = (
          value[:, None, None, None] for value in (alpha_t, sigma_t))
      return sigma_t * (x_t - alpha_t * context[:, :, None, None]) / (
          (alpha_t * conditional_parts.STD) ** 2 + sigma_t**2)

  return denoiser_lib.Denoiser(
      keras.Model(inputs, MeanEps()(*inputs)), ddss_tf.make_schedule("linear", 1000),
      name="prompts", conditions=("context",), table=ddss_tf.ConditionTable(
          {"context": conditional_parts.MEANS[:, None]}, prompts, **options))


@pytest.fixture(scope="module")
def parts():
  return {**gaussian_parts.make(), "denoiser": denoiser(weights=[4, 0, 2, 1])}


def evaluator(parts, folder, clip, batch_size=8, **options):
  return evaluator_lib.Evaluator(
      run_dir_lib.RunDir(str(folder)), **parts, batch_size=batch_size,
      jit_compile=False, clip=clip, **options)


def sampler(parts):
  return sampler_lib.SolverSampler(parts["denoiser"].schedule, 2, "ddpm")


def record(parts, *args, **options):
  return evaluator(parts, *args, **options).record(sampler(parts), 32)


@pytest.mark.slow
def test_an_image_is_scored_for_the_prompt_it_was_drawn_with(parts, clip, tmp_path):
  measures = evaluator(parts, tmp_path / "a", clip, seed=5)
  found = measures.record(sampler(parts), 32)
  images = measures.images(sampler(parts), 32)
  # The rows by their images: means of rows are 2 deviations apart or more, and an
  # image has 16 pixels.
  rows = np.argmin(np.abs(images.mean((1, 2, 3))[:, None] - conditional_parts.MEANS),
                   axis=1)
  assert set(rows) == {0, 2, 3}
  pixels = np.clip(np.round(127.5 * images + 127.5), 0, 255).astype(np.uint8)
  seen = np.stack([np.asarray(Image.fromarray(image[..., 0]).resize(
      (8, 8), Image.Resampling.BICUBIC)) for image in pixels])
  pairs = cosines(clip, np.repeat(seen[..., None], 3, -1) / 127.5 - 1,
                  clip.tokens(PROMPTS))
  expected = np.mean(np.maximum(100 * pairs[np.arange(32), rows], 0))
  # Bytes that Pillow rounds move a score by a hundredth or so.
  np.testing.assert_allclose(found["clip_score"], expected, atol=0.1)
  other = np.mean(np.maximum(100 * pairs[np.arange(32), np.roll(rows, 1)], 0))
  assert abs(other - expected) > 0.4
  # With other prompts on the same rows the images are what they were; and each
  # has its own prompt whatever the batches are.
  order = np.array([3, 1, 0, 2])
  permuted = {**parts, "denoiser": denoiser(
      [PROMPTS[i] for i in order], weights=[4, 0, 2, 1])}
  changed = record(permuted, tmp_path / "b", clip, batch_size=7, seed=5)
  assert changed["fid"] == pytest.approx(found["fid"], rel=1e-5)
  expected = np.mean(np.maximum(100 * pairs[np.arange(32), order[rows]], 0))
  np.testing.assert_allclose(changed["clip_score"], expected, atol=0.1)
  assert abs(changed["clip_score"] - found["clip_score"]) > 1
  assert changed["clip"]["token_ids"] != found["clip"]["token_ids"]


@pytest.mark.slow
def test_record_says_what_was_measured(parts, clip, tmp_path):
  plain = record(parts, tmp_path, None)
  assert not {"clip", "clip_score"} & set(plain)
  found = record(parts, tmp_path, clip)
  assert found["num_samples"] == 32 and found["seed"] == 1234
  assert found["clip"]["sha256"] == clip.sha256
  for word in ("bicubic", "8x8", "mean (0.481455, 0.457828, 0.408211)",
               "std (0.26863, 0.261303, 0.275777)", "7 tokens"):
    assert word in found["clip"]["protocol"]
  assert found["fid"] == plain["fid"]
  with open(tmp_path / "metrics.json", encoding="utf-8") as f:
    assert json.load(f) == [plain, found]
  # Known records are not measured again.
  assert record(parts, tmp_path, clip) == found
  # Other weights are another network; another activation, too.
  assert ddss_tf.Clip(small_clip.backbone(2), tokenizer=small_clip.tokenizer()
                      ).sha256 != clip.sha256
  # In the table beside FID, as a mean over seeds; the report tells the same.
  records = [found, {**found, "seed": 1, "clip_score": 2 + found["clip_score"]}]
  head, _, line = (
      [cell.strip() for cell in row.split("|")]
      for row in records_lib.table(records).splitlines())
  assert head[3:7] == ["FID-32", "FID-32 held-out", "CLIP", "KID"]
  assert line[5] == f"{1 + found['clip_score']:.2f} ± 1.41"
  assert "CLIP" not in records_lib.table([plain])
  assert records_lib.condition_key(plain) != records_lib.condition_key(found)
  for bad in ({"clip": "b"}, {"clip_score": "high"}, {"clip": {}}):
    with pytest.raises(ValueError, match="'clip' of a record"):
      records_lib.check({**found, **bad})


def test_evaluate_reports_it(parts, clip, tmp_path):
  (found,) = ddss_tf.evaluate(
      str(tmp_path), **parts, baselines=["ddim linear"], num_steps=2, num_samples=12,
      jit_compile=False, clip=clip)
  assert found["clip_score"] > 0
  with open(report.report(str(tmp_path)), encoding="utf-8") as f:
    text = f.read()
  assert '<th scope="col">CLIP</th>' in text and clip.sha256 in text
  assert f">{found['clip_score']:.2f}</data></td>" in text


@pytest.mark.slow
def test_compare_scores_rows_but_not_the_choice_of_strides(parts, clip, tmp_path):
  records = ddss_tf.compare(
      str(tmp_path), **parts, num_steps=[2], solvers=["ddim"], strides=["linear"],
      families=[], num_samples=12, stride_samples=16, jit_compile=False, clip=clip,
      rounding=False)
  assert all(found["clip_score"] > 0 for found in records)
  assert all("not rounded" in found["clip"]["protocol"] for found in records)
  with open(tmp_path / "strides" / "metrics.json", encoding="utf-8") as f:
    assert not any("clip" in found for found in json.load(f))
  with open(tmp_path / "table.md", encoding="utf-8") as f:
    assert "| CLIP" in f.readline()


def test_an_image_that_is_not_finite_has_no_score(parts, clip):
  score = clip_lib.PromptScores(clip, parts["denoiser"])
  batch = drawn(4, 4, 4, 1)
  batch[2, 0, 0, 0] = np.nan
  rows = np.array([0, 1, 2, 3])
  reference = evaluator_lib.reference_lib.reference(
      parts["features"], parts["dataset"], quantise=True, cache_dir=None)

  class Fixed:

    def numpy(self):
      return batch

  values = evaluator_lib._measure(  # pylint: disable=protected-access
      [batch], [parts["features"]], [reference],
      evaluator_lib.heldout_lib.HeldoutMeasures((), []), 4, "some", True,
      lambda images, start: score(images, rows[start:start + len(images)]))
  assert values["clip_score"] is None and values["fid"] is None


@pytest.mark.parametrize("make,received", [
    (lambda: ddss_tf.gaussian_denoiser((4, 4, 1)), "no table"),
    (conditional_parts.make, "4 classes"),
    (lambda: denoiser(None), "a table without prompts")])
def test_a_denoiser_without_prompts_is_refused(parts, clip, tmp_path, make, received):
  with pytest.raises(UserError, match=f"needs prompts.*{received}") as error:
    record({**parts, "denoiser": make()}, tmp_path, clip)
  assert "\n" not in str(error.value)
  assert not os.path.exists(tmp_path / "metrics.json")


def test_what_is_no_clip_is_refused(parts, clip, tmp_path):
  with pytest.raises(UserError, match="what load_clip gives. Received: str"):
    record(parts, tmp_path, "clip")
  network = clip.backbone
  with pytest.raises(UserError, match="CLIPBackbone.*Received: Functional"):
    ddss_tf.Clip(parts["denoiser"].model, token_ids={})
  with pytest.raises(UserError, match="Received: neither"):
    ddss_tf.Clip(network)
  with pytest.raises(UserError, match="Received: both"):
    ddss_tf.Clip(network, tokenizer=small_clip.tokenizer(), token_ids={})
  for rules, words in (({"std": (1, 1, 0)}, "above 0"), ({"std": (1, 1)}, "three"),
                       ({"mean": "grey"}, "three"), ({"mean": (1, 2, np.nan)}, "three")):
    with pytest.raises(UserError, match=words):
      ddss_tf.Clip(network, token_ids={}, **rules)
  broken = small_clip.backbone()
  broken.weights[0].assign(np.nan * broken.weights[0])
  with pytest.raises(UserError, match="finite weights"):
    ddss_tf.Clip(broken, token_ids={})


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
  """The folder of a preset with a tokenizer and an image converter."""
  folder = tmp_path_factory.mktemp("presets") / "tiny_clip"
  small_clip.backbone().save_to_preset(str(folder))
  small_clip.tokenizer().save_to_preset(str(folder))
  keras_hub.layers.CLIPImageConverter(
      image_size=(8, 8), scale=[1 / 255 / s for s in (0.5, 0.25, 0.2)],
      offset=[-0.1 / 0.5, -0.2 / 0.25, -0.3 / 0.2]).save_to_preset(str(folder))
  return folder


def test_a_preset_is_loaded_whole(preset, clip):
  loaded = ddss_tf.load_clip(str(preset))
  assert loaded.name == "tiny_clip" and loaded.sha256 == clip.sha256
  assert not loaded.backbone.trainable_variables
  assert not any(v.value.trainable for v in loaded.backbone.variables)
  np.testing.assert_array_equal(loaded.tokens(PROMPTS), clip.tokens(PROMPTS))
  images = drawn(2)
  np.testing.assert_allclose(
      loaded.preprocessed(images),
      ((0.5 * images + 0.5) - [0.1, 0.2, 0.3]) / [0.5, 0.25, 0.2], atol=1e-5)
  assert "mean (0.1, 0.2, 0.3), std (0.5, 0.25, 0.2)" in loaded.protocol
  assert loaded.key != clip.key  # It sees images otherwise.


def test_a_preset_without_a_tokenizer_takes_tokens(clip, bind, tmp_path):
  folder = tmp_path / "bare"
  small_clip.backbone().save_to_preset(str(folder))
  with pytest.raises(UserError, match="load_clip.token_ids.*Received: neither"):
    ddss_tf.load_clip(str(folder))
  np.savez(tmp_path / "tokens.npz", prompts=np.array(PROMPTS),
           token_ids=clip.tokens(PROMPTS)[:, :6])
  bind(f"load_clip.path = '{folder}'\n"
       f"load_clip.token_ids = '{tmp_path}/tokens.npz'")
  loaded = gin.get_configurable("load_clip")()
  np.testing.assert_array_equal(
      loaded.tokens(PROMPTS[2::-1]), clip.tokens(PROMPTS[2::-1]))
  assert loaded.key == clip.key


def test_damaged_presets_and_tokens_are_refused(preset, tmp_path):
  def refusal(path, *words, **options):
    with pytest.raises(UserError) as error:
      ddss_tf.load_clip(str(path), **options)
    text = str(error.value)
    assert "\n" not in text
    for word in words:
      assert word in text, text

  refusal(tmp_path / "lost", "whole preset of KerasHub's CLIPBackbone", "lost")
  shutil.copytree(preset, tmp_path / "cut")
  os.remove(tmp_path / "cut" / "model.weights.h5")
  refusal(tmp_path / "cut", "whole preset", "cut")
  (tmp_path / "cut" / "config.json").write_text("{")
  refusal(tmp_path / "cut", "whole preset")
  folder = tmp_path / "words"
  shutil.copytree(preset, folder)
  tokens = str(tmp_path / "tokens.npz")
  np.savez(tokens, prompts=np.array(["a"]), token_ids=np.array([[14, 15]]))
  refusal(folder, "or else tokens", "both", token_ids=tokens)
  os.remove(folder / "assets" / "tokenizer" / "vocabulary.json")
  refusal(folder, "whole preset")
  os.remove(folder / "tokenizer.json")
  ddss_tf.load_clip(str(folder), tokens)
  for arrays in ({"prompts": np.array(["a"])},
                 {"prompts": np.array(["a"]), "token_ids": np.array([14, 15])},
                 {"prompts": np.array(["a"]), "token_ids": np.array([[1.5]])},
                 {"prompts": np.array([1]), "token_ids": np.array([[14, 15]])},
                 {"prompts": np.array(["a", "b"]), "token_ids": np.array([[15]])}):
    np.savez(tokens, **arrays)
    refusal(folder, "prompts, texts [N], and token_ids", token_ids=tokens)
  refusal(folder, "prompts, texts [N]", token_ids=str(tmp_path / "none.npz"))


def test_the_command_line_refuses_it_before_it_begins(
    preset, gaussian_config, main_in_process, tmp_path, capsys):
  file = os.path.join(ROOT, "gin_configs", "features", "clip.gin")
  with pytest.raises(SystemExit):
    main_in_process([
        "--mode=evaluate", f"--gin_file={gaussian_config}", f"--gin_file={file}",
        f"--gin_param=load_clip.path = '{preset}'", f"--run_dir={tmp_path}/run"])
  assert "error: the CLIP score needs prompts" in capsys.readouterr().err
  assert not os.path.exists(tmp_path / "run")


def test_without_keras_hub(monkeypatch):
  monkeypatch.setitem(sys.modules, "keras_hub", None)
  with pytest.raises(UserError, match=r"pip install ddss_tf\[kerashub\]"):
    ddss_tf.load_clip("clip_vit_base_patch32")
