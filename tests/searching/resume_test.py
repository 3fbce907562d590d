"""Searches that were killed, terminated or damaged, and go on."""

import functools
import glob
import json
import os
import shutil
import signal

import keras
import numpy as np
import pytest

import ddss_tf
from ddss_tf.samplers import card
from ddss_tf.samplers import generator as generator_lib
from ddss_tf.searching import loop
from ddss_tf.searching import optimizer as optimizer_lib
from ddss_tf.searching import pools
from ddss_tf.searching import summaries
from ddss_tf.errors import Terminated, UserError
import gaussian_parts
from project import TESTDATA
from small_searches import die, events, interrupted, options, same_sampler


def test_killed_and_resumed_is_uninterrupted(
    parts, finished, tmp_path, monkeypatch):
  run = str(tmp_path)
  for at in (2, 7, 10):  # Before the first checkpoint, then between two.
    interrupted(run, parts, monkeypatch, at, die, KeyboardInterrupt)
  same_sampler(finished[1], ddss_tf.search(run_dir=run, **parts, **options()))
  # Nothing lost, nothing doubled.
  assert events(run) == events(finished[0])
  with open(os.path.join(run, "checkpoints", "ckpt-12.json")) as f:
    assert json.load(f)["seconds"] > 0


@pytest.mark.slow
def test_terminated_and_resumed_is_uninterrupted(
    parts, finished, tmp_path, monkeypatch):
  run = str(tmp_path)
  error = interrupted(
      run, parts, monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM),
      Terminated)
  assert "after step 6 of 12" in str(error) and "ckpt-6" in str(error)
  assert os.path.exists(os.path.join(run, "checkpoints", "ckpt-6.index"))
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  same_sampler(finished[1], ddss_tf.search(run_dir=run, **parts, **options()))
  assert events(run) == events(finished[0])


@pytest.mark.slow
@pytest.mark.parametrize("damage", [
    "truncated", *(pytest.param(damage, marks=pytest.mark.slow)
                   for damage in ("flipped", "list"))])
def test_a_damaged_checkpoint_falls_back(
    parts, finished, tmp_path, monkeypatch, caplog, damage):
  run = str(tmp_path)
  interrupted(run, parts, monkeypatch, 10, die, KeyboardInterrupt)
  folder = tmp_path / "checkpoints"
  if damage == "list":
    (folder / "checkpoint").write_text("nonsense {")
  else:
    (data_file,) = folder.glob("ckpt-8.data-*")
    content = bytearray(data_file.read_bytes())
    if damage == "truncated":
      content = content[:len(content) // 2]
    else:
      content[len(content) // 2] ^= 255
    data_file.write_bytes(content)
  same_sampler(finished[1], ddss_tf.search(run_dir=run, **parts, **options()))
  assert events(run) == events(finished[0])
  assert (folder / "ckpt-8.index.damaged").exists() == (damage != "list")
  assert ("ckpt-8 is damaged" in caplog.text) == (damage != "list")


@pytest.mark.slow
def test_checkpoints_that_are_all_damaged(parts, tmp_path, monkeypatch):
  interrupted(str(tmp_path), parts, monkeypatch, 10, die, KeyboardInterrupt)
  indices = sorted((tmp_path / "checkpoints").glob("*.index"))
  for path in indices:
    path.write_bytes(b"nonsense")
  with pytest.raises(UserError, match="must be readable.*ckpt-8, .*ckpt-4"):
    ddss_tf.search(run_dir=str(tmp_path), **parts, **options())
  assert sorted((tmp_path / "checkpoints").glob("*.index")) == indices


@pytest.mark.slow
def test_a_first_checkpoint_that_was_not_finished(
    parts, finished, tmp_path, monkeypatch):
  interrupted(str(tmp_path), parts, monkeypatch, 6, die, KeyboardInterrupt)
  # As SIGKILL leaves it before TensorFlow writes its list.
  (tmp_path / "checkpoints" / "checkpoint").unlink()
  (tmp_path / "checkpoints" / "ckpt-4.index").write_bytes(b"half")
  same_sampler(finished[1], ddss_tf.search(
      run_dir=str(tmp_path), **parts, **options()))
  assert events(str(tmp_path)) == events(finished[0])


def test_a_search_that_is_over_makes_nothing_again(
    parts, finished, monkeypatch):
  run, sampler = finished

  def contents():
    return {path: open(path, "rb").read() for path in glob.glob(
        os.path.join(run, "**"), recursive=True) if os.path.isfile(path)}

  def fail(*args, **kwargs):
    raise AssertionError("made again")

  before = contents()
  monkeypatch.setattr(pools, "views", fail)
  monkeypatch.setattr(generator_lib.Generator, "batches", fail)
  monkeypatch.setattr(optimizer_lib.MetricAdam, "begin", fail)
  same_sampler(sampler, ddss_tf.search(run_dir=run, **parts, **options()))
  assert contents() == before


@pytest.mark.slow
def test_a_sampler_that_was_searched_starts_anew(
    parts, finished, tmp_path, monkeypatch):
  """An object may be given twice, as in a notebook after an interruption."""
  _, expected = finished
  sampler = options()["sampler"](parts["denoiser"].schedule)
  searched = options(sampler=sampler)
  advance = loop.Search.advance

  def broken(self):
    if self.step == 10:
      die()
    return advance(self)

  run = str(tmp_path / "run")
  with monkeypatch.context() as patch:
    patch.setattr(loop.Search, "advance", broken)
    with pytest.raises(KeyboardInterrupt):
      ddss_tf.search(run_dir=run, **parts, **searched)
  # From its checkpoint; and, the third time, from the beginning.
  for folder in (run, str(tmp_path / "other")):
    same_sampler(ddss_tf.search(run_dir=folder, **parts, **searched), expected)


@pytest.mark.slow
def test_a_run_of_an_earlier_version_goes_on(tmp_path):
  """Of commit 263e1da, before the modules were moved: 8 of 12 steps are done.

  The whole search at that commit is `expected.json`. On the machine that made it
  the two are equal bit for bit.
  """
  # Keras counts the layers of a process in their names, which are part of a
  # feature network's identity. That search was the first of its process.
  keras.utils.clear_session()
  parts = gaussian_parts.make()
  run = str(tmp_path / "run")
  shutil.copytree(os.path.join(TESTDATA, "half_a_run"), run)
  before = set(os.listdir(os.path.join(run, "cache")))
  sampler = ddss_tf.search(run_dir=run, **parts, **options(
      sampler=functools.partial(
          ddss_tf.make_sampler, family="ggdm+pred+time", num_steps=3,
          init="ddpm", stride="trailing")))
  expected = card.read(os.path.join(TESTDATA, "half_a_run", "expected.json"))
  found = sampler.coefficients().arrays()
  assert set(found) == set(expected.coefficients.arrays())
  for name, value in expected.coefficients.arrays().items():
    np.testing.assert_allclose(
        found[name], value, rtol=1e-3, atol=1e-4, err_msg=name)
  assert expected.search["config"] == card.read(
      os.path.join(run, "sampler.json")).search["config"]
  # The pools and the real images' features were taken from its cache.
  assert set(os.listdir(os.path.join(run, "cache"))) == before


def longer(parts, run, steps, **changes):
  """A search with a constant rate, which does not depend on its length."""
  return ddss_tf.search(run_dir=run, **parts, **options(**{**dict(
      num_search_steps=steps, rate_schedule="constant", warmup_steps=0),
      **changes}))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    pytest.param({}, marks=pytest.mark.slow),
    # So high that validations take the search back, that at step 4 too.
    dict(learning_rate=30.0, rate_of_distance=1e9),
    pytest.param(dict(optimizer="adam", objective="kid_linear"),
                 marks=pytest.mark.slow),
])
def test_more_steps_go_on_bit_for_bit(parts, tmp_path, changes, monkeypatch):
  monkeypatch.setattr(summaries, "draw", lambda *args: None)
  changes = dict(validate_every=2, **changes)
  whole, run = str(tmp_path / "whole"), str(tmp_path / "parts")
  longer(parts, run, 4, **changes)
  went_on = longer(parts, run, 6, **changes)
  same_sampler(longer(parts, whole, 6, **changes), went_on)
  found = card.read(os.path.join(run, "sampler.json"))
  assert found.search["steps"] == 6 and found.search["went_on_from"] == [4]
  assert "went_on_from" not in card.read(
      os.path.join(whole, "sampler.json")).search


@pytest.mark.slow
def test_a_killed_search_goes_on_with_more_steps(parts, tmp_path, monkeypatch):
  run = str(tmp_path / "run")
  constant = dict(rate_schedule="constant", warmup_steps=0)
  interrupted(run, parts, monkeypatch, 6, die, KeyboardInterrupt, **constant)
  interrupted(run, parts, monkeypatch, 10, die, KeyboardInterrupt,
              num_search_steps=16, **constant)
  same_sampler(longer(parts, run, 16),
               longer(parts, str(tmp_path / "whole"), 16))


@pytest.mark.slow
def test_more_steps_go_on_with_a_cosine_too(parts, finished, tmp_path):
  """At the rates of the longer search, from where the shorter one ended."""
  run = str(tmp_path / "run")
  shutil.copytree(finished[0], run)
  ddss_tf.search(run_dir=run, **parts, **options(num_search_steps=16))
  found = card.read(os.path.join(run, "sampler.json"))
  assert found.search["steps"] == 16 and found.search["went_on_from"] == [12]
  steps = {step for step, tag, _ in events(run) if tag == "search/loss"}
  assert max(steps) == 16 and len(steps) == len({*steps})


@pytest.mark.parametrize("changes,words", [
    (dict(num_search_steps=8), ["another num_search_steps: 12. Received: 8"]),
    # More steps and something else: only the other thing is told.
    (dict(num_search_steps=16, seed=1), ["another seed: 0. Received: 1"]),
    (dict(num_search_steps=16, warmup_steps=3), [
        "another warmup_steps: None. Received: 3"]),
    (dict(sampler=functools.partial(
        ddss_tf.make_sampler, family="ggdm+pred+time", num_steps=3,
        init="ddim")),
     ["another sampler: {'init': 'ddpm'}. Received: {'init': 'ddim'}"]),
])
def test_what_does_not_go_on_is_told_in_short(parts, finished, changes, words):
  run = finished[0]
  with pytest.raises(UserError) as caught:
    ddss_tf.search(run_dir=run, **parts, **options(**changes))
  line = str(caught.value)
  assert all(word in line for word in words) and len(line) < 500, line
  assert line.count("another") == len(words) + 1  # "Use another run_dir".
  assert f"init = {os.path.join(run, 'sampler.json')!r}" in line


def test_the_advice_of_a_refusal_helps(parts, finished, tmp_path):
  start = os.path.join(finished[0], "sampler.json")
  sampler = ddss_tf.make_sampler(
      parts["denoiser"].schedule, "ggdm+pred+time", 3, init=start)
  same_sampler(finished[1], sampler)
