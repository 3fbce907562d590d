"""Plugins: modules that a command imports, whose names gin then knows."""

import json
import os
import subprocess
import sys

import pytest

from project import ROOT

PLUGIN = """
import gin
import numpy as np
import ddss_tf
from ddss_tf.samplers import families

ddss_tf.register_family("ggdm-plugged", label="PLUGGED")(
    lambda schedule, num_steps, family, **options: families.GGDM(
        schedule, num_steps, family, **options))


@gin.register
def noise_images(count=100):
  return np.random.default_rng(0).normal(
      0.3, 0.25, (count, 4, 4, 1)).clip(-1, 1).astype(np.float32)
"""


def run(*arguments, cwd, **changes):
  return subprocess.run(
      [sys.executable, "-m", "ddss_tf.main", *arguments], cwd=cwd,
      env={**os.environ, "PYTHONPATH": ROOT}, capture_output=True, text=True,
      check=False, **changes)


def test_a_command_with_a_plugin(gaussian_config, tmp_path):
  (tmp_path / "my_plugin.py").write_text(PLUGIN)
  result = run(
      "--plugin=my_plugin", f"--gin_file={gaussian_config}", "--run_dir=run",
      "--mode=search", "--gin_param=searched/make_sampler.family = "
      "'ggdm-plugged'", "--gin_param=search.dataset = @noise_images()",
      "--gin_param=noise_images.count = 80", "--gin_param=DATASET = None",
      "--gin_param=search.num_search_steps = 1", cwd=tmp_path)
  assert result.returncode == 0, result.stderr[-2000:]
  with open(tmp_path / "run" / "sampler.json", encoding="utf-8") as f:
    assert json.load(f)["label"] == "PLUGGED"


@pytest.mark.parametrize("text,words", [
    (None, "'my_plugin', ModuleNotFoundError"),
    ("raise RuntimeError('out\\nof order')", "RuntimeError: out of order")])
def test_a_plugin_that_fails(tmp_path, text, words):
  if text:
    (tmp_path / "my_plugin.py").write_text(text)
  result = run("--plugin=my_plugin", "--mode=inspect",
               "--gin_file=gin_configs/inspect.gin", cwd=tmp_path)
  assert result.returncode == 2
  (line,) = [line for line in result.stderr.splitlines()
             if line.startswith("error")]
  assert "--plugin must name a module" in line and words in line


def test_a_configuration_imports_nothing(tmp_path):
  (tmp_path / "my_plugin.py").write_text(PLUGIN)
  (tmp_path / "own.gin").write_text("import my_plugin\n")
  result = run("--mode=inspect", "--gin_file=own.gin", cwd=tmp_path)
  assert result.returncode == 2 and "must not import" in result.stderr
