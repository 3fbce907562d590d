"""Tests of what a person may get wrong, by the command line.

Each ends with status 2 and one line, and leaves the disk as it was.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pickle
import resource
import shutil
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from project import ROOT



def snapshot(folder) -> dict[str, str]:
  """Hashes of all files below a folder, "" for folders, by path."""
  found = {}
  for root, folders, files in os.walk(folder):
    found.update({os.path.join(root, name): "" for name in folders})
    for name in files:
      with open(os.path.join(root, name), "rb") as f:
        found[os.path.join(root, name)] = hashlib.file_digest(
            f, "sha256").hexdigest()
  return found


@pytest.fixture
def refused(main_in_process, gaussian_config, capsys):
  """Runs a command that must be refused, and gives its one line.

  Called with the run_dir, bindings, and the folder that must not change.
  """

  def call(run_dir, *params, unchanged, mode="run", config=gaussian_config,
           strict=True):
    before = snapshot(unchanged)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
      main_in_process([
          f"--gin_file={config}", f"--run_dir={run_dir}", f"--mode={mode}",
          *(f"--gin_param={param}" for param in params)])
    output = capsys.readouterr()
    assert ended.value.code == 2, output.err
    lines = output.err.strip("\n").splitlines()
    assert lines[-1].startswith("error: ") and not output.out
    assert "Traceback" not in output.err
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert not strict or len(lines) == 1, output.err
    assert snapshot(unchanged) == before
    return lines[0] if strict else lines[-1]

  return call


@pytest.fixture(scope="module")
def original(main_in_process, gaussian_config, tmp_path_factory):
  """A run directory with everything in it."""
  folder = str(tmp_path_factory.mktemp("run") / "whole")
  main_in_process([f"--gin_file={gaussian_config}", f"--run_dir={folder}"])
  return folder


@pytest.fixture
def finished(original, tmp_path):
  """A copy of it."""
  return shutil.copytree(original, tmp_path / "whole")


OBJECTIVE = "search.objective = "


@pytest.mark.parametrize("param,words", [
    ("NUM_STEPS = 0", ["from 1 to 1000", "num_steps=0"]),
    ("NUM_STEPS = -1", ["num_steps=-1"]),
    ("NUM_STEPS = 1001", ["num_steps=1001"]),
    ("NUM_STEPS = 2.5", ["whole number", "2.5"]),
    ("searched/make_sampler.family = 'magic'", ["ggdm", "'magic'"]),
    ("baseline/make_sampler.stride = 'cubic'", ["trailing", "'cubic'"]),
    ("searched/make_sampler.parameterisation = 'free'", ["paper", "'free'"]),
    ("search.sampler = @baseline/make_sampler", ["nothing to learn"]),
    (OBJECTIVE + "'beauty'", ["kid_linear", "'beauty'"]),
    (OBJECTIVE + "{'frechet': -1}", ["'frechet'", "above 0", "-1"]),
    (OBJECTIVE + "{'frechet': 'a'}", ["'frechet'", "above 0", "'a'"]),
    (OBJECTIVE + "3", ["search:"]),
    ("search.micro_batch_size = 17", ["micro_batch_size", "at most batch_size",
                                      "17"]),
    ("search.gradient_samples = 32", ["gradient_samples", "at most batch_size",
                                      "32"]),
    ("search.gradient_samples = 0", ["gradient_samples", ">= 1", "0"]),
    ("search.batch_size = 1", ["batch_size", ">= 2"]),
    ("search.batch_size = 'many'", ["whole number", "'many'"]),
    ("search.seed = -1", ["search.seed", "-1"]),
    ("search.seed = 2147483647", ["search.seed", "2147483647"]),
    ("search.learning_rate = 0", ["learning_rate", "above 0"]),
    ("search.learning_rate = 'high'", ["learning_rate", "'high'"]),
    ("search.x0_bound = 'soft'", ["clip or dynamic", "'soft'"]),
    ("search.rate_multipliers = {'colour': 1.0}", ["times", "colour"]),
    ("search.pool_samples = 15", ["pool_samples", "16", "15"]),
    ("make_strategy.name = 'tpu'", ["make_strategy.tpu", "address of a TPU"]),
    ("make_strategy.name = 'horovod'", ["mirrored, multi_worker", "horovod"]),
    ("search.feature_weights = [1, 2]", ["1 networks", "[1, 2]"]),
    ("search.feature_weights = [-1]", ["feature_weights", "above 0", "-1"]),
    ("search.feature_weights = ['a']", ["feature_weights", "above 0", "'a'"]),
    ("search.teacher = {'num_steps': 0}\nsearch.objective = 'teacher_pixels'",
     ["search.teacher", "num_steps"]),
    # Of the last stages, and found before the first.
    ("evaluate.num_samples = 3", ["evaluate.num_samples", ">= 4", "3"]),
    ("evaluate.batch_size = 0", ["evaluate.batch_size", "0"]),
    ("evaluate.x0_bound = 'soft'", ["evaluate.x0_bound", "'soft'"]),
    ("evaluate.baselines = ['dimm linear']",
     ["evaluate.baselines", "'ddim quadratic'", "unipc3-bh2", "'dimm linear'"]),
    ("evaluate.baselines = ['ddim cubic']", ["matched_trailing", "'ddim cubic'"]),
    ("evaluate.baselines = ['ddim']", ["a space and a stride", "'ddim'"]),
    ("evaluate.baselines = ['ggdm linear']", ["solver", "'ggdm linear'"]),
    ("evaluate.baselines = [3]", ["evaluate.baselines", "3"]),
    ("evaluate.baselines = 'ddim linear'", ["a list", "'ddim linear'"]),
    ("evaluate.baselines = None", ["evaluate.baselines must be a list", "None"]),
    ("evaluate.num_steps = 0", ["evaluate.num_steps", ">= 1", "0"]),
    ("evaluate.num_steps = 1001\nevaluate.baselines = ['ddim linear']",
     ["from 1 to 1000", "num_steps=1001"]),
    # Parts that do not fit.
    ("gaussian_denoiser.image_shape = (4, 4, 3)", ["(4, 4, 3)", "(4, 4, 1)"]),
    ("gaussian_denoiser.image_shape = (8, 8, 1)", ["(8, 8, 1)", "(4, 4, 1)"]),
    ("load_dataset.channels = 3", ["data set", "(4, 4, 3)"]),
    ("load_dataset.pad = 1", ["data set", "(6, 6, 1)"]),
    ("load_features.path = 'digits_cnn'", ["digits_cnn", "(16, 16, 1)"]),
    ("load_dataset.name = 'lost'", ["'lost'", "ddss_digits"]),
    ("load_dataset.name = 'folder:lost'", ["'lost'", "is missing"]),
    ("load_features.path = 'lost'", ["'lost'", "digits_resnet"]),
    ("load_features.logits_layer = 'lost'", ["'lost'", "logits"]),
    ("denoiser/gin.singleton.constructor = @load_denoiser\n"
     "load_denoiser.path = 'lost'", ["'lost'", "digits16-ddpm"]),
    # gin.
    ("search.bach_size = 3", ["bach_size"]),
    ("serch.seed = 3", ["serch"]),
    ("NUM_STEP = 3", ["'NUM_STEP'", "misspelt"]),
    ("search.seed = %SEEED", ["gin: the macro 'SEEED' must be bound"]),
    ("search.seed = = 3", ["gin:"]),
    ("search.seed = [1,", ["gin:"]),
    ("search.sampler = @os.system", ["os.system"]),
    ("search.denoiser = %gin.REQUIRED", ["search.denoiser", "overridden"]),
    ("evaluate.num_samples = %gin.REQUIRED", ["num_samples", "overridden"]),
])
def test_bad_bindings(refused, tmp_path, param, words):
  line = refused(tmp_path / "a" / "run", *param.split("\n"), unchanged=tmp_path)
  for word in words:
    assert word in line, line


def test_bindings_that_are_not_there(refused, gaussian_config, tmp_path):
  with open(gaussian_config) as f:
    text = f.read()
  run, config = tmp_path / "run", tmp_path / "less.gin"
  for gone, words in (("search.denoiser =", "search.denoiser must be bound"),
                      ("searched/make_sampler.family =", "family"),
                      ("evaluate.num_samples =", "num_samples must be bound"),
                      ("export.denoiser =", "export.denoiser must be bound"),
                      ("gaussian_denoiser.mean =", None)):
    assert gone in text
    config.write_text("\n".join(
        line for line in text.splitlines() if not line.startswith(gone)))
    if words:
      assert words in refused(run, unchanged=tmp_path, config=config)
  config.write_text('include "lost.gin"\n')
  assert "lost.gin" in refused(run, unchanged=tmp_path, config=config)


@pytest.mark.parametrize("where", ["file", "include", "parameter"])
@pytest.mark.parametrize("text", [
    "import evil", "import evil as good", "from evil import inner",
    "from __gin__ import dynamic_registration\nimport evil\n"
    "evil.search.denoiser = @evil.getcwd()"])
def test_a_configuration_runs_no_code(
    refused, gaussian_config, tmp_path, monkeypatch, where, text):
  """Not even before it is refused."""
  (tmp_path / "evil").mkdir()
  (tmp_path / "evil" / "__init__.py").write_text(
      f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
  (tmp_path / "evil" / "inner.py").write_text("")
  monkeypatch.syspath_prepend(str(tmp_path))
  config = tmp_path / "config.gin"
  with open(gaussian_config) as f:
    rest = f.read()
  params = text.splitlines() if where == "parameter" else []
  if where == "include":
    (tmp_path / "included.gin").write_text(text + "\n")
    text = 'include "included.gin"'
  config.write_text(rest if params else f"{text}\n{rest}")
  line = refused(tmp_path / "run", *params, unchanged=tmp_path, config=config)
  assert "must not import. Received: '" in line, line


def test_an_include_is_not_looked_for_in_packages(
    refused, tmp_path, monkeypatch):
  (tmp_path / "evil").mkdir()
  (tmp_path / "evil" / "__init__.py").write_text(
      f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
  (tmp_path / "evil" / "a.gin").write_text("")
  folder = tmp_path / "elsewhere"
  folder.mkdir()
  (folder / "config.gin").write_text('include "evil/a.gin"\n')
  monkeypatch.syspath_prepend(str(tmp_path))
  assert "'evil/a.gin'" in refused(
      tmp_path / "run", unchanged=tmp_path, config=folder / "config.gin")


@pytest.mark.parametrize("params,words", [
    (["compare.solvers = 'ddim'"],
     ["compare.solvers", "list of names", "'ddim'"]),
    (["compare.objectives = {'a': 'elbo'}", "search.x0_bound = 'clip'"],
     ["search.x0_bound must be None", "'elbo'"]),
    (["compare.num_steps = 5"], ["compare.num_steps", "list", "5"]),
    (["search.teacher = 'ddim'"], ["search.teacher", "by name", "'ddim'"])])
def test_arguments_of_another_kind(refused, tmp_path, params, words):
  parts = [f"compare.{name} = %{name.upper()}" for name in (
      "denoiser", "dataset", "features")]
  params = [*parts, "compare.num_samples = 40", "compare.num_steps = [2]",
            *params]
  line = refused(tmp_path / "run", *params, unchanged=tmp_path, mode="compare")
  assert all(word in line for word in words), line


def test_a_comparison_without_searches_needs_no_binding_of_one(
    refused, main_in_process, gaussian_config, tmp_path, capsys):
  config = tmp_path / "compare.gin"
  with open(gaussian_config) as f:
    lines = [line for line in f.read().splitlines()
             if not line.startswith(("search.", "searched/"))]
  config.write_text("\n".join([*lines, *(
      f"compare.{name} = %{name.upper()}" for name in (
          "denoiser", "dataset", "features")),
      "compare.num_samples = 40", "compare.num_steps = [2]", ""]))
  arguments = ["--mode=compare", f"--gin_file={config}", "--dry_run"]
  main_in_process([*arguments, "--gin_param=compare.families = []"])
  assert "compare.families = []" in capsys.readouterr().out
  line = refused(tmp_path / "run", config=config, mode="compare",
                 unchanged=tmp_path)
  assert "search.num_search_steps must be bound" in line


def test_several_feature_networks_build(
    main_in_process, gaussian_config, tmp_path, capsys):
  main_in_process([
      f"--gin_file={gaussian_config}", "--dry_run",
      "--gin_param=search.features = [%FEATURES, %FEATURES]"])
  assert "search.features = [%FEATURES, %FEATURES]" in capsys.readouterr().out


def test_several_held_out_networks_build(
    main_in_process, gaussian_config, capsys):
  main_in_process([
      f"--gin_file={gaussian_config}", "--dry_run",
      "--gin_param=evaluate.heldout_features = [%FEATURES, %FEATURES]"])
  assert ("evaluate.heldout_features = [%FEATURES, %FEATURES]"
          in capsys.readouterr().out)


@pytest.mark.parametrize("param,words", [
    ("evaluate.features = [%FEATURES, %FEATURES]",
     ["evaluate.features", "one feature network", "a list of 2"]),
    ("evaluate.heldout_features = [%FEATURES, 'digits_cnn']",
     ["evaluate.heldout_features", "a list of them", "'digits_cnn'"]),
    ("evaluate.heldout_features = @load_features",
     ["evaluate.heldout_features", "a feature network", "function"]),
    ("search.features = []", ["search.features", "Received: []"]),
    ("search.features = None", ["search.features", "Received: None"]),
])
def test_feature_networks_of_another_kind(refused, tmp_path, param, words):
  line = refused(tmp_path / "run", param, unchanged=tmp_path)
  assert all(word in line for word in words), line


def test_several_feature_networks_of_a_comparison(refused, tmp_path):
  line = refused(
      tmp_path / "run", "compare.denoiser = %DENOISER",
      "compare.dataset = %DATASET", "compare.num_samples = 40",
      "compare.num_steps = [2]", "compare.features = [%FEATURES, %FEATURES]",
      unchanged=tmp_path, mode="compare")
  assert "compare.features must be one feature network" in line


def test_paths_inside_an_archive_lead_nowhere(
    main_in_process, gaussian_config, tmp_path, capsys):
  features = os.path.join(os.path.dirname(gaussian_config), "features.keras")
  (tmp_path / "deep" / "deeper").mkdir(parents=True)
  path = shutil.copy(features, tmp_path / "deep" / "deeper")
  with zipfile.ZipFile(path, "a") as archive:
    for name in ("../evil", "assets/../../evil", str(tmp_path / "evil")):
      archive.writestr(name, "outside")
  before = snapshot(tmp_path)
  main_in_process([
      f"--gin_file={gaussian_config}", "--dry_run",
      f"--gin_param=load_features.path = '{path}'"])
  assert path in capsys.readouterr().out
  assert snapshot(tmp_path) == before


@pytest.fixture
def bad_files(tmp_path):
  """Files that are not what they seem, by what they are given as."""
  pixels = np.zeros((4, 4, 1), np.uint8)
  (tmp_path / "empty").mkdir()
  (tmp_path / "corrupt").mkdir()
  (tmp_path / "sizes").mkdir()
  for i in range(3):
    keras.utils.save_img(tmp_path / f"corrupt/{i}.png", pixels, scale=False)
  broken = tmp_path / "corrupt/1.png"
  broken.write_bytes(broken.read_bytes()[:40])
  for size in (4, 5):
    keras.utils.save_img(tmp_path / f"sizes/{size}.png",
                         np.zeros((size, size, 1)), scale=False)
  np.savez(tmp_path / "objects.npz", images=np.array(
      [Trap(tmp_path / "trapped")] * 2, dtype=object))
  (tmp_path / "text.npz").write_text("no archive")
  (tmp_path / "text.keras").write_text("no archive")
  images = keras.Input((4, 4, 1))
  flat = keras.layers.Flatten()(images)
  keras.Model(images, [
      keras.layers.Lambda(lambda x: x * 2, name="pool")(flat),
      keras.layers.Dense(3, name="logits")(flat)]).save(
          tmp_path / "lambda.keras")
  tf.saved_model.save(tf.Module(), tmp_path / "saved")
  for name in ("saved_model.pb", "variables/variables.index"):
    (tmp_path / "saved" / name).write_bytes(b"nonsense")
  (tmp_path / "saved.json").write_text(json.dumps({
      "prediction": "eps",
      "schedule": {"name": "linear", "num_train_steps": 1000}}))
  (tmp_path / "half").mkdir()
  own = tmp_path / "own"
  shutil.copytree(
      os.path.join(ROOT, "ddss_tf", "formats", "assets", "digits16-ddpm"), own)
  network = own / "network.keras"
  network.write_bytes(network.read_bytes()[:5000])
  # A Lambda in a denoiser of our own format.
  code = shutil.copytree(own, tmp_path / "code")
  shutil.copy(tmp_path / "lambda.keras", code / "network.keras")
  for suffix in (".pt", ".bin"):
    path = tmp_path / f"pickle{suffix}"
    # What `torch.save` writes: a pickle in an archive.
    with zipfile.ZipFile(path, "w") as archive:
      archive.writestr("pickle/data.pkl", pickle.dumps(
          Trap(tmp_path / "trapped")))
      archive.writestr("pickle/version", "3\n")
      archive.writestr("pickle/byteorder", "little")
  (tmp_path / "pickle.pt.json").write_text(json.dumps({
      "image_size": 4, "num_heads": 1, "diffusion_steps": 1000,
      "noise_schedule": "linear", "rescale_timesteps": False,
      "predict_xstart": False}))
  for name in ("config.json", "scheduler_config.json"):
    shutil.copy(os.path.join(ROOT, "tests", "testdata", "tiny_unet2d", name),
                tmp_path)
  return tmp_path


class Trap:
  """Makes a folder when it is unpickled."""

  def __init__(self, path):
    self._path = str(path)

  def __reduce__(self):
    return os.mkdir, (self._path,)


DENOISER = "denoiser/gin.singleton.constructor = @load_denoiser"


@pytest.mark.parametrize("param,words", [
    ("load_dataset.name = 'folder:{}/empty'", ["must hold images", "none"]),
    ("load_dataset.name = 'folder:{}/corrupt'", ["corrupt/1.png", "read"]),
    ("load_dataset.name = 'folder:{}/sizes'", ["one size", "sizes/5.png"]),
    ("load_dataset.name = 'npz:{}/objects.npz'", ["plain arrays"]),
    ("load_dataset.name = 'npz:{}/text.npz'", ["text.npz", "whole .npz"]),
    ("load_features.path = '{}/text.keras'", ["text.keras", "complete"]),
    ("load_features.path = '{}/lambda.keras'", ["lambda.keras", "safe"]),
    ("load_features.path = '{}/saved'", ["saved", "complete SavedModel"]),
    ("load_features.path = '{}/half'", ["half", "saved_model.pb"]),
    (f"{DENOISER}\nload_denoiser.path = '{{}}/own'",
     ["network.keras", "complete"]),
    (f"{DENOISER}\nload_denoiser.path = '{{}}/code'",
     ["network.keras", "safe"]),
    (f"{DENOISER}\nload_denoiser.path = '{{}}/half'", ["half", "config.json"]),
    (f"{DENOISER}\nload_denoiser.path = '{{}}/saved'",
     ["saved", "complete SavedModel"]),
    # Without PyTorch it is not even opened.
    (f"{DENOISER}\nload_denoiser.path = '{{}}/pickle.pt'", ["pickle.pt",
                                                           "PyTorch"]),
    (f"{DENOISER}\nload_denoiser.path = '{{}}/pickle.bin'", ["pickle.bin",
                                                            "PyTorch"]),
])
def test_bad_files(refused, bad_files, tmp_path, param, words):
  line = refused(tmp_path / "run", *param.format(bad_files).split("\n"),
                 unchanged=tmp_path)
  for word in words:
    assert word in line, line
  assert not (tmp_path / "trapped").exists()


def test_the_trap_is_one(tmp_path):
  # Or nothing would have been shown.
  pickle.loads(pickle.dumps(Trap(tmp_path / "trapped")))
  assert (tmp_path / "trapped").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mode,params,words", [
    ("search", ["search.seed = 9"], ["another seed: 0. Received: 9"]),
    ("run", ["search.num_search_steps = 9"], ["another num_search_steps"]),
    ("search", ["load_dataset.flip = True"], ["another dataset"]),
    ("search", ["searched/make_sampler.init = 'auto'", "search.seed = 2"],
     ["another seed"]),
    # Nothing is ranked first, which would take long and leave starts.json.
    ("search", ["searched/make_sampler.init = 'auto'",
                "searched/make_sampler.family = 'ggdm+pred'"],
     ["another sampler", "'time': False", "one of"]),
    ("search", ["searched/make_sampler.init = 'auto'",
                "search.start_candidates = [{'colour': 3}]"],
     ["'auto' must have a start", "'colour'"]),
    ("search", ["search.start_candidates = ['ddim']"],
     ["search.start_candidates must be a list of options", "['ddim']"]),
    ("search", ["search.micro_batch_size = 500"], ["at most batch_size"]),
    ("sample", ["sample.num_images = 0"], ["sample.num_images", ">= 1"]),
    ("sample", ["sample.label = 3"], ["sample.label", "3"]),
    ("dance", [], ["'dance'", "run, search"]),
])
def test_a_finished_run_stays_as_it_was(refused, finished, mode, params, words):
  line = refused(finished, *params, mode=mode, unchanged=finished)
  for word in words:
    assert word in line, line


@pytest.mark.parametrize("file,mode,words", [
    ("sampler.json", "export", ["sampler.json is damaged"]),
    ("sampler.json", "sample", ["sampler.json is damaged"]),
    ("sampler.json", "evaluate", ["sampler.json is damaged"]),
    ("metrics.json", "evaluate", ["metrics.json is damaged", "Delete it"]),
    ("checkpoints/search.json", "search", ["search.json is damaged"]),
    ("checkpoints/*.index", "search", ["must be readable", "ckpt-12", "ckpt-4"]),
])
@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00nonsense", b"[3]"])
def test_damaged_files(refused, finished, file, mode, words, content):
  for path in finished.glob(file):
    path.write_bytes(content)
  line = refused(finished, mode=mode, unchanged=finished)
  for word in words:
    assert word in line, line


def test_no_sampler_yet(refused, tmp_path):
  for mode in ("export", "sample"):
    line = refused(tmp_path / "run", mode=mode, unchanged=tmp_path)
    assert "run --mode=search first" in line
  # Nor is the lock left in a folder that was there.
  (tmp_path / "run").mkdir()
  refused(tmp_path / "run", mode="export", unchanged=tmp_path)


def test_no_number_of_steps_for_baselines_by_name(refused, tmp_path):
  line = refused(
      tmp_path / "run", "evaluate.baselines = ['ddim linear']", mode="evaluate",
      unchanged=tmp_path)
  for words in ("'ddim linear'", "--mode=search first", "evaluate.num_steps"):
    assert words in line


def test_a_run_dir_that_cannot_be_written_to(refused, tmp_path):
  (tmp_path / "file").write_text("")
  for path in (tmp_path / "file", tmp_path / "file" / "run", "/proc/nothing"):
    assert str(path) in refused(path, unchanged=tmp_path)


def test_a_run_dir_in_use(refused, finished):
  with open(finished / ".lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    for mode in ("run", "export"):
      line = refused(finished, mode=mode, unchanged=finished)
      assert "in use by another process" in line


@contextlib.contextmanager
def full_disk(room):
  """No file can grow beyond `room` bytes: writes fail as on a full disk."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("mode", ["evaluate", "sample", "export"])
def test_full_disk(refused, finished, mode):
  if mode == "evaluate":
    (finished / "metrics.json").unlink()  # Else there is nothing to measure.
  with full_disk(100):
    line = refused(finished, mode=mode, unchanged=finished, strict=False)
  assert "too large" in line.lower(), line


@pytest.mark.slow
def test_full_disk_in_the_middle_of_a_search(
    refused, main_in_process, gaussian_config, finished, tmp_path,
    monkeypatch):
  # All is there but the last checkpoint; with no room for it, the ones before
  # stay, and with room again the search ends as it would have.
  expected = (finished / "sampler.json").read_text()
  (finished / "sampler.json").unlink()
  for path in finished.glob("checkpoints/ckpt-12.*"):
    path.unlink()
  kept = snapshot(finished / "checkpoints")
  save = tf.train.CheckpointManager.save

  def without_room(*args, **kwargs):
    with full_disk(1000):
      return save(*args, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(tf.train.CheckpointManager, "save", without_room)
    line = refused(finished, mode="search", unchanged=tmp_path / "nowhere",
                   strict=False)
  assert "ckpt-12 cannot be written" in line and "ckpt-8" in line, line
  found = snapshot(finished / "checkpoints")
  assert kept.items() <= found.items()
  assert not [name for name in found if "temp" in name]
  main_in_process([f"--gin_file={gaussian_config}", f"--run_dir={finished}",
                   "--mode=search"])
  coefficients = [json.loads(text)["coefficients"] for text in (
      expected, (finished / "sampler.json").read_text())]
  assert coefficients[0] == coefficients[1]
