"""What all tests share."""

import collections
import os

# Before TensorFlow is imported, or it has no effect.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# No converted checkpoint outlives a test.
os.environ["DDSS_TF_CACHE"] = ""

import pytest

from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.datasets import load as data


# Files that take long: first, for a worker that begins one last
# would be waited for.
_LONG = ("main_test", "machines_test", "chain_test", "recipes_test",
         "weights_test", "not_finite_test", "shapes_test", "checkpoints_test",
         "samplers_test", "denoisers_test", "docs_test", "guidance_test",
         "bad_input_test", "edm_test", "metrics_test", "distribution_test",
         "plugin_test", "loading_test", "foreign_test", "compare_test")


@pytest.hookimpl(tryfirst=True)  # Before pytest leaves out what is slow.
def pytest_collection_modifyitems(items):
  cases = collections.defaultdict(set)
  for item in items:
    if quick := item.get_closest_marker("quick"):
      cases[item.path, item.originalname, quick.args].add(item.callspec.id)
      if item.callspec.id not in quick.args:
        item.add_marker(pytest.mark.slow)
  for (path, name, quick), found in cases.items():
    # A single case may be all that was asked for.
    if len(found) > 1 and not found.issuperset(quick):
      raise pytest.UsageError(
          f"{path}::{name}: quick must name its cases. Received: "
          f"{', '.join(set(quick) - found)}")
  places = {name: place for place, name in enumerate(_LONG)}
  items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session")
def tfds_dir(tmp_path_factory) -> str:
  """A folder for prepared data sets that no other run has touched."""
  return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture(scope="session")
def digits(tfds_dir) -> dataset_lib.ImageDataset:
  """The 10 000 digits, 16x16."""
  return data.load_dataset(
      "ddss_digits", pad=2, downsample=2, data_dir=tfds_dir)


@pytest.fixture(scope="session")
def gaussian_parts():
  """Denoiser, data set and features of 4x4 Gaussian images."""
  import gaussian_parts as parts  # pylint: disable=g-import-not-at-top
  return parts.make()


@pytest.fixture(scope="session")
def main_in_process():
  """Runs the command line here: a process of its own would import TensorFlow.

  Called with the arguments of a command, without the program.
  """
  from absl import flags  # pylint: disable=g-import-not-at-top
  import gin  # pylint: disable=g-import-not-at-top
  from ddss_tf import main  # pylint: disable=g-import-not-at-top

  # A process has those of one command; gin offers no way to take them back.
  folders = gin.config._LOCATION_PREFIXES  # pylint: disable=protected-access

  def run(arguments):
    gin.clear_config()
    before = list(folders)
    flags.FLAGS.unparse_flags()
    flags.FLAGS(["main", *arguments])
    try:
      main.main(["main"])
    finally:
      folders[:] = before
      gin.clear_config()
      flags.FLAGS.unparse_flags()
      for name in ("gin_file", "gin_param", "run_dir", "mode", "dry_run",
                   "sampler", "plugin"):
        flags.FLAGS[name].unparse()

  return run


@pytest.fixture(scope="session")
def gaussian_config(tmp_path_factory):
  """A gin file of a run of the Gaussian parts, of seconds."""
  import gaussian_parts as parts  # pylint: disable=g-import-not-at-top
  return parts.save(str(tmp_path_factory.mktemp("parts")))


@pytest.fixture(scope="session")
def parts(gaussian_parts):
  """The same, by the name of what `ddss_tf.search` takes."""
  return gaussian_parts


@pytest.fixture(scope="session")
def finished(gaussian_parts, tmp_path_factory):
  """The run directory of an uninterrupted search, and its sampler."""
  import ddss_tf  # pylint: disable=g-import-not-at-top
  import small_searches  # pylint: disable=g-import-not-at-top
  run = str(tmp_path_factory.mktemp("finished"))
  return run, ddss_tf.search(
      run_dir=run, **gaussian_parts, **small_searches.options())


@pytest.fixture
def bind():
  """Binds what gin is told, until the test ends."""
  import gin  # pylint: disable=g-import-not-at-top
  from ddss_tf import configuration  # pylint: disable=g-import-not-at-top
  del configuration  # Imported, it has registered all that can be bound.
  gin.clear_config()
  yield gin.parse_config
  gin.clear_config()
