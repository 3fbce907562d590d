"""Tests of --plugin: a module of the user's, imported before gin is parsed."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from project import ROOT

# The images and the feature network of a run, made by functions that gin finds.
PLUGIN = """
import gin
import numpy as np

import ddss_tf
import gaussian_parts


@gin.configurable
def plugged_images(number: int = gin.REQUIRED):
  dataset = gaussian_parts.make()["dataset"]
  return np.clip(dataset.images[:number], -1, 1)


@gin.configurable
def plugged_features():
  return gaussian_parts.make()["features"]
"""
BINDINGS = ["DATASET = @plugged_images()", "plugged_images.number = 120",
            "features/gin.singleton.constructor = @plugged_features"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """The working folder, in which plugins are written; they are forgotten."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", list(sys.path))
  before = set(sys.modules)
  yield tmp_path
  for name in set(sys.modules) - before:
    if name.split(".")[0].startswith("plug_"):
      del sys.modules[name]


@pytest.fixture
def refused(main_in_process, folder, gaussian_config, capsys):
  """Runs a command that must be refused, and gives its one line."""

  def call(*arguments):
    before = sorted(os.listdir(folder))
    with pytest.raises(SystemExit) as ended:
      main_in_process([f"--gin_file={gaussian_config}", "--run_dir=run",
                       *arguments])
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert sorted({*os.listdir(folder)} - {"__pycache__"}) == before
    return lines[0]

  return call


def arguments(*plugins, params=()):
  return [*(f"--plugin={plugin}" for plugin in plugins),
          *(f"--gin_param={param}" for param in params)]


def test_gin_binds_what_a_plugin_registers(
    main_in_process, folder, gaussian_config, capsys):
  (folder / "plug_parts.py").write_text(PLUGIN)
  main_in_process([
      f"--gin_file={gaussian_config}", "--run_dir=run",
      *arguments("plug_parts", params=BINDINGS)])
  out = capsys.readouterr().out
  assert "against 120 real images" in out
  records = json.loads((folder / "run" / "metrics.json").read_text())
  assert [record["num_real"] for record in records] == [120, 120]
  assert {record["features"]["name"] for record in records} == {"random"}
  config = (folder / "run" / "config.gin").read_text()
  assert "DATASET = @plugged_images()" in config
  assert "plugged_images.number = 120" in config


def test_the_plugin_of_the_readme(
    main_in_process, folder, gaussian_config, capsys):
  with open(os.path.join(ROOT, "README.md")) as f:
    (code,) = re.findall(r"^```py\n(.*?)^```", f.read(), re.M | re.S)
  flags = re.match(r"# my_module\.py, for --plugin=my_module --gin_param='(.+)'",
                   code)
  (folder / "plug_readme.py").write_text(code)
  np.save(folder / "my_images.npy", np.zeros((8, 4, 4, 1), np.float32))
  command = [f"--gin_file={gaussian_config}", "--dry_run",
             *arguments("plug_readme", params=[flags.group(1)])]
  main_in_process(command)
  assert f"\n{flags.group(1)}\n" in capsys.readouterr().out
  # It is used: images of another shape do not fit.
  np.save(folder / "my_images.npy", np.zeros((8, 5, 4, 1), np.float32))
  with pytest.raises(SystemExit):
    main_in_process(command)
  assert "(5, 4, 1)" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["run", "inspect", "report", "zoo"])
def test_every_mode_imports_plugins_in_order(
    mode, main_in_process, folder, gaussian_config):
  for name in ("plug_b", "plug_a"):
    (folder / f"{name}.py").write_text(
        f"with open('ran', 'a') as f: f.write('{name} ')\n")
  (folder / "run").mkdir()
  shutil.copy(os.path.join(ROOT, "results", "cosine", "metrics.json"), "run")
  command = [f"--mode={mode}", *arguments("plug_b", "plug_a")]
  if mode in ("run", "inspect"):
    command += [f"--gin_file={gaussian_config}", "--dry_run",
                "--gin_param=inspect.denoiser = %DENOISER"]
  if mode == "report":
    command += ["--run_dir=run"]
  main_in_process(command)
  assert (folder / "ran").read_text() == "plug_b plug_a "


def test_a_module_of_a_package(main_in_process, folder):
  (folder / "plug_package").mkdir()
  (folder / "plug_package" / "__init__.py").write_text("")
  (folder / "plug_package" / "inner.py").write_text("open('ran', 'w').close()")
  main_in_process(["--mode=zoo", "--plugin=plug_package.inner"])
  assert (folder / "ran").exists()


@pytest.mark.parametrize("text,words", [
    ("import plug_lost", ["plug_bad.py:1)", "ModuleNotFoundError: No module",
                          "'plug_lost'"]),
    ("\n1 / 0", ["plug_bad.py:2)", "ZeroDivisionError: division by zero"]),
    ("def f(:\n", ["SyntaxError: invalid syntax (plug_bad.py, line 1)"]),
    ("import sys\nsys.exit()", ["plug_bad.py:2)", "SystemExit"]),
    ("raise ValueError('two\\nlines')", ["ValueError: two lines"]),
    ("import gin\n@gin.configurable\ndef plugged_fault(x): return x\n"
     "plugged_fault(1, 2)", ["plug_bad.py:4)", "TypeError"]),
])
def test_a_plugin_that_fails(refused, folder, text, words):
  (folder / "plug_bad.py").write_text(text)
  line = refused("--plugin=plug_bad")
  for word in ["--plugin=plug_bad cannot be imported", *words]:
    assert word in line, line


@pytest.mark.parametrize("name,words", [
    ("plug_lost", ["--plugin=plug_lost cannot be imported: ModuleNotFoundError",
                   "No module named 'plug_lost'"]),
    ("plug.py/x", ["must be the name of a module", "'plug.py/x'"]),
    ("./plug_good.py", ["must be the name of a module", "'./plug_good.py'"]),
    (".plug_good", ["must be the name of a module", "'.plug_good'"]),
    ("", ["must be the name of a module", "''"]),
    # The module is not run for its name's sake.
    ("plug_good.py", ["No module named 'plug_good.py'"]),
])
def test_a_plugin_that_is_not_there(refused, folder, name, words):
  (folder / "plug_good.py").write_text("")
  line = refused(f"--plugin={name}")
  for word in words:
    assert word in line, line


def test_only_what_is_named_is_imported(refused, folder):
  (folder / "plug_named.py").write_text("")
  (folder / "plug_other.py").write_text("open('ran', 'w').close()")
  # A configuration still imports nothing.
  line = refused("--plugin=plug_named", "--gin_param=import plug_other")
  assert "must not import. Received: 'import plug_other'" in line
  line = refused("--plugin=plug_named",
                 "--gin_param=DATASET = @plug_other.images()")
  assert "plug_other.images" in line


@pytest.mark.slow
def test_the_console_command_finds_a_plugin(folder):
  """pip's script does not have the working folder on its path."""
  (folder / "plug_console.py").write_text("print('plugged')\n")
  code = (f"import sys; sys.path.insert(0, {ROOT!r}); "
          "from ddss_tf import main; main.cli()")
  result = subprocess.run(
      [sys.executable, "-P", "-c", code, "--mode=zoo", "--plugin=plug_console"],
      capture_output=True, text=True, check=False)
  assert result.returncode == 0, result.stderr
  first, head, *rest = result.stdout.splitlines()
  assert first == "plugged" and head.split()[:2] == ["name", "model"] and rest
