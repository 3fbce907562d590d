"""Tests of `sampler.json` outside of the package, and of the zoo."""

import datetime
import json
import os
import re

import numpy as np
import pytest

import ddss_tf
from ddss_tf import storage
from ddss_tf import zoo
from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.runs import run_dir as run_dir_lib
from ddss_tf.samplers import card
from ddss_tf.samplers import chain
from ddss_tf.samplers import generator as generator_lib
from project import ROOT

GIN = os.path.join(ROOT, "gin_configs", "sample.gin")
DIGITS = "--gin_param=load_denoiser.path = 'digits16-ddpm'"
NAME = "digits16-ddpm-k5-ggdm+pred+time"


@pytest.fixture(scope="module")
def page_sample():
  """`sample` as the page has it."""
  with open(os.path.join(ROOT, "docs", "sampler_json.md")) as f:
    (code,) = re.findall(r"^```python\n(.*?)^```", f.read(), re.M | re.S)
  assert len(code.splitlines()) <= 35
  names = {}
  exec(code, names)  # pylint: disable=exec-used
  return names["sample"]


@pytest.mark.parametrize("family,num_steps,x0_bound", [
    ("ddpm", 10, None), ("ddpm", 3, "clip"), ("ddim", 1, None),
    ("unipc3-bh2", 6, "dynamic"), ("pndm", 5, None), ("zoo", 5, None)])
def test_the_page_replays_a_card(family, num_steps, x0_bound, page_sample,
                                 tmp_path):
  denoiser = ddss_tf.gaussian_denoiser((6, 6, 2), mean=0.4, std=0.6)
  cards = (zoo.list_cards().values() if family == "zoo" else [card.SamplerCard(
      family, ddss_tf.solver_coefficients(
          denoiser.schedule, family, num_steps).numpy(), {}, {})])
  compiled = denoiser.compiled_eps(jit_compile=False)
  eps = lambda x, t: compiled(x, np.full(len(x), t, np.float32)).numpy()
  for number, found in enumerate(cards):
    path = str(tmp_path / f"{number}.json")
    card.write(path, card.SamplerCard(
        found.label, found.coefficients, {}, {}, x0_bound))
    x_T, noise = chain.draw_noise(
        generator_lib.seed_pair(number), np.arange(3), (6, 6, 2),
        found.coefficients.num_steps)
    expected = chain.run_chain(
        compiled, found.coefficients, x_T, noise, x0_bound=x0_bound)
    np.testing.assert_allclose(
        page_sample(path, eps, x_T.numpy(), noise.numpy()), expected,
        atol=1e-4, err_msg=found.label)
    drawn = page_sample(path, eps, x_T.numpy(), rng=np.random.default_rng(0))
    changed = np.max(np.abs(drawn - expected.numpy()))
    if np.any(found.coefficients.noise_scales > 0.01):
      assert changed > 1e-3  # Noise of its own.
    elif not np.any(found.coefficients.noise_scales):
      assert changed < 1e-4


def test_the_page_names_every_field(tmp_path):
  with open(os.path.join(ROOT, "docs", "sampler_json.md")) as f:
    page = f.read()
  with open(zoo.find(NAME)) as f:
    values = json.load(f)
  for name in [*values, *values["coefficients"], *values["denoiser"]]:
    assert f"`{name}" in page or f".{name}`" in page, name


def test_the_zoo_of_the_package():
  denoiser = ddss_tf.load_denoiser("digits16-ddpm")
  cards = zoo.list_cards()
  assert {f"digits16-ddpm-k{steps}-ggdm+pred+time"
          for steps in (3, 5, 10, 20, 25)} < set(cards)
  for name, found in cards.items():
    assert found.denoiser == denoiser.identity
    steps = found.coefficients.num_steps
    assert name == f"digits16-ddpm-k{steps}-{found.family}"
    record = found.metrics[0]
    assert record["num_samples"] == 10000 and record["fid_heldout"]
    assert record["features"]["protocol"] and found.provenance["ddss_tf"]
    row = next(line for line in zoo.table().splitlines()
               if line.split()[0] == name)
    assert f"{record['fid']:.2f}" in row


def test_a_card_is_for_its_own_weights(main_in_process, tmp_path, capsys):
  def sample(run, *more):
    main_in_process([
        "--mode=sample", f"--sampler={NAME}", f"--run_dir={run}",
        "--gin_param=sample.denoiser = @gaussian_denoiser()",
        "--gin_param=sample.num_images = 2",
        "--gin_param=sample.jit_compile = False", *more])

  with pytest.raises(SystemExit) as ended:
    sample(tmp_path / "a")
  assert ended.value.code == 2
  (line,) = [line for line in capsys.readouterr().err.splitlines()
             if line.startswith("error: ")]
  for words in ("1d0f612d", "'gaussian' with None", "force = True"):
    assert words in line
  assert not os.path.exists(tmp_path / "a" / "generated.npz")
  sample(tmp_path / "b", "--gin_param=sample.force = True")
  with np.load(tmp_path / "b" / "generated.npz") as arrays:
    images = arrays["images"].astype(int)
  denoiser = ddss_tf.gaussian_denoiser()
  x_T, noise = chain.draw_noise(
      generator_lib.seed_pair(0), np.arange(2), denoiser.image_shape, 5)
  expected = dataset_lib.to_uint8(chain.run_chain(
      denoiser.eps, zoo.load(NAME).coefficients, x_T, noise))
  assert np.max(np.abs(images - expected)) <= 1 and np.std(images) > 5


@pytest.mark.parametrize("arguments,words", [
    (["--mode=sample", f"--gin_file={GIN}", DIGITS, "--sampler=lost"],
     ["'lost'", NAME]),
    (["--mode=search", f"--gin_file={GIN}", f"--sampler={NAME}"],
     ["--mode=evaluate|sample|export", "--mode=search"]),
    (["--mode=zoo"], ["folder of cards"]),
])
def test_bad_input(arguments, words, main_in_process, tmp_path, capsys):
  with pytest.raises(SystemExit) as ended:
    main_in_process([*arguments, f"--run_dir={tmp_path / 'run'}"])
  assert ended.value.code == 2
  error = capsys.readouterr().err
  assert all(word in error for word in words), error


def test_publishing_a_run(tmp_path):
  found = zoo.load(NAME)
  run, folder = str(tmp_path / "run"), str(tmp_path / "zoo")
  bare = card.SamplerCard(found.label, found.coefficients, found.denoiser,
                          found.search, found.x0_bound)
  card.write(os.path.join(run, run_dir_lib.SAMPLER), bare)
  with pytest.raises(ddss_tf.UserError, match="--mode=evaluate"):
    zoo.add(run, folder)
  other = {**found.metrics[0], "coefficients_sha256": "0" * 64}
  metrics = os.path.join(run, "metrics.json")
  storage.write_json(metrics, [other])
  with pytest.raises(ddss_tf.UserError, match="record of the coefficients"):
    zoo.add(run, folder)
  storage.write_json(metrics, [other, *found.metrics])
  path = zoo.add(run, folder, note="a note")
  assert path == os.path.join(folder, NAME + ".json")
  again = zoo.load(NAME, folder)
  for name, a, b in zip(found.coefficients._fields, found.coefficients,
                        again.coefficients):
    np.testing.assert_array_equal(a, b, err_msg=name)
  assert again.metrics == found.metrics
  day = datetime.date.fromisoformat(again.provenance.pop("published"))
  assert abs((datetime.date.today() - day).days) <= 1
  assert again.provenance == {"ddss_tf": ddss_tf.__version__, "note": "a note"}
  with pytest.raises(ddss_tf.UserError, match="file name"):
    zoo.add(run, folder, name="../up")
  # Of several held-out networks the table has all.
  record = found.metrics[0]
  several = {**record, "features_heldout": 2 * [record["features_heldout"]],
             "fid_heldout": [1.25, 3.5]}
  storage.write_json(metrics, [several])
  zoo.add(run, folder)
  assert " 1.25 / 3.50 " in zoo.table(folder)
  storage.write_json(metrics, [{**several, "fid_heldout": [1.25]}])
  with pytest.raises(ddss_tf.UserError, match="damaged"):
    zoo.load(os.path.basename(zoo.add(run, folder)).removesuffix(".json"), folder)
  storage.write_json(metrics, [several])
  zoo.add(run, folder)
  assert list(zoo.list_cards(folder)) == [NAME]


def test_a_search_may_start_at_a_name():
  found = zoo.load(NAME)
  schedule = ddss_tf.NoiseSchedule.linear()
  sampler = ddss_tf.make_sampler(
      schedule, "ggdm+pred+time", found.coefficients.num_steps, init=NAME)
  for name, a, b in zip(found.coefficients._fields, found.coefficients,
                        sampler.coefficients()):
    if a is not None:
      np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7, err_msg=name)
