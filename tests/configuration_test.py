"""Tests of gin files: includes, macros, scopes, encodings."""

import os

from absl import flags
import gin
import pytest

from ddss_tf import configuration
from ddss_tf import main
from ddss_tf.errors import UserError
import gaussian_parts
from project import ROOT



@pytest.fixture(name="small", scope="module")
def fixture_small(tmp_path_factory):
  return gaussian_parts.save(str(tmp_path_factory.mktemp("gaussian")))


@pytest.fixture(name="dry_run")
def fixture_dry_run(capsys):
  """Builds configurations in this process: (status, error line)."""
  folders = list(gin.config._LOCATION_PREFIXES)

  def run(*files, params=()):
    gin.clear_config()
    flags.FLAGS.unparse_flags()
    flags.FLAGS(["main", "--dry_run", *(f"--gin_file={file}" for file in files),
                 *(f"--gin_param={param}" for param in params)])
    capsys.readouterr()
    try:
      main.main(["main"])
    except SystemExit as error:
      lines = capsys.readouterr().err.strip().splitlines()
      return error.code, lines[-1]
    return 0, ""

  yield run
  gin.config._LOCATION_PREFIXES[:] = folders
  gin.clear_config()
  flags.FLAGS.unparse_flags()
  for name in ("gin_file", "gin_param", "dry_run"):
    flags.FLAGS[name].unparse()


def write(folder, name, text, **options):
  path = folder / name
  os.makedirs(path.parent, exist_ok=True)
  with open(path, "w", **{"encoding": "utf-8", **options}) as f:
    f.write(text)
  return str(path)


def read(path):
  with open(path, encoding="utf-8") as f:
    return f.read()


@pytest.mark.parametrize("depth", [1, 2, 3, 6])
def test_includes_are_relative_to_the_file_that_has_them(
    depth, small, dry_run, tmp_path):
  folder = "/".join(f"sub{i}" for i in range(depth))
  write(tmp_path, f"{folder}/base.gin", read(small))
  for i in range(depth):
    below = "/".join(f"sub{j}" for j in range(i))
    write(tmp_path, f"{below}/mid.gin" if below else "mid.gin",
          f'include "sub{i}/{"base" if i == depth - 1 else "mid"}.gin"\n')
  assert dry_run(tmp_path / "mid.gin") == (0, "")


def test_the_same_name_in_two_folders(small, dry_run, tmp_path):
  """Each file gets the one beside it."""
  write(tmp_path, "a/part.gin", read(small))
  write(tmp_path, "a/top.gin", 'include "part.gin"\n')
  write(tmp_path, "b/part.gin", "search.seed = 77\n")
  write(tmp_path, "b/top.gin", 'include "part.gin"\n')
  top = write(tmp_path, "top.gin",
              'include "a/top.gin"\ninclude "b/top.gin"\n')
  assert dry_run(top) == (0, "")
  assert gin.query_parameter("search.seed") == 77


@pytest.mark.slow
def test_shipped_files_are_included_from_anywhere(dry_run, tmp_path):
  own = write(tmp_path, "mine/own.gin",
              f'include "{ROOT}/gin_configs/demo.gin"\nsearch.seed = 3\n')
  assert dry_run(own) == (0, "")


@pytest.mark.parametrize("text,words", [
    ('include "nothing.gin"\n', ["nothing.gin", "Received"]),
    ('include "self.gin"\n', ["self.gin"]),
    ("import os\n", ["import"]),
])
def test_includes_that_are_refused(text, words, dry_run, tmp_path):
  path = write(tmp_path, "self.gin", text)
  status, line = dry_run(path)
  assert status == 2 and line.startswith("error: ")
  assert all(word in line for word in words)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_text_files_of_windows(encoding, newline, small, dry_run, tmp_path):
  path = write(tmp_path, "own.gin", read(small), encoding=encoding,
               newline=newline)
  assert dry_run(path) == (0, "")


def test_utf_16_is_read_or_told(small, dry_run, tmp_path):
  path = write(tmp_path, "own.gin", read(small), encoding="utf-16")
  status, line = dry_run(path)
  assert status == 0 or "own.gin" in line and "UTF-16" in line.upper()


@pytest.mark.parametrize("use", [
    "search.batch_size = %SIZE", "search.rate_multipliers = {'times': %SIZE}",
    "search.start_samples = %OTHER\nOTHER = %SIZE"])
@pytest.mark.parametrize("later", ["params", "file"])
def test_macros_whose_use_is_overridden(use, later, small, dry_run, tmp_path):
  path = write(tmp_path, "own.gin", f"{read(small)}\nSIZE = 16\n{use}\n")
  override = use.splitlines()[0].split(" =")[0] + {
      "search.rate_multipliers": " = None"}.get(use.split(" =")[0], " = 8")
  if later == "params":
    assert dry_run(path, params=[override]) == (0, "")
  else:
    assert dry_run(path, write(tmp_path, "b.gin", override + "\n")) == (0, "")


def test_a_macro_that_nothing_uses_is_told(small, dry_run):
  status, line = dry_run(small, params=["NUM_STESP = 3"])
  assert status == 2 and "'NUM_STESP'" in line


@pytest.mark.parametrize("binding,wrong,right", [
    ("searhced/make_sampler.init = 'ddim'", "searhced", "searched"),
    ("baselin/make_sampler.eta = 1.0", "baselin", "baseline"),
])
def test_a_scope_that_nothing_references_is_told(
    binding, wrong, right, small, dry_run):
  status, line = dry_run(small, params=[binding])
  assert status == 2 and wrong in line and right in line


def test_a_scope_whose_reference_is_overridden(small, dry_run):
  assert dry_run(small, params=["evaluate.baselines = []"]) == (0, "")


@pytest.mark.parametrize("later,words", [
    (["make_sampler.family = 'vars'"],
     ["make_sampler.family has no effect",
      "With an effect: ", "searched/make_sampler.family"]),
    (["searched/make_sampler.init = None", "make_sampler.init = 'ddim'"],
     ["With an effect: searched/make_sampler.init"]),
    (["denoiser/gaussian_denoiser.mean = 0.1", "gaussian_denoiser.mean = 0.2"],
     ["With an effect: denoiser/gaussian_denoiser.mean"]),
])
def test_a_binding_that_a_scope_overrides_is_told(later, words, small, dry_run):
  status, line = dry_run(small, params=later)
  assert status == 2 and all(word in line for word in words), line


@pytest.mark.parametrize("later", [
    # A later binding in the scope replaces an earlier one without.
    ["features/load_features.path = 'digits_cnn'", "load_dataset.max_images = 9"],
    # One of the scopes has no binding of this argument, the other none at all.
    ["make_sampler.stride = 'quadratic'"],
    # Nothing is called in the scope any more.
    ["search.sampler = @make_sampler", "evaluate.baselines = []",
     "make_sampler.family = 'vars'", "make_sampler.num_steps = 2"],
])
def test_a_binding_that_wins_is_taken(later, small, dry_run, tmp_path):
  del tmp_path
  if "digits_cnn" in later[0]:
    later = [*later, "gaussian_denoiser.image_shape = (16, 16, 1)"]
    status, line = dry_run(small, params=later)
    # The features are the digits' now, whose size the images lack.
    assert status == 2 and "has no effect" not in line, line
  else:
    assert dry_run(small, params=later) == (0, "")


def test_what_must_be_bound_is_told_by_the_name_that_works(small, dry_run):
  text = read(small).replace("searched/make_sampler.num_steps = %NUM_STEPS\n", "")
  with open(small + ".without", "w", encoding="utf-8") as f:
    f.write(text)
  assert dry_run(small + ".without") == (
      2, "error: gin: searched/make_sampler.num_steps must be bound")


@pytest.mark.slow
def test_errors_name_the_binding_that_works(dry_run, monkeypatch, tmp_path):
  """Following the advice of a message must help."""
  monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path))
  (tmp_path / ("0" * 40)).mkdir()
  monkeypatch.setattr("ddss_tf.features.hub._fetched", refuse)
  path = write(tmp_path, "own.gin", f"""
include "{ROOT}/gin_configs/digits.gin"
include "{ROOT}/gin_configs/features/inception.gin"
NUM_STEPS = 2
NUM_SAMPLES = 8
searched/make_sampler.family = "vars"
search.num_search_steps = 2
search.batch_size = 4
""")
  status, line = dry_run(path)
  assert status == 2 and "set loss/load_features.path to" in line, line


def refuse(handle):
  raise OSError(f"no network for {handle}")


def test_every_shipped_file_is_free_of_lost_bindings():
  """All that can be parsed alone, whatever macros it leaves to bind."""
  folder = os.path.join(ROOT, "gin_configs")
  paths = [os.path.join(top, name) for top, _, names in os.walk(folder)
           for name in names if name.endswith(".gin")]
  assert len(paths) > 30
  for path in paths:
    gin.clear_config()
    try:
      configuration.parse([path], [])
    except UserError as error:
      assert "binding in the scope" not in str(error), (path, error)
  gin.clear_config()
