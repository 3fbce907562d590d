"""The order of the packages: imports run downward only, and parts stay small."""

import ast
import os

import pytest

from project import ROOT

PACKAGE = os.path.join(ROOT, "ddss_tf")
# Modules that stand below all packages.
GROUND = {"errors", "storage", "version"}
NEVER = {
    "denoisers": {"samplers", "formats", "features", "objectives"},
    "samplers": {"denoisers"}, "objectives": {"features", "denoisers"},
    "reporting": {"evaluation", "exporting"},
    "exporting": {"evaluation"}, "searching": {"evaluation"}}
ONLY = {"networks": set(), "runs": {"distribution"}}
# The one sampler module that calls networks; and the doors to our own format,
# which a method opens when it is called.
ALLOWED = {("samplers.generator", "denoisers.denoiser"),
           ("denoisers.denoiser", "formats.own")}


def modules():
  for folder, _, files in os.walk(PACKAGE):
    for file in files:
      if file.endswith(".py") and "assets" not in folder:
        path = os.path.join(folder, file)
        name = os.path.relpath(path, PACKAGE)[:-3].replace(os.sep, ".")
        with open(path, encoding="utf-8") as f:
          yield name, ast.parse(f.read())


MODULES = dict(modules())


def imported(tree):
  """Modules of ours that a module imports, inside of functions too."""
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and (
        node.module or "").split(".")[0] == "ddss_tf":
      base = node.module.removeprefix("ddss_tf").lstrip(".")
      for alias in node.names:
        full = f"{base}.{alias.name}".lstrip(".")
        yield full if full in MODULES else base or "the package root"
    if isinstance(node, ast.Import):
      for alias in node.names:
        if alias.name.split(".")[0] == "ddss_tf":
          yield alias.name.removeprefix("ddss_tf.")


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_downward(name):
  package = name.split(".")[0] if "." in name else ""
  for other in set(imported(MODULES[name])) - GROUND:
    target = other.split(".")[0]
    if name in ("__init__", "main", "configuration") or (
        (name, other) in ALLOWED or target == package):
      continue
    assert target not in ("main", "configuration", "ddss_tf",
                          "the package root"), other
    assert target != "searching" or package in ("evaluation", "searching"), other
    assert target not in NEVER.get(package, ()), other
    assert package not in ONLY or target in ONLY[package], other
    if not package:  # A module below the packages, but for the zoo.
      assert name == "zoo" or "." not in other, other


def test_no_circles():
  state = {}

  def visit(name, chain):
    if name in chain:
      raise AssertionError(" -> ".join([*chain[chain.index(name):], name]))
    if name not in state and name in MODULES:
      for other in sorted(set(imported(MODULES[name]))):
        if (name, other) not in ALLOWED:
          visit(other, [*chain, name])
      state[name] = True

  for name in MODULES:
    if name != "__init__":
      visit(name, [])


@pytest.mark.parametrize("name", sorted(MODULES))
def test_parts_are_small(name):
  tree = MODULES[name]
  last = tree.body[-1].end_lineno if tree.body else 0
  assert last <= 500
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef):
      body = node.body[1:] if ast.get_docstring(node) else node.body
      size = body[-1].end_lineno - body[0].lineno + 1 if body else 0
      assert size <= 100, (node.name, size)


def test_no_test_imports_another():
  """What several tests use lies in tests/support."""
  folder = os.path.join(ROOT, "tests")
  files = [os.path.join(path, file) for path, _, names in os.walk(folder)
           for file in names if file.endswith("_test.py")]
  assert len(files) > 50
  tests = {os.path.basename(file)[:-3] for file in files}
  for file in files:
    with open(file, encoding="utf-8") as f:
      tree = ast.parse(f.read())
    for node in ast.walk(tree):
      names = ([alias.name for alias in node.names]
               if isinstance(node, ast.Import) else
               [node.module] if isinstance(node, ast.ImportFrom) else [])
      assert not tests & set(names), (file, names)


@pytest.mark.parametrize("name", sorted(set(MODULES) - {
    "storage", "console", "datasets.ddss_digits.ddss_digits_dataset_builder"}))
def test_files_are_reached_through_storage(name):
  """What opens, lists, moves or removes a file lies in storage.py."""
  refused = {
      "os": {"listdir", "scandir", "walk", "remove", "unlink", "rename",
             "replace", "makedirs", "mkdir", "rmdir", "truncate", "open"},
      "os.path": {"exists", "lexists", "isfile", "isdir", "getsize"},
      "shutil": {"rmtree", "copy", "copyfile", "copytree", "move"},
      "glob": {"glob"}, "np": {"load"}}
  for node in ast.walk(MODULES[name]):
    if isinstance(node, ast.Attribute):
      assert node.attr not in refused.get(ast.unparse(node.value), ()), (
          node.lineno, ast.unparse(node))
    if isinstance(node, ast.Call):
      assert ast.unparse(node.func) != "open", node.lineno
