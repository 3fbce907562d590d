"""Tests of the comparison on a Gaussian data set."""

import contextlib
import csv
import functools
import json
import os
import re
import shutil

import gin
import numpy as np
import pytest
import tensorflow as tf

import ddss_tf
from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.evaluation import evaluate as evaluate_lib
from ddss_tf.evaluation import evaluator as evaluator_lib
from ddss_tf.reporting import comparison
from ddss_tf.runs import fingerprint
from ddss_tf.runs import records as records_lib
from ddss_tf.runs import run_dir
from ddss_tf.samplers import card
from ddss_tf.samplers import generator as generator_lib
from ddss_tf.searching import loop
from ddss_tf.errors import UserError
from ddss_tf.reporting.published import Published


@pytest.fixture(scope="module")
def arguments(gaussian_parts):
  return dict(
      **gaussian_parts, heldout_features=gaussian_parts["features"],
      num_steps=[3], solvers=("ddpm", "ddim", "dpm++2m"),
      strides=("linear", "quadratic", "karras"),
      families=("rddim", "ggdm+pred", "ggdm+pred+time"), num_samples=200,
      stride_samples=64, batch_size=100, jit_compile=False)


@contextlib.contextmanager
def searches_of(**bindings):
  """Binds options of `search`, which a comparison leaves to gin."""
  assert ddss_tf.search  # Imported, so that gin knows it.
  with gin.unlock_config():
    for name, value in bindings.items():
      gin.bind_parameter(f"search.{name}", value)
  try:
    yield
  finally:
    gin.clear_config()


@pytest.fixture(scope="module")
def compared(arguments, tmp_path_factory):
  run = str(tmp_path_factory.mktemp("compared"))
  with searches_of(
      num_search_steps=4, batch_size=32, gradient_samples=16,
      validation_samples=64, start_samples=64, validate_every=2,
      control_variate=False):
    yield run, ddss_tf.compare(run, **arguments)


@pytest.mark.slow
def test_a_row_for_every_solver_and_family(compared):
  run, records = compared
  labels = [record["sampler"].split()[0] for record in records]
  assert labels == ["DDPM", "DDIM", "DPM-Solver++(2M)", "RDDIM", "GGDM+PRED",
                    "GGDM+PRED+TIME"]
  with open(os.path.join(run, "table.csv"), newline="") as f:
    rows = list(csv.DictReader(f))
  assert [row["sampler"] for row in rows] == [r["sampler"] for r in records]
  for row, record in zip(rows, records):
    # The columns of metrics.json, nested ones by name, with all digits.
    assert float(row["fid"]) == record["fid"]
    assert row["features.sha256"] == record["features"]["sha256"]
    flat = {key.split(".")[0] for key in row}
    assert flat == set(record)
  with open(os.path.join(run, "table.md")) as f:
    assert f.read() == records_lib.table(records) + "\n"


@pytest.mark.slow
def test_every_held_out_network_has_its_columns(compared, tmp_path):
  _, records = compared
  networks = [{**records[0]["features"], "name": name} for name in "aba"]
  several = [{**record, "features_heldout": networks,
              "fid_heldout": [1.5 + i, 2.5 + i, 3.5 + i],
              "coverage_heldout": [0.1, None, 0.3], "recall_heldout": [0.4, 0.5, 0.6],
              "sliced_wasserstein_heldout": [0.7, 0.8, 0.9]}
             for i, record in enumerate(records)]
  records_lib.write_table(str(tmp_path / "table"), several)
  with open(tmp_path / "table.csv", newline="") as f:
    rows = list(csv.DictReader(f))
  for row, record in zip(rows, several, strict=True):
    for i, (network, fid) in enumerate(zip(networks, record["fid_heldout"])):
      assert float(row[f"fid_heldout.{i}"]) == fid
      for key, value in network.items():
        assert row[f"features_heldout.{i}.{key}"] == value
  head, _, *lines = (tmp_path / "table.md").read_text().splitlines()
  names = ("held-out a", "held-out b", "held-out a (2)")
  assert [cell.strip() for cell in head.split("|")][3:17] == [
      "FID-200", *(f"{figure} {name}" for figure in (
          "FID-200", "coverage", "recall", "sliced W2²") for name in names), "KID"]
  for line, record in zip(lines, several, strict=True):
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[4:7] == [f"{fid:.2f}" for fid in record["fid_heldout"]]
    assert cells[7:13] == ["0.100", "-", "0.300", "0.400", "0.500", "0.600"]
  evaluate_lib._summarise(str(tmp_path / "events"), [*several, *records])
  (path,) = (tmp_path / "events").iterdir()
  scalars = {
      value.tag: float(tf.make_ndarray(value.tensor))
      for event in tf.compat.v1.train.summary_iterator(str(path))
      for value in event.summary.value}
  for record, one in zip(several, records):
    assert scalars[f"recall_heldout/b/{record['sampler']}"] == pytest.approx(0.5)
    assert f"coverage_heldout/b/{record['sampler']}" not in scalars
    for name, fid in zip(("a", "b", "a (2)"), record["fid_heldout"]):
      assert scalars[f"fid_heldout/{name}/{record['sampler']}"] == fid
    assert scalars[f"fid_heldout/{one['sampler']}"] == pytest.approx(
        one["fid_heldout"])


@pytest.mark.slow
def test_a_solver_is_shown_on_its_best_stride(arguments, compared):
  run, records = compared
  with open(os.path.join(run, "strides", "metrics.json")) as f:
    tried = json.load(f)
  for record in records[:3]:
    solver = record["sampler"].split()[0]
    all_strides = [r for r in tried if r["sampler"].split()[0] == solver]
    assert {r["num_samples"] for r in all_strides} == {16, 64}
    assert len([r for r in all_strides if r["num_samples"] == 16]) == 3
    final = [r for r in all_strides if r["num_samples"] == 64]
    assert len(final) == 2
    assert min(final, key=lambda r: r["fid"])["sampler"] == record["sampler"]
    # Chosen on other images than those of the table.
    assert all(r["seed"] != record["seed"] for r in tried)


def ranking_of(folder):
  """Where the search of a folder could start, the one it took first."""
  with open(os.path.join(folder, "starts.json")) as f:
    ranking = json.load(f)["ranking"]
  # The best with noise and the best without it, on more images.
  again = [entry["sha256"] for entry in ranking if entry["samples"] > 64]
  ranking = [entry for entry in ranking if entry["samples"] == 64]
  assert len(again) in (0, 2)
  ranking.sort(key=lambda entry: entry["sha256"] != again[0] if again else 0)
  return [(entry["start"].get("init", "default"), entry["start"].get("stride"),
           entry["distance"]) for entry in ranking]


def end_of(folder):
  with open(os.path.join(folder, "sampler.json")) as f:
    return json.load(f)["search"]["validation"]


@pytest.mark.slow
def test_a_larger_family_never_starts_worse(compared):
  run, _ = compared
  k3 = functools.partial(os.path.join, run, "k3")
  (other,) = [name for name in os.listdir(k3())
              if name.startswith("ggdm+pred-")]
  inside = {"rddim": [], "ggdm+pred": ["rddim"],
            # RDDIM is inside GGDM+PRED, which started there already.
            "ggdm+pred+time": ["ggdm+pred", other]}
  for family, smaller in inside.items():
    ranking = ranking_of(k3(family))
    ends = {init: distance for init, _, distance in ranking
            if init.startswith(run)}
    assert sorted(ends) == sorted(
        k3(name, "sampler.json") for name in smaller)
    for name in smaller:
      # The end of the smaller one, on the same images: start_samples =
      # validation_samples here.
      np.testing.assert_allclose(
          ends[k3(name, "sampler.json")], end_of(k3(name)), rtol=1e-4)
    assert end_of(k3(family)) <= ranking[0][-1] + 1e-4


@pytest.mark.slow
def test_the_first_multistep_family_is_searched_on_two_strides(compared):
  run, records = compared
  with open(os.path.join(run, "strides", "metrics.json")) as f:
    tried = {r["coefficients_sha256"]: r["fid"] for r in json.load(f)
             if r["num_samples"] == 64}
  (other,) = [name for name in os.listdir(os.path.join(run, "k3"))
              if name.startswith("ggdm+pred-")]
  folders = [os.path.join(run, "k3", name) for name in ("ggdm+pred", other)]
  best, second = (ranking_of(folder) for folder in folders)
  # The first ranks a solver beside the default, DDPM, DDIM and RDDIM's end.
  assert len(best) == 5
  ((init, stride, _),) = second
  assert init in ("ddpm", "ddim", "dpm++2m") and other.endswith(f"-{stride}")
  assert stride not in {stride for name, stride, _ in best if name == init}
  coefficients = [
      fingerprint.coefficients_sha256(
          card.read(os.path.join(folder, run_dir.SAMPLER)).coefficients)
      for folder in folders]
  # The row is the one that is better on the images by which strides are chosen.
  better = min(coefficients, key=tried.__getitem__)
  assert records[4]["sampler"] == "GGDM+PRED"
  assert records[4]["coefficients_sha256"] == better


@pytest.mark.slow
def test_samples_are_the_first_of_their_records(arguments, compared):
  run, records = compared
  with np.load(os.path.join(run, "samples.npz")) as arrays:
    images = dict(arrays)
  np.testing.assert_array_equal(
      images.pop("real images"),
      dataset_lib.to_uint8(arguments["dataset"].images[:8]))
  assert set(images) == {records_lib.sample_key(r) for r in records}
  denoiser = arguments["denoiser"]
  for record in records[:2]:  # DDPM adds noise, DDIM does not.
    solver, stride = record["sampler"].split()
    sampler = ddss_tf.SolverSampler(
        denoiser.schedule, 3, solver.lower(), stride)
    expected = dataset_lib.to_uint8(generator_lib.Generator(denoiser, 8, False).images(
        sampler.coefficients(), 8, record["seed"]))
    found = images[records_lib.sample_key(record)].astype(int)
    assert np.abs(found - expected).max() <= 1  # Rounded, another batch.


@pytest.mark.slow
def test_pictures_are_drawn_again_from_the_files(
    compared, tmp_path, monkeypatch):
  run, records = compared
  names = ["fid_by_steps.png", "quality_by_time.png", "samples_k3.png"]
  for name in ("samples.npz", *names):
    shutil.copy(os.path.join(run, name), tmp_path)
  before = [(tmp_path / name).read_bytes() for name in names]
  for name in names:
    (tmp_path / name).unlink()
  monkeypatch.setattr(evaluator_lib, "Evaluator", None)
  with open(os.path.join(run, "metrics.json")) as f:
    kept = {r["sampler"]: r for r in json.load(f)}
  again = [kept[r["sampler"]] for r in records]
  assert comparison.draw(str(tmp_path), again) == names
  assert [(tmp_path / name).read_bytes() for name in names] == before

  # Some rows' samples, by name, and the other pictures as they were.
  label = records[1]["sampler"]
  assert comparison.draw(str(tmp_path), again[1:2]) == names
  of_one = (tmp_path / names[2]).read_bytes()
  assert of_one != before[2]
  for shown in ([label], [label.split()[0]]):
    assert comparison.draw(str(tmp_path), again, shown) == names
    assert [(tmp_path / name).read_bytes() for name in names] == [
        *before[:2], of_one]
  for shown, word in ((["DPM"], "'DPM'"), (label, "list")):
    with pytest.raises(UserError, match=word):
      comparison.draw(str(tmp_path), again, shown)


@pytest.mark.slow
def test_a_record_without_time_is_timed(arguments, compared, tmp_path,
                                        monkeypatch):
  run, records = compared
  old = [{**r, "timing": None} for r in records]
  with open(tmp_path / "metrics.json", "w") as f:
    json.dump(old, f)
  evaluator = evaluator_lib.Evaluator(
      run_dir.RunDir(str(tmp_path), os.path.join(run, "cache")),
      arguments["denoiser"], arguments["dataset"], arguments["features"],
      arguments["heldout_features"], batch_size=100, jit_compile=False)
  monkeypatch.setattr(evaluator_lib, "_measure", None)
  solver, stride = records[1]["sampler"].split()
  sampler = ddss_tf.SolverSampler(
      arguments["denoiser"].schedule, 3, solver.lower(), stride)
  timed = evaluator.timed_record(sampler, 200)
  assert timed["fid"] == records[1]["fid"]
  assert timed["timing"]["seconds_per_image"] > 0
  with open(tmp_path / "metrics.json") as f:
    assert timed in json.load(f)


@pytest.mark.slow
def test_called_again_it_measures_nothing(
    arguments, compared, monkeypatch, capsys):
  run, records = compared
  monkeypatch.setattr(evaluator_lib, "_measure", None)
  monkeypatch.setattr(loop.Search, "advance", None)
  monkeypatch.setattr(evaluator_lib.Evaluator, "images", None)
  assert ddss_tf.compare(run, **arguments) == records
  # The bar counted the rows before there were any.
  assert re.search(rf"table: 100%.* {len(records)}/{len(records)} ",
                   capsys.readouterr().err)


@pytest.mark.slow
def test_cards_seeds_and_the_full_chain(arguments, compared, tmp_path):
  run, records = compared
  found = os.path.join(run, "k3", "rddim", "sampler.json")
  schedule = ddss_tf.NoiseSchedule(np.linspace(1e-4, 0.2, 120))
  other = ddss_tf.gaussian_denoiser(
      (4, 4, 1), mean=0.3, std=0.25, schedule=schedule)
  mine = str(tmp_path / "mine.json")
  card.write(mine, card.SamplerCard(
      "DDIM linear", ddss_tf.SolverSampler(schedule, 2, "ddim").coefficients(),
      other.identity, {}, None))
  bare = {**arguments, "solvers": (), "families": (), "num_steps": ()}
  # The samplers of before are measured as they were, and with a second seed.
  again = ddss_tf.compare(
      run, **{**bare, "cards": [found], "more_seeds": [7]})
  assert again[0] == records[3] and len(again) == 2
  assert again[1]["seed"] == 7 and again[1]["fid"] != again[0]["fid"]
  fids = [record["fid"] for record in again]
  (line,) = records_lib.table(again).splitlines()[2:]
  assert [cell.strip() for cell in line.split("|")[1:4]] == [
      "RDDIM", "3", f"{np.mean(fids):.2f} ± {np.std(fids, ddof=1):.2f}"]
  # What differs in more than its seed is no spread.
  head, _, *lines = records_lib.table([
      *again, {**again[0], "x0_bound": "clip"},
      {**again[0], "num_samples": 50_000}]).splitlines()
  cells = [[cell.strip() for cell in line.split("|")[1:-1]]
           for line in (head, *lines)]
  assert [row[0] for row in cells] == [
      "sampler", "RDDIM", "RDDIM, x0 bound: clip", "RDDIM"]
  count = str(again[0]["num_samples"])
  assert [row[2] for row in cells[2:]] == [f"{fids[0]:.2f}"] * 2
  assert cells[0][2] == "FID"
  assert [row[-1] for row in cells] == ["samples", count, count, "50000"]

  with pytest.raises(UserError, match="times must not exceed 120"):
    ddss_tf.compare(str(tmp_path / "a"), **{
        **bare, "denoiser": other, "cards": [found]})
  records = ddss_tf.compare(str(tmp_path / "b"), **{
      **bare, "denoiser": other, "solvers": ["ddim"], "strides": ["linear"],
      "num_steps": [2], "cards": [mine], "full_chain": True,
      "more_seeds": [7]})
  # The chain of all steps, which costs the most, with one seed only.
  assert [(r["sampler"], r["num_steps"], r["seed"]) for r in records] == [
      ("DDIM linear", 2, 1234), ("DDIM linear", 2, 7),
      ("DDIM linear (mine)", 2, 1234), ("DDIM linear (mine)", 2, 7),
      ("DDPM (full chain)", 120, 1234)]
  assert records[0]["fid"] == records[2]["fid"] > 5 * records[4]["fid"]


@pytest.mark.slow
def test_a_row_for_every_objective(arguments, tmp_path):
  with searches_of(num_search_steps=2, batch_size=16, pool_samples=32,
                   validation_samples=32, start_samples=32):
    records = ddss_tf.compare(str(tmp_path), **{
        **arguments, "solvers": ("ddim",), "strides": ("linear",),
        "families": ("ggdm",), "objectives": {
            "KID": "kid_linear", "ELBO": "elbo",
            "both": {"kid_linear": 1.0, "kid_cubic": 2.0}}})
  assert [r["sampler"] for r in records] == [
      "DDIM linear", "GGDM, KID", "GGDM, ELBO", "GGDM, both"]
  assert [r["objective"] for r in records] == [
      None, {"kid_linear": 1.0}, {"elbo": 1.0},
      {"kid_linear": 1.0, "kid_cubic": 2.0}]
  assert records[0]["search_seconds"] is None
  assert all(r["search_seconds"] > 0 for r in records[1:])
  # All from one start, at one rate.
  assert len({r["search_rate"] for r in records[1:]}) == 1
  for label in ("KID", "ELBO", "both"):
    with open(tmp_path / "k3" / "ggdm" / label / "sampler.json") as f:
      config = json.load(f)["search"]["config"]
    assert (config["init"], config["stride"]) == ("ddpm", None)
  # Three searches, three samplers.
  assert len({r["coefficients_sha256"] for r in records[1:]}) == 3
  with open(tmp_path / "table.md") as f:
    assert "| search, s " in f.read()


@pytest.mark.parametrize("changes,message", [
    (dict(solvers=["euler"]), "solvers must be out of ddpm.*'euler'"),
    (dict(strides=["cubic"]), "strides must be out of linear.*'cubic'"),
    (dict(families=["best"]), "families must be out of.*'best'"),
    (dict(cards=["nobody"]), "must be the path of a card, or one of.*'nobody'"),
    (dict(cards="mine.json"), "cards must be a list.*'mine.json'"),
    (dict(more_seeds=[3, 3]), r"must differ.*\[1234, 3, 3\]"),
    (dict(more_seeds=[-1]), "more_seeds must be .*Received: -1"),
    (dict(solvers=[], families=[]), "needs solvers, baselines or fam.*or cards"),
    (dict(objectives=["elbo"]), "objectives must be .* by label.*'elbo'"),
    (dict(objectives={"../a": "elbo"}), r"can name a folder.*'\.\./a'"),
    (dict(objectives={"/a": "elbo"}), "can name a folder.*'/a'"),
    (dict(objectives={"..": "elbo"}), r"can name a folder.*'\.\.'"),
    (dict(objectives={"a": "elbo", "b": "best"}),
     r"compare.objectives\['b'\]: objective must be out of.*'best'"),
    (dict(full_chain=["least"]), "full_chain must be out of post.*'least'"),
    (dict(full_chain="posterior"), "full_chain must be a list.*'posterior'"),
    (dict(full_chain=True, full_chain_steps=2000),
     "full_chain_steps: num_steps must be from 1 to 1000.*num_steps=2000"),
    (dict(full_chain_steps=0), "full_chain_steps must be.*Received: 0"),
    (dict(parameterisation="ours"), "parameterisation must be 'real' or 'pap.*"),
    (dict(baselines=["ddim"]), "compare.baselines must be .*'ddim'"),
    (dict(stride_samples=3), "stride_samples must be .* >= 16.*Received: 3"),
])
def test_bad_arguments(arguments, tmp_path, changes, message):
  with pytest.raises(UserError, match=message):
    ddss_tf.compare(str(tmp_path), **{**arguments, **changes})


@pytest.mark.slow
def test_published_figures_stand_beside_what_was_measured(
    arguments, tmp_path):
  """Baselines on their own strides, DDPM at many steps, and what is published."""
  published = Published("toys", "somebody", {
      ("ddim", "linear", 2): {"fid": 12.5, "inception_score": 3.25,
                              "source": "somebody", "note": ""},
      ("ddim", "linear", 3): {"fid": 7.0, "inception_score": None,
                              "source": "somebody", "note": ""},
      ("ggdm_pred", "", 3): {"fid": 9.0, "inception_score": None,
                             "source": "somebody", "note": ""},
      ("full_chain", "", 10): {"fid": 0.125, "inception_score": None,
                               "source": "somebody", "note": "told nowhere"}})
  records = ddss_tf.compare(str(tmp_path), **{
      **arguments, "solvers": (), "families": (), "num_steps": [2, 3],
      "baselines": ["ddim linear", "ddim trailing"], "published": published,
      "full_chain": ["posterior", "fixed_large"], "full_chain_steps": 10,
      "rounding": False})
  assert [(r["sampler"], r["num_steps"], (r["published"] or {}).get("fid"))
          for r in records] == [
      ("DDIM linear", 2, 12.5), ("DDIM trailing", 2, None),
      ("DDIM linear", 3, 7.0), ("DDIM trailing", 3, None),
      ("DDPM (10 of 1000 steps)", 10, 0.125),
      ("DDPM (10 of 1000 steps, fixed-large variance)", 10, 0.125)]
  head, _, *lines = (tmp_path / "table.md").read_text().splitlines()
  cells = [[cell.strip() for cell in line.split("|")[1:-1]]
           for line in (head, *lines)]
  assert cells[0][-2:] == ["FID, somebody", "IS, somebody"]
  assert [row[-2:] for row in cells[1:]] == [
      ["12.5", "3.25"], ["-", "-"], ["7", "-"], ["-", "-"], ["0.125", "-"],
      ["0.125", "-"]]
  # IS in one part and in ten.
  where = cells[0].index("IS in 10 parts")
  for row, record in zip(cells[1:], records):
    parts = record["inception_score_splits"]
    assert row[where - 1] == f"{record['inception_score']:.2f}"
    assert row[where] == (
        f"{parts['mean']:.2f} ± {records_lib.text(parts['std'])}")
    assert record["features"]["protocol"].endswith(", not rounded to bytes")
    assert "published.fid" in (tmp_path / "table.csv").read_text()
  # The same images without their rounding: near, not equal.
  (near,) = [r["fid"] for r in ddss_tf.compare(str(tmp_path), **{
      **arguments, "solvers": (), "families": (), "num_steps": [3],
      "baselines": [ddim_of_three_steps]})]
  assert near == pytest.approx(records[2]["fid"], rel=0.05)
  assert near != records[2]["fid"]
  # The best of each group at every K, many steps and real images.
  assert (tmp_path / "samples_over_k.png").stat().st_size > 0
  with pytest.raises(UserError, match="must take K = 2.*'DDIM linear', which ta"):
    ddss_tf.compare(str(tmp_path), **{
        **arguments, "solvers": (), "families": (), "num_steps": [2],
        "baselines": [ddim_of_three_steps]})


def ddim_of_three_steps(schedule):
  return ddss_tf.SolverSampler(schedule, 3, "ddim")


@pytest.mark.slow
def test_families_in_the_papers_form_start_at_ddim(
    arguments, tmp_path):
  with searches_of(num_search_steps=2, batch_size=16,
                       optimizer="adam", validation_samples=16, start_samples=64,
                       validate_every=2, control_variate=False):
    records = ddss_tf.compare(str(tmp_path), **{
        **arguments, "solvers": (), "families": ("vars+time", "ggdm+pred"),
        "parameterisation": "paper", "starts": "default"})
  assert [r["sampler"] for r in records] == ["VARS+TIME", "GGDM+PRED"]
  for family, start in (("vars+time", "ddpm"), ("ggdm+pred", "ddim")):
    with open(tmp_path / "k3" / family / "sampler.json") as f:
      found = json.load(f)
    assert found["search"]["config"]["parameterisation"] == "paper"
    solver = ddss_tf.SolverSampler(arguments["denoiser"].schedule, 3, start)
    ranking = ranking_of(str(tmp_path / "k3" / family))
    assert len(ranking) == 1 and ranking[0][0] == "default"
    with open(tmp_path / "k3" / family / "starts.json") as f:
      (entry,) = json.load(f)["ranking"]
    assert entry["sha256"] == fingerprint.coefficients_sha256(
        solver.coefficients().numpy())
