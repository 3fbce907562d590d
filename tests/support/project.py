"""Folders and tools of the project, for tests."""

import importlib.util
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(
    os.path.abspath(__file__))))
TESTDATA = os.path.join(ROOT, "tests", "testdata")
SUPPORT = os.path.join(ROOT, "tests", "support")


def load_tool(name: str):
  """The module tools/NAME.py. Its flags are taken back: others may have the same."""
  from absl import flags  # pylint: disable=g-import-not-at-top

  tools = os.path.join(ROOT, "tools")
  spec = importlib.util.spec_from_file_location(
      name, os.path.join(tools, f"{name}.py"))
  module = importlib.util.module_from_spec(spec)
  before = set(flags.FLAGS)
  sys.path.insert(0, tools)  # Where tools find each other.
  try:
    spec.loader.exec_module(module)
  finally:
    sys.path.remove(tools)
    for flag in set(flags.FLAGS) - before:
      delattr(flags.FLAGS, flag)
  return module
