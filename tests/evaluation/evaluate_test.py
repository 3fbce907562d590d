"""The evaluation."""

import json
import os

import keras
import numpy as np
import pytest
import tensorflow as tf

from ddss_tf import metrics
from ddss_tf.evaluation import evaluator as evaluator_lib
from ddss_tf.features import network as network_lib
from ddss_tf.runs import records as records_lib
from ddss_tf.runs import run_dir
from ddss_tf.samplers import generator as generator_lib
from ddss_tf.samplers import sampler as sampler_lib
from ddss_tf.errors import UserError
from small_searches import SHAPE, check_picture, evaluate


def test_evaluation(parts, finished, monkeypatch):
  run, _ = finished
  records = evaluate(parts, run)
  assert [r["sampler"] for r in records] == [
      "DDPM linear", "DDIM linear", "GGDM+PRED+TIME"]
  for record in records:
    for key in ("num_steps", "fid", "kid", "kid_std", "inception_score",
                "fid_heldout", "num_samples", "num_real", "seed", "features",
                "denoiser", "dataset"):
      assert record[key] is not None, key
    assert record["denoiser"] == parts["denoiser"].identity
    assert record["dataset_sha256"] == parts["dataset"].sha256
    assert record["fid"] == pytest.approx(record["fid_heldout"])
    splits = record["inception_score_splits"]
    assert splits["splits"] == 10 and splits["std"] > 0
    # A split's score is lower, as its marginal is nearer to each sample's.
    assert 1 < splits["mean"] < record["inception_score"]
    assert "features pool, logits logits" in record["features"]["protocol"]
    # Of the second of three batches, as the first was compiled in its time.
    timing = record["timing"]
    assert timing["batch_size"] == 128 and "CPU core" in timing["device"]
    assert 0 < timing["seconds_per_image"] < 0.1
  with open(os.path.join(run, "metrics.json")) as f:
    assert json.load(f) == records
  check_picture(os.path.join(run, "samples.png"))
  # Another call measures nothing again, and says the same.
  monkeypatch.setattr(evaluator_lib, "_measure", None)
  assert evaluate(parts, run) == records
  # Other conditions do not take those rows.
  with pytest.raises(TypeError):
    evaluate(parts, run, seed=5)
  text = records_lib.table(records)
  assert text.count("\n") == 4 and "DDPM linear" in text
  head = [cell.strip() for cell in text.splitlines()[0].split("|")]
  assert f"FID-{records[0]['num_samples']}" in head
  full = records_lib.table([{**records[0], "num_samples": 50_000}])
  assert "| FID " in full and "FID-" not in full


def test_a_record_is_what_tf_gan_says_of_the_same_images(parts, tmp_path):
  """`features_sources_test.py` does so of a searched sampler and a SavedModel.

  There all images are of one class, and the Inception Score is 1.
  """
  denoiser, network = parts["denoiser"], parts["features"].model
  sampler = sampler_lib.SolverSampler(denoiser.schedule, 2, "ddpm")
  record = evaluator_lib.Evaluator(
      run_dir.RunDir(str(tmp_path)), **parts, batch_size=50,
      jit_compile=False).record(sampler, 100)
  generated = generator_lib.Generator(denoiser, 50, jit_compile=False).images(
      sampler.coefficients(), 100, record["seed"])
  (real, _), (fake, logits) = [
      network(np.clip(np.round(127.5 * images + 127.5), 0, 255).astype(
          np.uint8) / np.float32(127.5) - 1)
      for images in (parts["dataset"].images, generated)]
  tfgan = metrics._tfgan()  # TF-GAN's module itself.
  # Its blocks are consecutive rows; ours are dealt, by one generator each.
  dealt = [tf.gather(pool, np.random.default_rng(seed).permutation(len(pool)))
           for seed, pool in enumerate((real, fake))]
  kid, kid_std = tfgan.kernel_classifier_distance_and_std_from_activations(
      *dealt, max_block_size=len(real) // 2, dtype=tf.float64)
  for name, value in {
      "fid": tfgan.frechet_classifier_distance_from_activations(real, fake),
      "kid": kid, "kid_std": kid_std,
      "inception_score": tfgan.classifier_score_from_logits(logits)}.items():
    np.testing.assert_allclose(record[name], value, rtol=1e-5, err_msg=name)
    assert abs(record[name]) > 1e-3
  assert record["inception_score"] > 1.01


@pytest.mark.slow
def test_several_held_out_networks_are_measured_in_one_pass(
    parts, tmp_path, monkeypatch):
  denoiser = parts["denoiser"]
  networks = []
  for seed, width in ((1, 5), (2, 9), (3, 7)):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([
        keras.Input(SHAPE), keras.layers.Flatten(),
        keras.layers.Dense(width, activation="tanh", name="pool"),
        keras.layers.Dense(3, name="logits")])
    networks.append(network_lib.FeatureNetwork(model, f"of_{width}"))
  calls = tf.Variable(0)
  plain = denoiser.compiled_eps(False)

  @tf.function
  def counted(x_t, t):
    calls.assign_add(1)
    return plain(x_t, t)

  monkeypatch.setattr(type(denoiser), "compiled_eps", lambda *args: counted)
  sampler = sampler_lib.SolverSampler(denoiser.schedule, 2, "ddpm")

  def measure(folder, heldout, images=100):
    calls.assign(0)
    run = run_dir.RunDir(str(tmp_path / folder), str(tmp_path / "cache"))
    record = evaluator_lib.Evaluator(
        run, **parts, heldout_features=heldout, batch_size=50,
        jit_compile=False).record(sampler, 100)
    assert int(calls) == sampler.num_steps * images // 50
    return record

  together = measure("all", networks)
  alone = [measure(f"only{i}", network) for i, network in enumerate(networks)]
  of_heldout = [f"{name}_heldout" for name in (
      "fid", "coverage", "recall", "sliced_wasserstein")]
  same = lambda record: {key: value for key, value in record.items() if key
                         not in ("features_heldout", "timing", *of_heldout)}
  for i, record in enumerate(alone):
    assert record["features_heldout"] == together["features_heldout"][i]
    for key in of_heldout:
      assert record[key] == together[key][i]
    assert same(record) == same(together)
  assert alone[0]["fid_heldout"] != alone[1]["fid_heldout"] > 0
  # A list of one is that network: what is known of it is not measured again.
  assert measure("only0", networks[:1], images=0) == alone[0]
  assert measure("all", tuple(networks), images=0) == together
  # Other networks are.
  assert measure("all", networks[1:])["fid_heldout"] == together[
      "fid_heldout"][1:]
  none = measure("none", None)
  assert none["features_heldout"] is none["fid_heldout"] is None
  assert measure("none", [], images=0) == none and same(none) == same(together)


def test_evaluation_with_an_unknown_bound(parts, finished):
  with pytest.raises(UserError, match="evaluate.x0_bound.*'soft'"):
    evaluate(parts, finished[0], x0_bound="soft")
