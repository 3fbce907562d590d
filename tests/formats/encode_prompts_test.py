"""Tests of tools/encode_prompts.py that need no PyTorch.

What it makes of prompts is beside diffusers in `pipelines_test`.
"""

import os
import subprocess
import sys

import pytest

from project import ROOT, load_tool

TOOL = os.path.join(ROOT, "tools", "encode_prompts.py")


@pytest.fixture(scope="module")
def tool():
  return load_tool("encode_prompts")


def test_prompts_are_counted(tool, tmp_path):
  path = tmp_path / "prompts.txt"
  path.write_text("a cat\n\n  ein Fuß \na cat\n", encoding="utf-8")
  assert tool.read_prompts(str(path)) == (["a cat", "ein Fuß"], [2, 1])


@pytest.mark.parametrize("arguments, words", [
    (["{empty}", "out.npz"], "a prompt in each line"),
    (["{empty}", "out.txt"], "must end in .npz"), ([], "required")])
def test_bad_input_is_one_line(arguments, words, tmp_path):
  empty = tmp_path / "empty.txt"
  empty.write_text("\n")
  found = subprocess.run(
      [sys.executable, TOOL, str(tmp_path),
       *(argument.format(empty=empty) for argument in arguments)],
      cwd=tmp_path, capture_output=True, text=True, check=False)
  assert found.returncode and words in found.stderr.splitlines()[-1]
  assert "Traceback" not in found.stderr
  assert not os.path.exists(tmp_path / "out.npz")
