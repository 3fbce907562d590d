"""Where a search starts."""

import functools
import itertools
import json
import os
import shutil

import numpy as np
import pytest

import ddss_tf
from ddss_tf.objectives import distances as distances_lib
from ddss_tf.objectives import elbo
from ddss_tf.runs import fingerprint
from ddss_tf.samplers import card
from ddss_tf.samplers import families
from ddss_tf.samplers import generator as generator_lib
from ddss_tf.samplers import solvers
from ddss_tf.samplers import strides
from ddss_tf.searching import parts as parts_lib
from ddss_tf.searching import starts
from ddss_tf.errors import UserError
from project import TESTDATA
from small_searches import options


@pytest.mark.slow
def test_automatic_start_takes_the_best_and_says_why(parts, tmp_path):
  run = str(tmp_path)
  arguments = options(
      sampler=functools.partial(
          families.make_sampler, family="ggdm+pred", num_steps=3, init="auto"),
      num_search_steps=1, batch_size=8, start_samples=64, validation_samples=64)
  sampler = ddss_tf.search(run_dir=run, **parts, **arguments)
  with open(os.path.join(run, "starts.json")) as f:
    ranking = json.load(f)["ranking"]
  tried = {tuple(entry["start"].values()) for entry in ranking}
  assert tried == set(itertools.product(solvers.SOLVERS, strides.STRIDES))
  # The best with noise and the best without it are there again, at the end.
  ranking, again = ranking[:-2], ranking[-2:]
  assert {entry["samples"] for entry in ranking} == {64}
  assert {entry["samples"] for entry in again} == {512}
  for entries in (ranking, again):
    distances = [entry["distance"] for entry in entries]
    assert distances == sorted(distances)
  for noisy in (True, False):
    first = next(entry["start"] for entry in ranking
                 if noisy == (entry["start"]["init"] == "ddpm"))
    assert first in [entry["start"] for entry in again]
  # The better of these is what the search began with, measured anew.
  config = card.read(os.path.join(run, "sampler.json")).search["config"]
  assert again[0]["start"] == {
      "init": config["init"], "stride": config["stride"]}
  generator = generator_lib.Generator(parts["denoiser"], 64, jit_compile=False)
  mean = parts["features"](parts["dataset"].images)["pool"].numpy().mean(0)

  def distance(solver, stride):
    c = solvers.solver_coefficients(
        parts["denoiser"].schedule, solver, 3, stride).numpy()
    pool = parts["features"](generator.images(c, 64, 1))["pool"]
    return float(distances_lib.kid_linear(pool, mean))

  for entry in (ranking[0], ranking[40], ranking[-1]):
    np.testing.assert_allclose(
        distance(*entry["start"].values()), entry["distance"],
        rtol=1e-3, atol=1e-3)
  # Called again it ranks nothing anew and goes on.
  again = ddss_tf.search(run_dir=run, **parts, **arguments)
  for a, b in zip(sampler.coefficients(), again.coefficients()):
    np.testing.assert_array_equal(a, b)
  # What is no candidate any more is not taken, however good.
  few = [entry["start"] for entry in (ranking[-2], ranking[-1])]
  other = ddss_tf.search(
      run_dir=run, **parts, **arguments, start_candidates=few, restart=True)
  config = other.get_config()
  assert {key: config[key] for key in ("init", "stride")} == few[0]


@pytest.mark.slow
def test_nothing_is_ranked_for_a_search_that_is_refused(
    parts, finished, tmp_path, monkeypatch):
  run = str(tmp_path / "run")
  shutil.copytree(finished[0], run)

  def search(family="ggdm+pred+time", **changes):
    return ddss_tf.search(run_dir=run, **parts, **options(
        sampler=functools.partial(
            families.make_sampler, family=family, num_steps=3, init="auto"),
        **changes))

  def ranked(*args, **kwargs):
    raise AssertionError("ranked")

  def dear(*args, **kwargs):
    raise AssertionError("dear")

  # Neither what is known of the real images nor a ranking comes first.
  monkeypatch.setattr(parts_lib.reference, "reference", dear)
  for changes, message in (
      (dict(family="ggdm"), r"another sampler: .*, or one of \d+ others"),
      (dict(start_candidates=[{"init": "ddim", "stride": "linear"}]),
       "another sampler: .*'init': 'ddpm'.*Received: .*'init': 'ddim'"),
      (dict(start_candidates=[{"init": "dd"}]), "'auto' must have a start"),
      (dict(start_candidates=[]), "start_candidates must be a list.*\\[\\]")):
    with pytest.raises(UserError, match=message):
      search(**changes)
    assert not os.path.exists(os.path.join(run, "starts.json"))
  # Where the earlier start is one of those, the ranking must tell.
  monkeypatch.undo()
  monkeypatch.setattr(starts, "choose", ranked)
  with pytest.raises(AssertionError, match="ranked"):
    search(start_candidates=[{"init": "ddim"}, {"init": "ddpm"}])
  with pytest.raises(AssertionError, match="ranked"):
    search(family="ggdm", restart=True)


@pytest.mark.quick("rddim-4")
@pytest.mark.parametrize("family,steps", [
    ("ggdm+pred", 4), ("ggdm+pred", 1), ("rddim", 4)])
def test_a_flow_tries_what_suits_it(
    parts, tmp_path, monkeypatch, family, steps):
  """Heun's method and the noise levels of its own schedulers."""
  found = []

  def choose(candidates, *args):
    found.extend(candidates)
    raise AssertionError("ranked")

  monkeypatch.setattr(starts, "choose", choose)
  flow = ddss_tf.make_schedule("flow", 1000, shift=3.0)
  parts = dict(parts, denoiser=ddss_tf.gaussian_denoiser(
      (4, 4, 1), schedule=flow))
  with pytest.raises(AssertionError, match="ranked"):
    ddss_tf.search(run_dir=str(tmp_path), **parts, **options(
        sampler=functools.partial(families.make_sampler, family=family,
                                  num_steps=steps, init="auto")))
  tried = {(start["init"], start["stride"]): sampler.start.numpy()
           for start, sampler in found}
  grids = {*strides.STRIDES, *strides.FLOW_STRIDES}
  names = {"ddim", "ddpm"} if family == "rddim" else set(solvers.ALL_SOLVERS)
  assert set(tried) == set(itertools.product(names, grids))
  if steps == 4:
    with np.load(os.path.join(TESTDATA, "latent_sd3", "golden.npz")) as own:
      np.testing.assert_allclose(
          1000 * flow.noise_level(tried["ddim", "flow-euler"].times),
          own["run_timesteps"], rtol=1e-6)
  if steps == 4 and family == "ggdm+pred":
    times = tried["heun", "trailing"].times
    assert times[1] == times[2] and len(set(times)) == 3
    assert ("unipc2-bh2", "trailing") in tried


def test_only_a_flow_tries_them():
  names, grids = (
      {start[key] for start in starts.suited(ddss_tf.make_schedule())}
      for key in ("init", "stride"))
  assert names == set(solvers.SOLVERS) and "heun" not in names
  assert grids == set(strides.STRIDES) and not grids & set(strides.FLOW_STRIDES)
  # The strides of flows that go with their shift only.
  flow = ddss_tf.make_schedule("flow", 1000, shift=0.5)
  found = starts.possible(functools.partial(
      families.make_sampler, flow, family="ggdm+pred", num_steps=4),
                          starts.suited(flow))
  assert {start["stride"] for start, _ in found} == {
      *strides.STRIDES, "flow-dynamic"}


def test_a_deterministic_start_has_no_bound(parts, tmp_path, monkeypatch):
  """And no call of the network is spent on it."""
  monkeypatch.setattr(elbo, "squares", None)
  with pytest.raises(UserError, match="no start with a finite distance"):
    ddss_tf.search(run_dir=str(tmp_path), **parts, **options(
        sampler=functools.partial(
            families.make_sampler, family="ggdm+pred", num_steps=3,
            init="auto"), objective="elbo", start_candidates=[
                {"init": "ddim", "stride": stride}
                for stride in strides.STRIDES]))


def test_starts_without_a_distance_come_last(parts, tmp_path):
  schedule = parts["denoiser"].schedule
  make = functools.partial(
      families.make_sampler, schedule, family="ggdm+pred", num_steps=3)
  path = str(tmp_path / "starts.json")
  candidates = [{"init": "ddim", "stride": "linear"},
                {"init": "ab2", "stride": "karras"},
                {"init": "ddim", "stride": "quadratic"}]
  values = iter([np.nan, 3.0, 2.0])
  candidates = starts.possible(make, candidates)
  choose = functools.partial(starts.choose, candidates)
  best = choose(lambda count: lambda c: next(values), 9, path, {"a": 1})
  assert (best.init, best._stride) == ("ddim", "quadratic")
  with open(path) as f:
    ranking = json.load(f)["ranking"]
  assert [entry["distance"] for entry in ranking] == [2.0, 3.0, None]
  # Other conditions, or another sampler in the same file, are ranked anew.
  values = iter([5.0, 4.0, 6.0])
  best = choose(lambda count: lambda c: next(values), 9, path, {"a": 2})
  assert best.init == "ab2"
  with pytest.raises(UserError, match="no start with a finite distance"):
    choose(lambda count: lambda c: np.inf, 9, path, {"a": 3})
  for content in ("[", '{"conditions": {"a": 3}, "ranking": [{"start": {}}]}'):
    (tmp_path / "starts.json").write_text(content)
    with pytest.raises(UserError, match="damaged.*Delete it"):
      choose(lambda count: lambda c: 1.0, 9, path, {"a": 3})


def test_a_noisy_start_is_compared_on_more_images(parts, tmp_path):
  """For few images tell only those apart that have their noise in common."""
  candidates = starts.possible(functools.partial(
      families.make_sampler, parts["denoiser"].schedule, family="ggdm",
      num_steps=3), [{"init": name, "stride": "linear"}
                     for name in ("ddpm", "ddim", "dpm++2m")])
  names = {fingerprint.coefficients_sha256(sampler.start.numpy()): start["init"]
           for start, sampler in candidates}
  values = {(9, "ddpm"): 1.0, (9, "dpm++2m"): 3.0, (9, "ddim"): 4.0,
            (72, "ddpm"): 0.9, (72, "dpm++2m"): 0.2}
  asked = []

  def distance(count):
    def of(coefficients):
      asked.append((count, names[fingerprint.coefficients_sha256(coefficients)]))
      return values[asked[-1]]
    return of

  choose = functools.partial(
      starts.choose, candidates, distance, 9, str(tmp_path / "starts.json"))
  assert choose({}).init == "dpm++2m"
  assert sorted(asked) == sorted(values)
  assert choose({}).init == "dpm++2m" and len(asked) == 5  # All is known.
  values[72, "ddpm"] = 0.1
  assert choose({"other": "conditions"}).init == "ddpm"
  # Without one that adds noise there is nothing to ask again.
  del asked[:]
  quiet = functools.partial(
      starts.choose, candidates[1:], distance, 9, str(tmp_path / "quiet.json"))
  assert quiet({}).init == "dpm++2m"
  assert sorted(asked) == [(9, "ddim"), (9, "dpm++2m")]


@pytest.mark.slow
def test_a_markov_family_ranks_only_what_it_holds(parts, tmp_path):
  ddss_tf.search(run_dir=str(tmp_path), **parts, **options(
      sampler=functools.partial(
          families.make_sampler, family="rddim", num_steps=3, init="auto"),
      num_search_steps=1, batch_size=8, start_samples=16,
      validation_samples=16))
  with open(os.path.join(str(tmp_path), "starts.json")) as f:
    tried = {entry["start"]["init"] for entry in json.load(f)["ranking"]}
  assert tried == {"ddpm", "ddim"}
