"""Tests of the wheel: all that is needed is in it, and it works elsewhere."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest
from project import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.path.exists(os.path.join(ROOT, ".git")),
                       reason="not a checkout, which knows its files"),
]


def run(*arguments, **options):
  return subprocess.run(arguments, capture_output=True, text=True, check=False,
                        **options)


def passed(result):
  assert result.returncode == 0, result.stdout + result.stderr
  return result.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
  """(copy of the files a commit of this checkout would have, their names)."""
  names = passed(run(
      "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard",
      cwd=ROOT)).split("\0")
  names = [name for name in names
           if name and os.path.exists(os.path.join(ROOT, name))]
  copy = tmp_path_factory.mktemp("checkout")
  for name in names:
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(os.path.join(ROOT, name), copy / name)
  return copy, names


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
  """Path of the wheel, built without a network."""
  copy, _ = checkout
  folder = tmp_path_factory.mktemp("wheel")
  passed(run(
      sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index",
      "--no-build-isolation", "-w", str(folder), str(copy)))
  (path,) = folder.iterdir()
  return str(path)


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
  """Scripts of an environment with the wheel and this one's dependencies."""
  folder = str(tmp_path_factory.mktemp("environment"))
  venv.create(folder, with_pip=False, symlinks=True)
  scripts = os.path.join(folder, "bin")
  passed(run(sys.executable, "-m", "pip", "--python",
             os.path.join(scripts, "python"), "install", "-q", "--no-deps",
             "--no-index", wheel))
  # A line of a .pth file adds a folder without what .pth files in it say: an
  # editable installation of the checkout stays out.
  (packages,) = [path for path, folders, _ in os.walk(folder)
                 if os.path.basename(path) == "site-packages"]
  with open(os.path.join(packages, "dependencies.pth"), "w") as f:
    for path in sorted({sysconfig.get_path(k) for k in ("purelib", "platlib")}):
      f.write(path + "\n")
  return scripts


@pytest.fixture
def elsewhere(environment, tmp_path, tfds_dir):
  """Runs a program of the environment in a folder that has nothing else."""
  variables = {name: value for name, value in os.environ.items()
               if not name.startswith("PYTHON")}
  variables |= {"TFDS_DATA_DIR": tfds_dir, "CUDA_VISIBLE_DEVICES": ""}

  def call(name, *arguments):
    return run(os.path.join(environment, name), *arguments, cwd=tmp_path,
               env=variables)

  return call


def test_the_wheel_has_every_file(checkout, wheel):
  copy, names = checkout
  # Cards, networks, digits and configurations too: all that is beside modules.
  expected = {re.sub("^gin_configs/", "ddss_tf/gin_configs/", name): name
              for name in names
              if name.startswith(("ddss_tf/", "gin_configs/"))}
  assert len(expected) > 150
  with zipfile.ZipFile(wheel) as file:
    received = {name for name in file.namelist()
                if not re.match(r"ddss_tf-[^/]+\.dist-info/", name)}
    assert received == set(expected)
    for inside, name in expected.items():
      assert file.read(inside) == (copy / name).read_bytes(), name
    (name,) = [name for name in file.namelist() if name.endswith("/METADATA")]
    metadata = file.read(name).decode()
  assert re.search(r"^License-Expression: Apache|^License: Apache", metadata,
                   re.M)


def test_what_configurations_include_is_in_the_wheel(wheel):
  with zipfile.ZipFile(wheel) as file:
    names = file.namelist()
    included = [
        os.path.normpath(os.path.join(os.path.dirname(name), each))
        for name in names if name.endswith(".gin")
        for each in re.findall(r'^include "(.+)"', file.read(name).decode(),
                               re.M)]
  assert len(included) >= 20 and set(included) <= set(names)
  # The file that the recipes' figures are in is no include.
  assert "ddss_tf/gin_configs/papers/iclr2022/published.csv" in names


def test_every_module_is_imported_from_the_wheel(elsewhere):
  out = passed(elsewhere("python", "-c", "\n".join([
      "import importlib, pkgutil, ddss_tf",
      "for found in pkgutil.walk_packages(ddss_tf.__path__, 'ddss_tf.'):",
      "  module = importlib.import_module(found.name)",
      "  print(module.__file__ or '', end='\\n' * bool(module.__file__))"])))
  paths = [line for line in out.splitlines() if line.endswith(".py")]
  assert len(paths) > 50
  assert all("site-packages" in path for path in paths)
  assert not any(path.startswith(ROOT) for path in paths)


def test_help(elsewhere):
  result = elsewhere("ddss_tf", "--help")
  assert result.returncode == 1  # absl's.
  for words in ("few-step diffusion sampler", "--gin_file", "--[no]dry_run",
                "--run_dir", "--sampler", "--plugin"):
    assert words in result.stdout


def test_the_zoo(elsewhere, checkout):
  _, names = checkout
  out = passed(elsewhere("ddss_tf", "--mode=zoo"))
  cards = [os.path.basename(name).removesuffix(".json") for name in names
           if name.startswith("ddss_tf/assets/samplers/")]
  assert cards and all(card in out for card in cards)


def test_inspecting_the_embedded_model(elsewhere):
  out = passed(elsewhere(
      "ddss_tf", "--mode=inspect", "--gin_file=gin_configs/inspect.gin",
      "--gin_param=load_denoiser.path = 'digits16-ddpm'"))
  assert re.search(r"^images +16 x 16 x 1", out, re.M)


def test_a_shipped_configuration(elsewhere, tmp_path):
  out = passed(elsewhere(
      "ddss_tf", "--gin_file=gin_configs/demo.gin", "--dry_run"))
  assert re.search(r"^load_denoiser.path = 'digits16-ddpm'", out, re.M)
  assert not list(tmp_path.iterdir())
