"""Tests of the page about a run: what it says is what the files say."""

import base64
import csv
import html.parser
import json
import re

import numpy as np
import pytest

from ddss_tf import schedules
from ddss_tf import storage
from ddss_tf.reporting import report as report_lib
from ddss_tf.runs import records as records_lib
from ddss_tf.samplers import solvers
from ddss_tf.errors import UserError
from reported_run import coefficients, record, write_card, write_run  # pylint: disable=unused-import

HOSTILE = '</td><script>alert("1")</script>&amp;{{ 7 * 7 }}$x'
_VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(html.parser.HTMLParser):
  """A page, taken apart; fails where elements are not closed in order."""

  def __init__(self, text):
    super().__init__()
    self.stack, self.tags, self.text, self.sources = [], [], "", []
    self.numbers = []  # Of all <data>: value and text.
    self.rows, self.row_numbers = [], []  # Of all <tr>: cells, <data>.
    self.feed(text)
    self.close()
    assert not self.stack, self.stack

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.tags.append((tag, attrs))
    if tag not in _VOID:
      self.stack.append(tag)
    if tag == "data":
      self.numbers.append([attrs["value"], ""])
      if "tr" in self.stack:
        self.row_numbers[-1].append(attrs["value"])
    if tag == "tr":
      self.rows.append([])
      self.row_numbers.append([])
    if tag in ("td", "th"):
      self.rows[-1].append("")
    self.sources += [attrs[name] for name in (
        "src", "href", "srcset", "action", "poster") if name in attrs]

  def handle_endtag(self, tag):
    assert self.stack.pop() == tag, tag

  def handle_data(self, text):
    self.text += text
    if self.stack and self.stack[-1] == "data":
      self.numbers[-1][1] += text
    if {"td", "th"} & set(self.stack):
      self.rows[-1][-1] += text


def test_a_column_for_every_held_out_network(tmp_path):
  networks = [{"name": name, "sha256": letter * 64, "protocol": "as is"}
              for name, letter in (("resnet", "d"), ("<vgg>", "e"))]
  records = [record(name, features_heldout=networks, fid_heldout=[fid, 3 * fid])
             for name, fid in (("DDIM linear", 1.23), ("PNDM linear", 4.56))]
  storage.write_json(str(tmp_path / "metrics.json"), records)
  page = page_of(tmp_path)
  assert page.rows[0][2:5] == [
      "FID-2k", "FID-2k held-out resnet", "FID-2k held-out <vgg>"]
  for row, numbers, each in zip(
      page.rows[1:3], page.row_numbers[1:3], records, strict=True):
    assert row[3:5] == [f"{fid:.2f}" for fid in each["fid_heldout"]]
    assert numbers[2:4] == [repr(fid) for fid in each["fid_heldout"]]
  with open(tmp_path / "report.html") as f:
    text = f.read()
  assert "features cnn, held-out resnet, &lt;vgg&gt;" in text
  for network in networks:
    assert network["sha256"] in text
  records[1]["fid_heldout"].pop()
  storage.write_json(str(tmp_path / "metrics.json"), records)
  with pytest.raises(UserError, match="metrics.json is damaged.*fid_heldout"):
    report_lib.report(str(tmp_path))


def page_of(folder):
  with open(report_lib.report(str(folder)), encoding="utf-8") as f:
    return Page(f.read())


def test_every_number_is_that_of_the_files(tmp_path):
  records = write_run(str(tmp_path))
  page = page_of(tmp_path)
  # Row by row: all digits in the element's value, rounded ones to be read.
  shown = slice(1, 1 + len(records))
  for row, exact, each in zip(
      page.rows[shown], page.row_numbers[shown], records, strict=True):
    assert row == [
        each["sampler"], "3", f"{each['fid']:.2f}",
        f"{each['fid_heldout']:.2f}",
        f"{each['kid']:.4f} ± {each['kid_std']:.4f}",
        f"{each['inception_score']:.2f}",
        f"{each['timing']['seconds_per_image']:.3g}"]
    assert exact == [repr(value) for value in (
        each["num_steps"], each["fid"], each["fid_heldout"], each["kid"],
        each["kid_std"], each["inception_score"],
        each["timing"]["seconds_per_image"])]
  # No number on the page is of nowhere.
  known = set()

  def collect(value):
    if isinstance(value, dict):
      value = list(value.values())
    if isinstance(value, list):
      for inner in value:
        collect(inner)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
      known.add(repr(value))

  for name in ("metrics.json", "sampler.json"):
    collect(json.loads((tmp_path / name).read_text()))
  assert {value for value, _ in page.numbers} <= known
  for value, text in page.numbers:
    digits = len(text.partition(".")[2])
    assert abs(float(value) - float(text)) <= max(
        0.5 * 10**-digits, 0.005 * abs(float(value))), (value, text)


def test_page_is_one_file_that_loads_nothing(tmp_path):
  write_run(str(tmp_path))
  page = page_of(tmp_path)
  assert page.sources and all(
      source.startswith("data:image/png;base64,") for source in page.sources)
  assert not {"script", "link", "iframe", "object"} & {t for t, _ in page.tags}
  assert not [name for _, attrs in page.tags for name in attrs
              if name.startswith("on")]
  text = (tmp_path / "report.html").read_text()
  assert "url(" not in text and "@import" not in text
  policy = next(attrs["content"] for _, attrs in page.tags
                if attrs.get("http-equiv") == "Content-Security-Policy")
  assert policy.startswith("default-src 'none'")
  # The figures are those in the folder, and their text is there without them.
  embedded = [base64.b64decode(s.partition(",")[2]) for s in page.sources]
  for name in ("fid_by_steps.png", "quality_by_time.png"):
    assert (tmp_path / name).read_bytes() in embedded
  assert all(attrs["alt"] for tag, attrs in page.tags if tag == "img")


def test_hostile_names_are_text(tmp_path):
  write_run(str(tmp_path), label=HOSTILE, dataset=HOSTILE, denoiser={
      "name": HOSTILE, "sha256": HOSTILE}, features={
          "name": HOSTILE, "sha256": "a", "protocol": HOSTILE})
  storage.write_text(str(tmp_path / "config.gin"), HOSTILE)
  page = page_of(tmp_path)
  assert "script" not in {tag for tag, _ in page.tags}
  # As it is, wherever it stands: heading, tables, provenance, configuration.
  assert page.text.count(HOSTILE) >= 8


def test_rows_of_replaced_samplers_are_left_out(tmp_path):
  records = write_run(str(tmp_path))
  stale = record("GGDM", fid=0.01, coefficients_sha256="d" * 64)
  storage.write_json(str(tmp_path / "metrics.json"), [stale, *records])
  page = page_of(tmp_path)
  assert repr(stale["fid"]) not in [value for value, _ in page.numbers]
  assert re.search(r"Left out: 1 more of\s+metrics.json", page.text)


def test_other_numbers_of_samples_are_tables_of_their_own(tmp_path):
  records = write_run(str(tmp_path))
  few = [{**each, "num_samples": 100, "fid": each["fid"] + 1}
         for each in records[:2]]
  storage.write_json(str(tmp_path / "metrics.json"), [*few, *records])
  heads = [row for row in page_of(tmp_path).rows if row[0] == "sampler"]
  assert [row[2] for row in heads[:2]] == ["FID-2k", "FID-100"]


def test_seeds_are_told_apart_and_the_luckiest_is_not_the_best(tmp_path):
  storage.write_json(str(tmp_path / "metrics.json"), [
      record(name, seed=seed, fid=fid) for name, seed, fid in (
          ("DDIM linear", 1234, 2.0), ("DDIM linear", 7, 0.1),
          ("PNDM linear", 1234, 1.0), ("PNDM linear", 7, 3.0))
  ] + [record("DDPM (full chain)", 1000, fid=0.01)])
  page = page_of(tmp_path)
  assert page.rows[0][:4] == ["sampler", "K", "seed", "FID-2k"]
  assert [row[2] for row in page.rows[1:6]] == [
      "1234", "7", "1234", "7", "1234"]
  text = (tmp_path / "report.html").read_text()
  assert "<h1>3 samplers on" in text
  assert re.findall('<tr class="best"><th scope="row">(.*?)<', text) == [
      "PNDM linear", "PNDM linear"]


def test_comparison(tmp_path):
  best = write_card(str(tmp_path / "k3" / "ggdm+pred"), "GGDM+PRED")
  write_card(str(tmp_path / "k3" / "vars"), "VARS", coefficients("ddim"))
  records = [
      record("DDIM linear"), record("VARS", fid=9.5),
      record("GGDM+PRED", fid=0.25, coefficients_sha256=best),
      record("DDIM trailing", 5, fid=3.5)]
  # Measured in another order, and once before with another result.
  stale = record("GGDM+PRED", fid=0.1)
  storage.write_json(str(tmp_path / "metrics.json"), [stale, *records[::-1]])
  records_lib.write_table(str(tmp_path / "table"), records)
  images = np.random.default_rng(0).integers(
      0, 256, (4, 8, 4, 4, 1)).astype(np.uint8)
  with open(tmp_path / "samples.npz", "wb") as f:
    np.savez(f, **{records_lib.sample_key(r): i for r, i in zip(records, images)})
  page = page_of(tmp_path)
  with open(tmp_path / "table.csv", newline="") as f:
    labels = [row["sampler"] for row in csv.DictReader(f)]
  assert [row[0] for row in page.rows[1:5]] == labels
  for name in ("fid_by_steps.png", "quality_by_time.png", "samples_k3.png",
               "samples_k5.png"):
    assert (tmp_path / name).exists() and name in page.text
  leads = re.findall(r"K = (\d):\s+(.*?)\.\n", page.text)
  assert [steps for steps, _ in leads] == ["3", "5"]
  assert "GGDM+PRED, FID-2k 0.25" in leads[0][1] and "3.50" in leads[1][1]
  # Both samplers are there, and how to use the better.
  summaries = [text for text in page.text.splitlines() if "k3/" in text]
  assert any("VARS" in text for text in summaries)
  folder = str(tmp_path / "k3" / "ggdm+pred")
  assert f"ddss_tf.export({folder!r}, denoiser)" in page.text
  storage.write_text(str(tmp_path / "config.gin"), "")
  assert f"--run_dir={folder}" in page_of(tmp_path).text.replace("'", "")
  assert f"{tmp_path}/k3/vars/sampler.json" not in page.text


def test_drawn_again_it_is_the_same(tmp_path):
  write_run(str(tmp_path))
  path = tmp_path / "report.html"
  page_of(tmp_path)
  before = path.read_bytes()
  (tmp_path / "fid_by_steps.png").unlink()
  page_of(tmp_path)
  assert path.read_bytes() == before


def test_use_of_an_exported_sampler(tmp_path):
  write_run(str(tmp_path))
  assert "--mode=export" in page_of(tmp_path).text
  (tmp_path / "export").mkdir()
  text = page_of(tmp_path).text
  assert f"tf.saved_model.load({str(tmp_path / 'export')!r})" in text
  assert "--mode=export" not in text
  (tmp_path / "diffusers_scheduler").mkdir()
  assert "pipe(num_inference_steps=3)" in page_of(tmp_path).text
  (tmp_path / "diffusers_scheduler" / "guidance.py").touch()
  assert "num_inference_steps=3, **guidance(" in page_of(tmp_path).text


def test_coefficients_of_a_flow(tmp_path):
  found = solvers.solver_coefficients(
      schedules.FlowSchedule(), "ddim", 3, "trailing").numpy()
  write_card(str(tmp_path), found=found)
  page = page_of(tmp_path)
  (head,) = [row for row in page.rows if row[:2] == ["step", "t"]]
  assert head[3].endswith(": v")
  for value in found.x0_from_v.astype(float):
    assert repr(float(value)) in [number for number, _ in page.numbers]


@pytest.mark.parametrize("name,content,message", [
    ("metrics.json", "[{}]", "metrics.json is damaged.*'num_samples'"),
    ("metrics.json", None, "metrics.json is damaged.*'fid'"),
    ("metrics.json", "[", "metrics.json is damaged"),
    ("sampler.json", "{}", "sampler.json is damaged"),
    ("samples.png", "text", "samples.png is damaged"),
    ("samples.npz", "text", "samples.npz is damaged"),
])
def test_damaged_files(tmp_path, name, content, message):
  write_run(str(tmp_path))
  if content is None:
    content = json.dumps([record("DDIM linear", fid="<b>")])
  (tmp_path / name).write_text(content)
  with pytest.raises(UserError, match=message):
    report_lib.report(str(tmp_path))
  assert not (tmp_path / "report.html").exists()


def test_an_empty_folder(tmp_path):
  with pytest.raises(UserError, match="run_dir must hold metrics.json or"):
    report_lib.report(str(tmp_path))
