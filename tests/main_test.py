"""Tests of the command line, the way a person calls it.

What a person may get wrong is in `bad_input_test.py`.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import ddss_tf
from ddss_tf import storage
from ddss_tf.samplers import card
from project import ROOT

DEMO = os.path.join(ROOT, "gin_configs", "demo.gin")
DIGITS = os.path.join(ROOT, "gin_configs", "digits.gin")
TINY = [
    "NUM_STEPS = 2", "NUM_SAMPLES = 32", "evaluate.batch_size = 16",
    "search.num_search_steps = 6", "search.batch_size = 4",
    "search.gradient_samples = 2", "search.pool_samples = 16",
    "search.validation_samples = 8", "search.validate_every = 2",
    "search.checkpoint_every = 2", "search.jit_compile = False",
    "evaluate.jit_compile = False", "sample.jit_compile = False",
    "load_dataset.max_images = 500",
]


def command(*arguments, params=()):
  return [sys.executable, "-m", "ddss_tf.main", *arguments,
          *(f"--gin_param={param}" for param in params)]


def call(*arguments, params=(), data_dir=None):
  environment = dict(os.environ, CUDA_VISIBLE_DEVICES="")
  if data_dir:
    environment["TFDS_DATA_DIR"] = data_dir
  return subprocess.run(command(*arguments, params=params), cwd=ROOT,
                        env=environment, capture_output=True, text=True,
                        check=False)


def refused(result, *words):
  assert result.returncode == 2, result.stderr
  assert "Traceback" not in result.stderr, result.stderr
  lines = [l for l in result.stderr.splitlines() if l.startswith("error: ")]
  assert len(lines) == 1, result.stderr
  for word in words:
    assert word in lines[0], lines[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tfds_dir):
  """The whole job: (folder, finished process, arguments)."""
  folder = str(tmp_path_factory.mktemp("run") / "demo")
  arguments = [f"--gin_file={DEMO}", f"--run_dir={folder}"]
  result = call(*arguments, params=TINY, data_dir=tfds_dir)
  assert result.returncode == 0, result.stderr
  return folder, result, arguments


@pytest.fixture(scope="module")
def killed(tmp_path_factory, tfds_dir):
  """Folder of a job that was killed in its search and started again."""
  folder = str(tmp_path_factory.mktemp("killed") / "demo")
  environment = dict(os.environ, TFDS_DATA_DIR=tfds_dir)
  arguments = [f"--gin_file={DEMO}", f"--run_dir={folder}"]
  process = subprocess.Popen(
      command(*arguments, params=TINY), cwd=ROOT, env=environment,
      stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
  first = os.path.join(folder, "checkpoints", "ckpt-2.index")
  for _ in range(1200):
    if os.path.exists(first) or process.poll() is not None:
      break
    time.sleep(0.1)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert os.path.exists(first)
  assert not os.path.exists(os.path.join(folder, "sampler.json"))
  result = call(*arguments, params=TINY, data_dir=tfds_dir)
  assert result.returncode == 0, result.stderr
  return folder


@pytest.mark.slow
def test_the_whole_job(run):
  folder, result, _ = run
  for name in ("config.gin", "metrics.json", "samples.png", "coefficients.png",
               "sampler.json", "export/saved_model.pb", "tensorboard",
               "path.png", "before_after.png", "report.html"):
    assert os.path.exists(os.path.join(folder, name)), name
  with open(os.path.join(folder, "metrics.json")) as f:
    records = json.load(f)
  assert [r["sampler"] for r in records] == [
      "DDPM linear", "DDPM quadratic", "DDIM linear", "DDIM quadratic",
      "DPM-Solver++(3M) linear", "UniPC-3 (bh2) linear", "GGDM+PRED+TIME"]
  for record in records:
    assert record["num_samples"] == 32 and record["num_real"] == 500
    assert record["features"]["name"] == "digits_cnn"
    assert record["features_heldout"]["name"] == "digits_resnet"
    assert len(record["denoiser"]["sha256"]) == 64
    assert f"| {record['fid']:.2f} " in result.stdout
  assert "tensorboard --logdir" in result.stdout


@pytest.mark.slow
def test_killed_search_equals_uninterrupted(killed, tfds_dir, tmp_path):
  # The uninterrupted one through the Python API, in this process.
  import functools  # pylint: disable=g-import-not-at-top
  dataset = ddss_tf.load_dataset(
      "ddss_digits", pad=2, downsample=2, data_dir=tfds_dir, max_images=500)
  sampler = ddss_tf.search(
      run_dir=str(tmp_path),
      denoiser=ddss_tf.load_denoiser("digits16-ddpm"),
      dataset=dataset, features=ddss_tf.load_features("digits_cnn"),
      sampler=functools.partial(
          ddss_tf.make_sampler, family="ggdm+pred+time", num_steps=2),
      num_search_steps=6, batch_size=4, gradient_samples=2,
      objective="frechet", pool_samples=16, validation_samples=8,
      validate_every=2, checkpoint_every=2, jit_compile=False)
  found = card.read(os.path.join(killed, "sampler.json"))
  for name, a, b in zip(found.coefficients._fields, found.coefficients,
                        sampler.coefficients()):
    np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.slow
def test_a_terminated_command_says_so(main_in_process, tmp_path, tfds_dir,
                                      monkeypatch, capsys):
  from ddss_tf.searching import loop  # pylint: disable=g-import-not-at-top
  advance = loop.Search.advance

  def terminated(self):
    os.kill(os.getpid(), signal.SIGTERM)
    return advance(self)

  monkeypatch.setattr(loop.Search, "advance", terminated)
  monkeypatch.setenv("TFDS_DATA_DIR", tfds_dir)
  with pytest.raises(SystemExit) as ended:
    main_in_process(command(f"--gin_file={DEMO}", f"--run_dir={tmp_path}",
                            "--mode=search", params=TINY)[3:])
  assert ended.value.code == 143
  assert re.search(r"^error: search ended by SIGTERM after step 1 of 6, with "
                   r"checkpoint \S*ckpt-1; called again it goes on$",
                   capsys.readouterr().err, re.MULTILINE)


@pytest.mark.slow
def test_stages_one_by_one(run, tfds_dir):
  folder, _, arguments = run
  before = os.stat(os.path.join(folder, "sampler.json")).st_mtime
  result = call(*arguments, "--mode=sample", data_dir=tfds_dir,
                params=[*TINY, "sample.num_images = 5"])
  assert result.returncode == 0, result.stderr
  with np.load(os.path.join(folder, "generated.npz")) as arrays:
    assert arrays["images"].shape == (5, 16, 16, 1)
  assert os.stat(os.path.join(folder, "sampler.json")).st_mtime == before


@pytest.mark.slow
def test_report_of_a_run(run, main_in_process, capsys):
  folder = run[0]
  with open(os.path.join(folder, "config.gin")) as f:
    config = f.read()
  page = os.path.join(folder, "report.html")
  os.remove(page)
  main_in_process(["--mode=report", f"--run_dir={folder}"])
  assert page in capsys.readouterr().out
  with open(os.path.join(folder, "metrics.json")) as f:
    records = json.load(f)
  with open(page) as f:
    text = f.read()
  for record in records:
    assert f'<data value="{record["fid"]!r}">{record["fid"]:.2f}<' in text
  with open(os.path.join(folder, "config.gin")) as f:
    assert f.read() == config


@pytest.mark.slow
def test_another_configuration_is_refused(run, tfds_dir):
  folder, _, arguments = run
  refused(call(*arguments, "--mode=search", data_dir=tfds_dir,
               params=[*TINY, "search.seed = 9"]), "another seed")


@pytest.mark.slow
def test_run_dir_in_use_is_refused(run, tfds_dir):
  import fcntl  # pylint: disable=g-import-not-at-top
  folder, _, arguments = run
  with open(os.path.join(folder, ".lock"), "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    refused(call(*arguments, "--mode=export", data_dir=tfds_dir, params=TINY),
            "in use by another process")


@pytest.mark.slow
def test_dry_run_prints_and_writes_nothing(tmp_path, tfds_dir):
  folder = tmp_path / "never"
  result = call(f"--gin_file={DEMO}", f"--run_dir={folder}", "--dry_run",
                data_dir=tfds_dir)
  assert result.returncode == 0, result.stderr
  assert re.search(r"^search.batch_size = \d+", result.stdout, re.M)
  assert not folder.exists()


def test_help_is_quick_to_import():
  # `--help` and misspelt flags must not wait for large libraries.
  code = ("import sys, ddss_tf.main; sys.exit(any(name in sys.modules for name "
          "in ('tensorflow', 'keras', 'numpy', 'gin')))")
  subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("arguments,words", [
    (["--gin_file=nowhere.gin", "--run_dir=x"], ["nowhere.gin"]),
    pytest.param([f"--gin_file={DEMO}", "--run_dir=/proc/nothing"],
                 ["run_dir", "/proc/nothing"], marks=pytest.mark.slow),
])
def test_bad_input_ends_with_one_line(arguments, words, tfds_dir):
  refused(call(*arguments, data_dir=tfds_dir), *words)


@pytest.mark.slow
def test_a_fault_of_the_last_stage_shows_before_the_first(
    main_in_process, tfds_dir, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("TFDS_DATA_DIR", tfds_dir)
  run = str(tmp_path / "run")
  with pytest.raises(SystemExit):
    main_in_process(command(
        f"--gin_file={DEMO}", f"--run_dir={run}",
        params=[*TINY, "heldout/load_features.path = 'lost'"])[3:])
  assert "'lost'" in capsys.readouterr().err
  assert not os.path.exists(os.path.join(run, "checkpoints"))


@pytest.mark.parametrize("arguments,params,words", [
    (["--run_dir=x"], [], ["--gin_file"]),
    (["--mode=dance"], [], ["'dance'", "run, search, evaluate"]),
    ([f"--gin_file={DEMO}"], [], ["--run_dir"]),
    (["--mode=report"], [], ["--run_dir"]),
    (["--mode=report", "--run_dir=lost"], [], ["--run_dir", "'lost'"]),
    (["--dry_run", f"--gin_file={DIGITS}"], ["NUM_SAMPLES = 5"], ["NUM_STEPS"]),
])
def test_bad_usage(arguments, params, words, main_in_process, tfds_dir,
                   monkeypatch, capsys):
  monkeypatch.setenv("TFDS_DATA_DIR", tfds_dir)
  with pytest.raises(SystemExit) as ended:
    main_in_process(command(*arguments, params=params)[3:])
  assert ended.value.code == 2
  lines = capsys.readouterr().err.splitlines()
  assert len([l for l in lines if l.startswith("error: ")]) == 1, lines
  for word in words:
    assert word in lines[-1], lines[-1]


# Parts that others include: they leave things to bind.
PARTS = ("digits.gin", "digits_search.gin", "demo.gin", "inspect.gin",
         "own.gin", "parts.gin", "sample.gin")


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", sorted(n for n in os.listdir(os.path.join(ROOT, "gin_configs"))
                     if n.endswith(".gin") and n not in PARTS))
def test_every_shipped_config_builds(config, tfds_dir):
  compares = config.startswith(("table", "objectives", "figures"))
  mode = "compare" if compares else "run"
  result = call(f"--gin_file={os.path.join(ROOT, 'gin_configs', config)}",
                "--dry_run", f"--mode={mode}", data_dir=tfds_dir)
  assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_inspect(main_in_process, capsys):
  file = os.path.join(ROOT, "gin_configs", "inspect.gin")
  main_in_process(["--mode=inspect", f"--gin_file={file}", "--gin_param="
                   "load_denoiser.path = 'digits16-ddpm'"])
  rows = dict(line.split(maxsplit=1) for line
              in capsys.readouterr().out.splitlines())
  denoiser = ddss_tf.load_denoiser("digits16-ddpm")
  assert rows["sha256"] == denoiser.sha256
  assert rows["parameters"].startswith(f"{denoiser.model.count_params():,} in")
  assert rows["images"].startswith("16 x 16 x 1") and rows["prediction"] == "eps"
  assert "T = 1000, beta from 0.0001 to 0.02" in rows["schedule"]
  assert rows["architecture"].endswith(
      "channels 32, 64, 64; blocks per level 1; attention levels 1; "
      "norm groups 16")
  with pytest.raises(SystemExit):
    main_in_process(["--mode=inspect", f"--gin_file={file}"])
  assert "load_denoiser.path" in capsys.readouterr().err


def test_storage_keeps_the_old_file_on_failure(tmp_path):
  path = str(tmp_path / "file.json")
  storage.write_json(path, [1])
  with pytest.raises(ValueError):
    storage.write_json(path, [float("nan")])
  with open(path) as f:
    assert json.load(f) == [1]
  assert os.listdir(tmp_path) == ["file.json"]
