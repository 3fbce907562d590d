"""Tests of the baselines of an evaluation, which may be given by name."""

import functools
import os
import shutil

import numpy as np
import pytest

import ddss_tf
from ddss_tf.evaluation import baselines as baselines_lib
from ddss_tf.runs import run_dir as run_dir_lib
from ddss_tf.samplers import card
from ddss_tf.samplers import families
from ddss_tf.samplers import solvers
from ddss_tf.errors import UserError
from ddss_tf.samplers.strides import STRIDES

SCHEDULE = ddss_tf.make_schedule("linear", 1000)


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_a_name_is_a_solver_on_a_stride(solver):
  for stride in STRIDES:
    named = baselines_lib.make_baseline(f"{solver} {stride}", SCHEDULE, 5)
    made = families.make_sampler(
        SCHEDULE, family=solver, num_steps=5, stride=stride)
    assert named.label == made.label and named.label.endswith(f" {stride}")
    for name, a, b in zip(made.coefficients()._fields, named.coefficients(),
                          made.coefficients()):
      np.testing.assert_array_equal(a, b, err_msg=name)


def test_samplers_and_functions_are_taken():
  make = functools.partial(families.make_sampler, family="ddpm", num_steps=3)
  sampler = make(SCHEDULE)
  assert baselines_lib.make_baseline(sampler, SCHEDULE, None) is sampler
  made = baselines_lib.make_baseline(make, SCHEDULE, 7)
  assert (made.label, made.num_steps) == ("DDPM linear", 3)


@pytest.mark.parametrize("baselines,words", [
    (["ddim"], "'ddim'"), (["ddim  linear"], "'ddim  linear'"),
    (["linear ddim"], "'linear ddim'"), (["ddim linear "], "'ddim linear '"),
    (["ddim linear", "magic linear"], "'magic linear'"),
    ([None], "None"), ("ddim linear", "must be a list.*'ddim linear'")])
def test_other_names_are_refused(gaussian_parts, tmp_path, baselines, words):
  with pytest.raises(UserError, match=words):
    ddss_tf.evaluate(str(tmp_path / "run"), **gaussian_parts,
                     baselines=baselines, num_samples=8)
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_k_is_that_of_the_searched_sampler(gaussian_parts, tmp_path):
  denoiser = gaussian_parts["denoiser"]
  options = dict(baselines=["ddim linear", "dpm++2m trailing"], num_samples=8,
                 jit_compile=False)
  with pytest.raises(UserError, match="'ddim linear' takes K from .* none"):
    ddss_tf.evaluate(str(tmp_path), **gaussian_parts, **options)
  alone = ddss_tf.evaluate(str(tmp_path), **gaussian_parts, **options,
                           num_steps=2)
  assert [(record["sampler"], record["num_steps"]) for record in alone] == [
      ("DDIM linear", 2), ("DPM-Solver++(2M) trailing", 2)]
  card.write(str(tmp_path / "sampler.json"), card.SamplerCard(
      "GGDM", ddss_tf.solver_coefficients(
          denoiser.schedule, "ddim", 3).numpy(), denoiser.identity, {}))
  for num_steps, expected in ((None, 3), (4, 4)):
    records = ddss_tf.evaluate(str(tmp_path), **gaussian_parts, **options,
                               num_steps=num_steps)
    assert [(record["sampler"], record["num_steps"]) for record in records] == [
        ("DDIM linear", expected), ("DPM-Solver++(2M) trailing", expected),
        ("GGDM", 3)]


@pytest.mark.slow
def test_rows_by_default(parts, finished, tmp_path):
  """DDIM, the best solver known, and where the search began, which is DDPM."""
  run = str(tmp_path / "run")
  shutil.copytree(finished[0], run)
  options = dict(num_samples=16, jit_compile=False)
  records = ddss_tf.evaluate(run, **parts, **options)
  assert [record["sampler"] for record in records] == [
      "DDIM linear", "DPM-Solver++(3M) matched_linear", "DDPM linear",
      "GGDM+PRED+TIME"]
  assert {record["num_steps"] for record in records} == {3}
  with open(os.path.join(run, "report.html"), encoding="utf-8") as page:
    text = page.read()
  assert all(record["sampler"] in text for record in records)
  # The start is that of the card: of another one nothing can be told.
  start = baselines_lib.rows(
      ["start"], run_dir_lib.RunDir(run), parts["denoiser"], 3, None)
  np.testing.assert_array_equal(
      start[0][0].coefficients().times, ddss_tf.make_sampler(
          parts["denoiser"].schedule, "ddpm", 3).coefficients().times)

  before = {name: (tmp_path / "run" / name).read_bytes()
            for name in ("samples.png", "sampler.json")}
  other = tmp_path / "mine.json"
  card.write(str(other), card.SamplerCard(
      "GGDM+PRED+TIME", ddss_tf.solver_coefficients(
          parts["denoiser"].schedule, "ddim", 3).numpy(),
      parts["denoiser"].identity, {}))
  records = ddss_tf.evaluate(
      run, **parts, **options, sampler=str(other), baselines=[str(other), "best"])
  assert [record["sampler"] for record in records] == [
      "DPM-Solver++(3M) matched_linear", "GGDM+PRED+TIME (mine)"]
  assert before == {name: (tmp_path / "run" / name).read_bytes()
                    for name in before}
  assert (tmp_path / "run" / "samples_mine.png").exists()
  with open(os.path.join(run, "report.html"), encoding="utf-8") as page:
    text = page.read()
  # The run's own row is still there, and the other has its name.
  assert "GGDM+PRED+TIME (mine)" in text and "replaced since" not in text
