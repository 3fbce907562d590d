"""Tests of the pages in docs/: their code runs, their links lead somewhere."""

import glob
import os
import re

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PAGES = sorted(
    os.path.relpath(page, ROOT)
    for page in glob.glob(os.path.join(ROOT, "docs", "**", "*.md"),
                          recursive=True))


def text(page):
  with open(os.path.join(ROOT, page), encoding="utf-8") as f:
    return f.read()


def blocks(page):
  return re.findall(r"^```python\n(.*?)^```", text(page), re.M | re.S)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_code_of_a_page_runs(page, tmp_path, monkeypatch):
  # The blocks of a page follow each other, as a reader would type them.
  monkeypatch.chdir(tmp_path)
  names = {}
  for block in blocks(page):
    exec(compile(block, page, "exec"), names)  # pylint: disable=exec-used


def test_pages_with_code():
  assert {"docs/index.md", "docs/method.md"} <= {
      page for page in PAGES if blocks(page)}


@pytest.mark.parametrize("page", [*PAGES, "README.md"])
def test_links_of_a_page(page):
  for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text(page)):
    if not target.startswith("http"):
      path = os.path.join(ROOT, os.path.dirname(page), target)
      assert os.path.exists(path), f"{page}: {target}"


def test_every_reference_exists():
  # Griffe reads the source without importing it; so does this.
  for page in PAGES:
    for name in re.findall(r"^::: ddss_tf\.(\S+)", text(page), re.M):
      module, _, member = name.partition(".")
      with open(os.path.join(ROOT, "ddss_tf", module + ".py"),
                encoding="utf-8") as f:
        source = f.read()
      members = [member] if member else []
      for listed in re.findall(
          rf"^::: ddss_tf\.{re.escape(name)}\n    options: .*members: "
          r"\[([^\]]*)\]", text(page), re.M):
        members += listed.split(", ")
      for each in members:
        assert re.search(rf"^(def|class) {each}\b", source, re.M), (page, each)
