"""Tests of what other machines lack: affinity, locks, UTF-8, a home; signals."""

import errno
import fcntl
import glob
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import ddss_tf
from ddss_tf import distribution
from ddss_tf.runs import run_dir
from ddss_tf.errors import UserError
import gaussian_parts
from project import ROOT



@pytest.fixture(name="small", scope="module")
def fixture_small(tmp_path_factory):
  return gaussian_parts.save(str(tmp_path_factory.mktemp("gaussian")))


def command(*arguments):
  return [sys.executable, "-m", "ddss_tf.main", *arguments]


def call(*arguments, **environment):
  return subprocess.run(
      command(*arguments), capture_output=True, check=False, cwd=ROOT,
      env={**os.environ, **environment})


@pytest.mark.parametrize("count", [1, 7, None])
def test_no_affinity(count, monkeypatch):
  """As on macOS and Windows; a machine need not know its cores at all."""
  monkeypatch.delattr(os, "sched_getaffinity", raising=False)
  monkeypatch.setattr(os, "cpu_count", lambda: count)
  expected = f"{count or 1} CPU core{'s' if (count or 1) > 1 else ''}"
  assert distribution.device_name() == expected


@pytest.mark.parametrize("code", [
    errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_is_used_without(
    code, tmp_path, monkeypatch):
  def refuse(file, operation):
    raise OSError(code, os.strerror(code))
  monkeypatch.setattr(fcntl, "flock", refuse)
  for _ in range(2):
    run = run_dir.RunDir(str(tmp_path / "run"))
    run.lock()
    run.release()


@pytest.mark.parametrize("code", [errno.EWOULDBLOCK, errno.EACCES])
def test_a_lock_that_is_held_is_told(code, tmp_path, monkeypatch):
  def refuse(file, operation):
    raise OSError(code, os.strerror(code))
  monkeypatch.setattr(fcntl, "flock", refuse)
  with pytest.raises(UserError, match="in use by another process"):
    run_dir.RunDir(str(tmp_path / "run")).lock()


@pytest.fixture(name="home")
def fixture_home(tmp_path, monkeypatch, small):
  """A home folder with a model, features and images; elsewhere is empty."""
  home = tmp_path / "home"
  for name in ("images.npz", "features.keras"):
    os.makedirs(home, exist_ok=True)
    shutil.copy(os.path.join(os.path.dirname(small), name), home)
  shutil.copy(small, home / "own.gin")
  ddss_tf.gaussian_denoiser((4, 4, 1), mean=0.3, std=0.25).save(
      str(home / "model"))
  os.makedirs(tmp_path / "elsewhere")
  monkeypatch.setenv("HOME", str(home))
  monkeypatch.chdir(tmp_path / "elsewhere")
  return home


@pytest.mark.slow
def test_a_tilde_is_the_home_folder_in_every_path(home):
  denoiser = ddss_tf.load_denoiser("~/model")
  features = ddss_tf.load_features("~/features.keras")
  images = ddss_tf.load_dataset("npz:~/images.npz")
  sampler = ddss_tf.make_sampler(denoiser.schedule, "ggdm+pred", 2)
  options = dict(num_search_steps=1, batch_size=8, pool_samples=16,
                 validation_samples=16, jit_compile=False)
  ddss_tf.search(denoiser, sampler, features, images, run_dir="~/run",
                 cache_dir="~/cache", **options)
  again = ddss_tf.make_sampler(denoiser.schedule, "ggdm+pred", 2,
                               init="~/run/sampler.json")
  found, = ddss_tf.evaluate(
      "~/other", denoiser, images, features, num_samples=20,
      sampler="~/run/sampler.json", jit_compile=False, baselines=[])
  assert found["num_steps"] == again.num_steps == 2
  ddss_tf.export("~/run", denoiser)
  assert (home / "run" / "export").is_dir() and (home / "cache").is_dir()
  assert not os.listdir(".")
  done = call("--mode=search", "--gin_file=~/own.gin", "--run_dir=~/by/main")
  assert done.returncode == 0, done.stderr
  assert (home / "by" / "main" / "sampler.json").exists()
  assert not os.path.exists(os.path.join(ROOT, "~"))


@pytest.fixture(name="evaluated", scope="module")
def fixture_evaluated(small, tmp_path_factory):
  """A run with a searched sampler."""
  folder = str(tmp_path_factory.mktemp("machines") / "run")
  done = call("--mode=search", f"--gin_file={small}", f"--run_dir={folder}")
  assert done.returncode == 0, done.stderr
  return folder


@pytest.mark.slow
@pytest.mark.parametrize("encoding", [
    "ascii", pytest.param("cp1252", marks=pytest.mark.slow)])
def test_output_that_is_not_utf_8(encoding, small, evaluated):
  done = call("--mode=evaluate", f"--gin_file={small}",
              f"--run_dir={evaluated}", PYTHONIOENCODING=encoding,
              LC_ALL="C", PYTHONUTF8="0")
  assert done.returncode == 0, done.stderr
  table = done.stdout.decode(encoding)
  assert ("+-" if encoding == "ascii" else "±") in table
  # Files are UTF-8 wherever they are written.
  with open(os.path.join(evaluated, "report.html" if os.path.exists(
      os.path.join(evaluated, "report.html")) else "metrics.json"),
            encoding="utf-8") as f:
    assert f.read()


@pytest.mark.slow
def test_a_reader_that_has_read_enough(small, evaluated):
  process = subprocess.Popen(
      command("--mode=evaluate", f"--gin_file={small}",
              f"--run_dir={evaluated}"),
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
  process.stdout.close()
  error = process.stderr.read().decode()
  assert process.wait() == 0 and "Traceback" not in error, error


@pytest.mark.slow
@pytest.mark.parametrize("home", ["/dev/null/home"])
def test_no_home(home, small, tmp_path):
  done = call("--mode=search", f"--gin_file={small}",
              f"--run_dir={tmp_path / 'run'}", HOME=home)
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "run" / "sampler.json").exists()


LONG = ["search.num_search_steps = 4000", "search.checkpoint_every = 4000",
        "search.validate_every = 4000"]


def long_search(gin_file, run) -> subprocess.Popen:
  """A search that goes on until it gets a signal, as in a terminal.

  A shell that starts the tests in the background lets them ignore SIGINT.
  """
  return subprocess.Popen(
      command("--mode=search", f"--gin_file={gin_file}", f"--run_dir={run}",
              *(f"--gin_param={param}" for param in LONG)),
      stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=ROOT,
      preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


@pytest.mark.quick("15-143")
@pytest.mark.parametrize("number,status", [
    (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_search(number, status, small, tmp_path):
  run = tmp_path / "run"
  process = long_search(small, run)

  def begun():  # Events are written once steps are made.
    return any(os.path.getsize(path) > 2000 for path in glob.glob(
        str(run / "tensorboard" / "*.search")))

  until = time.monotonic() + 120
  while time.monotonic() < until and not begun() and process.poll() is None:
    time.sleep(0.1)
  assert begun()
  process.send_signal(number)
  _, error = process.communicate(timeout=60)
  assert process.returncode == status, error
  assert "Traceback" not in error
  lines = [line for line in error.splitlines() if line.startswith("error: ")]
  assert len(lines) == 1, error
  steps = [int(path.rsplit("-", 1)[1].removesuffix(".index"))
           for path in glob.glob(str(run / "checkpoints" / "ckpt-*.index"))]
  assert len(steps) == 1 and 0 < steps[0] < 4000
  with open(run / "checkpoints" / "search.json", encoding="utf-8") as f:
    assert json.load(f)


@pytest.mark.parametrize("number,status,seconds", [
    (signal.SIGINT, 130, 2.0), (signal.SIGTERM, 143, 0.3),
    pytest.param(signal.SIGINT, 130, 0.3, marks=pytest.mark.slow),
    pytest.param(signal.SIGTERM, 143, 2.0, marks=pytest.mark.slow)])
def test_a_command_that_had_not_begun_leaves_nothing(
    number, status, seconds, small, tmp_path):
  process = long_search(small, tmp_path / "a" / "run")
  time.sleep(seconds)  # In Python's own start, and among the imports.
  process.send_signal(number)
  _, error = process.communicate(timeout=60)
  if seconds > 1:
    assert process.returncode == status, error
    assert "Traceback" not in error
  assert process.returncode != 0
  if not glob.glob(str(tmp_path / "a" / "run" / "checkpoints" / "*")):
    assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_numbers_of_cores_are_recorded(small, evaluated):
  """An evaluation where there is no affinity ends with all of its rows."""
  script = ("import os, sys; del os.sched_getaffinity; from ddss_tf import main;"
            "from absl import app; app.run(main.main)")
  done = subprocess.run(
      [sys.executable, "-c", script, "--mode=evaluate", f"--gin_file={small}",
       f"--run_dir={evaluated}", "--gin_param=evaluate.batch_size = 10",
       "--gin_param=evaluate.num_samples = 30"],
      capture_output=True, text=True, check=False, cwd=ROOT)
  assert done.returncode == 0, done.stderr
  with open(os.path.join(evaluated, "metrics.json"), encoding="utf-8") as f:
    records = [r for r in json.load(f) if r["num_samples"] == 30]
  assert len(records) == 2 and all(
      np.isfinite(r["timing"]["seconds_per_image"]) for r in records)
