"""Tests of the page about a run in a real browser, if there is one."""

import importlib.util
import os
import shutil

import numpy as np
import PIL.Image
import pytest
import reported_run

from ddss_tf.reporting import report as report_lib
from ddss_tf.runs import run_dir as run_dir_lib
from project import ROOT

WIDTHS = (1280, 390)  # A screen and a telephone.
BROWSER = next(filter(None, map(shutil.which, (
    "chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None,
                       reason="playwright is not installed"),
    pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed"),
]

# What is wrong with a page, for a reader; everything is unfolded first.
FAULTS = """() => {
  document.querySelectorAll("details").forEach(each => each.open = true);
  const faults = [];
  const visible = each => {
    const box = each.getBoundingClientRect();
    return box.width > 0 && box.height > 0 && each.checkVisibility();
  };
  for (const image of document.images) {
    if (!image.complete || image.naturalWidth == 0)
      faults.push("not decoded: " + image.alt);
    else if (!visible(image))
      faults.push("not visible: " + image.alt);
    else if (image.naturalWidth != image.getAttribute("width"))
      faults.push("another width: " + image.alt);
  }
  for (const row of document.querySelectorAll("tr"))
    if (!visible(row))
      faults.push("not visible: " + row.innerText);
  const page = document.documentElement;
  if (page.scrollWidth > page.clientWidth)
    faults.push("wider than the window: " + page.scrollWidth);
  for (const cell of document.querySelectorAll("td, th, dd, p, h1, h2, h3"))
    if (cell.scrollWidth > cell.clientWidth + 1 && visible(cell))
      faults.push("text out of its box: " + cell.innerText);
  return faults;
}"""


@pytest.fixture(scope="module")
def browser():
  from playwright import sync_api  # pylint: disable=g-import-not-at-top
  with sync_api.sync_playwright() as playwright:
    # The sandbox asks for a user other than root.
    found = playwright.chromium.launch(
        executable_path=BROWSER, args=["--no-sandbox"])
    yield found
    found.close()


def look(browser, path, width, color_scheme="light"):
  """(open page, its faults), of a file read without a network."""
  context = browser.new_context(
      viewport={"width": width, "height": 900}, offline=True,
      color_scheme=color_scheme, is_mobile=width < 500)
  page = context.new_page()
  address = "file://" + os.path.abspath(path)
  faults = []
  page.on("console", lambda message: faults.append(
      f"console: {message.text}"))
  page.on("pageerror", lambda error: faults.append(f"script: {error}"))
  page.on("request", lambda request: faults.append(f"asks: {request.url}")
          if not request.url.startswith("data:") and request.url != address
          else None)
  page.goto(address, wait_until="load")
  faults += page.evaluate(FAULTS)
  return page, faults


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
  """Pages of a run with all its pictures and of a comparison, by name."""
  run = tmp_path_factory.mktemp("run")
  reported_run.write_run(str(run))
  rng = np.random.default_rng(0)
  for name, size in (
      ("samples.png", (1400, 600)), ("generated.png", (300, 300)),
      ("coefficients.png", (1200, 700)), ("path.png", (900, 300)),
      ("before_after.png", (1100, 280))):
    PIL.Image.fromarray(rng.integers(0, 256, size[::-1], np.uint8)).save(
        str(run / name))
  # The measured one, which is in the repository.
  table = tmp_path_factory.mktemp("table") / "digits16"
  shutil.copytree(os.path.join(ROOT, "results", "digits16"), table)
  return {"run": report_lib.report(str(run)),
          "comparison": report_lib.report(str(table))}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name,pictures,rows", [
    ("run", ("samples.png", "generated.png", "coefficients.png", "path.png",
             "before_after.png", run_dir_lib.FID_BY_STEPS), 3),
    ("comparison", (run_dir_lib.FID_BY_STEPS,), 44)])
def test_a_report(name, pictures, rows, width, browser, pages):
  for scheme in ("light", "dark"):
    page, faults = look(browser, pages[name], width, scheme)
    assert not faults
    assert page.locator("img").count() >= len(pictures)
    for picture in pictures:
      assert page.get_by_text(picture, exact=True).first.is_visible()
    assert page.locator("table").first.locator("tbody tr").count() == rows
    # The distance is seen without moving the table.
    distance = page.locator("tbody tr td").nth(1).bounding_box()
    assert distance["x"] + distance["width"] <= width
    folder = os.environ.get("DDSS_TF_SCREENSHOTS")  # To look at them.
    if folder:
      page.screenshot(path=os.path.join(
          folder, f"{name}-{width}-{scheme}.png"), full_page=True)
    page.context.close()


def test_faults_are_found(browser, tmp_path):
  """Or the test above would prove nothing."""
  path = tmp_path / "page.html"
  path.write_text(
      "<!DOCTYPE html><img src='https://example.org/a.png' alt='far'>"
      "<img src='data:image/png;base64,AAAA' alt='broken'>"
      "<details><summary>more</summary><table><tr style='display: none'>"
      "<td>hidden</td></tr></table></details><div style='width: 2000px'>wide"
      "</div><script>console.log('talks'); lost()</script>")
  page, faults = look(browser, path, 1280)
  page.context.close()
  for words in ("asks: https://example.org/a.png", "not decoded: far",
                "not decoded: broken", "not visible: hidden",
                "wider than the window: 20", "console: talks", "script: lost"):
    assert any(words in fault for fault in faults), (words, faults)
