"""Damaged files: each is refused in one line, or read as the network it is.

Every case is drawn from its number: a format, and a damage to one of its files.
"""

import functools
import json
import os
import shutil
import sys
import types

import checkpoint_files
import edm_files
import foreign_models
import h5py
import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf

import ddss_tf
from ddss_tf.networks import unet
from ddss_tf.errors import UserError

# Zip files (.keras, .npz) and TensorFlow's checkpoints have checksums of what
# they hold, and our own format has the weights' hash. The others have none: a
# flipped bit of a weight makes another network, of another hash, and that is
# what `check` asks for.
FORMATS = ("diffusers", "ddpm", "edm.npz", "edm.safetensors", "own",
           "openai.pt", "saved_model", "keras", "weights.h5")


@pytest.fixture(scope="module")
def torch():
  """PyTorch, or what is needed of it, with archives of NumPy for files."""
  try:
    import torch as real  # pylint: disable=g-import-not-at-top
    yield real
    return
  except ImportError:
    pass

  def save(state, path):
    with open(path, "wb") as f:  # Or NumPy would add its own suffix.
      np.savez(f, **{name: tensor.numpy() for name, tensor in state.items()})

  def load(path, map_location="cpu", weights_only=True):
    del map_location, weights_only
    with np.load(path) as file:
      return {name: stand_in.from_numpy(value)
              for name, value in file.items()}

  stand_in = types.ModuleType("torch")
  stand_in.Tensor = stand_in.from_numpy = checkpoint_files.FakeTensor
  stand_in.save, stand_in.load = save, load
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(sys.modules, "torch", stand_in)
    yield stand_in


def small_unet():
  """A network of 20 kB, of numbers that are not small."""
  model = unet.build_unet(unet.UNetConfig(**SMALL))
  rng = np.random.default_rng(0)
  for variable in model.weights:
    variable.assign(rng.normal(size=variable.shape) / 3)
  return model


SMALL = dict(image_size=4, in_channels=1, out_channels=1, channels=(4, 8),
             blocks_per_level=1, norm_groups=2, attention_levels=(1,))
CARD = {"prediction": "eps", "time_scale": 0.5,
        "schedule": {"name": "linear", "num_train_steps": 100}}


@pytest.fixture(scope="module")
def originals(torch, tmp_path_factory):
  """By format: a folder, what to load in it, and a function of its identity."""
  base = tmp_path_factory.mktemp("originals")
  folders = {name: base / name for name in FORMATS}
  for folder in folders.values():
    folder.mkdir()
  checkpoint_files.write_folder(str(folders["diffusers"]), "diffusers_relu")
  weights, _ = checkpoint_files.read_fixture("ddpm_tf1")
  checkpoint_files.save_checkpoint(str(folders["ddpm"] / "model.ckpt-1"), {
      f"{name}/ExponentialMovingAverage": value
      for name, value in weights.items()})
  for name in ("edm.npz", "edm.safetensors"):
    edm_files.write(folders[name], "edm_song", name.removeprefix("edm"))
  weights, golden = checkpoint_files.read_fixture("openai_plain")
  torch.save({name: torch.from_numpy(value) for name, value in weights.items()},
             str(folders["openai.pt"] / "net.pt"))
  small_unet().save_weights(folders["weights.h5"] / "net.weights.h5")
  foreign_models.write(folders["saved_model"] / "net", lambda x, t: tf.tanh(
      x * t[:, None, None, None]))
  model = foreign_models.small_network()
  model.save(folders["keras"] / "net.keras")
  for path, card in (
      ("openai.pt/net.pt", json.loads(str(golden["card"]))),
      ("saved_model/net", CARD), ("keras/net.keras", CARD),
      ("weights.h5/net.weights.h5", CARD | {"preset": "preset.json"})):
    with open(base / (path + ".json"), "w") as f:
      json.dump(card, f)
  with open(folders["weights.h5"] / "preset.json", "w") as f:
    json.dump(SMALL, f)
  ddss_tf.Denoiser(model, ddss_tf.make_schedule(**CARD["schedule"]), "v").save(
      str(folders["own"]))
  loaded = {"diffusers": "", "ddpm": "", "own": "", "edm.npz": "edm_song.npz",
            "edm.safetensors": "edm_song.safetensors", "openai.pt": "net.pt",
            "saved_model": "net", "keras": "net.keras",
            "weights.h5": "net.weights.h5"}
  # Not all are asked for, and each once.
  loaded_identity = functools.cache(
      lambda path: identity(ddss_tf.load_denoiser(path)))
  return {name: (folders[name], path, functools.partial(
      loaded_identity, os.path.join(folders[name], path)))
          for name, path in loaded.items()}


def identity(denoiser):
  """(hash of all that a denoiser is, what it makes of an image)."""
  x = np.random.default_rng(0).normal(
      size=(1, *denoiser.image_shape)).astype(np.float32)
  return denoiser.key, denoiser.eps(x, 3.0).numpy().tobytes()


def files(folder):
  """Paths in a folder, below it too."""
  return sorted(os.path.relpath(os.path.join(root, name), folder)
                for root, _, names in os.walk(folder) for name in names)


def truncated(path, rng):
  size = os.path.getsize(path)
  with open(path, "r+b") as f:
    f.truncate(rng.integers(size))


def flipped(path, rng):
  with open(path, "r+b") as f:
    data = bytearray(f.read())
    # The first kilobyte, where the headers are, as often as all the rest.
    end = len(data) if rng.integers(2) else min(len(data), 1000)
    for place in rng.integers(end, size=rng.integers(1, 65)):
      data[place] ^= 1 << rng.integers(8)
    f.seek(0)
    f.write(data)


def emptied(path, rng):
  del rng
  os.truncate(path, 0)


def removed(path, rng):
  del rng
  os.remove(path)


def edited(path, rng):
  """Other tensors or other words, in a file that is whole."""
  if path.endswith(".json"):
    with open(path) as f:
      card = json.load(f)
    inner = card.get("init_kwargs", card)
    key = rng.choice(sorted(inner))
    values = [None, -1, 0, 1.5, "x", [], {}, True, 10**9]
    if rng.integers(2):
      del inner[key]
    else:
      inner[key] = values[rng.integers(len(values))]
    with open(path, "w") as f:
      json.dump(card, f)
  elif path.endswith(tuple(TENSORS)):
    read, write = TENSORS[os.path.splitext(path)[1]]
    tensors = dict(read(path))
    name = rng.choice(sorted(tensors))
    value = tensors.pop(name)
    how = rng.integers(6)
    if how == 0:
      name += "_"
    elif how == 1:
      value = value.astype(rng.choice(["int8", "int64", "bool"]))
    elif how == 2:
      value = value[..., None]
    elif how == 3:
      value = np.full_like(value, np.inf)
    elif how == 4:
      value = value.ravel()[:0]
    tensors |= {} if how == 5 else {name: np.ascontiguousarray(value)}
    write(tensors, path)
  else:
    flipped(path, rng)


def read_h5(path):
  found = {}
  with h5py.File(path) as file:
    file.visititems(lambda name, place: found.update(
        {name: place[()]} if isinstance(place, h5py.Dataset) else {}))
  return found


def write_h5(tensors, path):
  with h5py.File(path, "w") as file:
    for name, value in tensors.items():
      file[name] = value


def read_pt(path):
  torch = sys.modules["torch"]
  return {name: value.numpy() for name, value in torch.load(
      path, map_location="cpu", weights_only=True).items()}


def write_pt(tensors, path):
  torch = sys.modules["torch"]
  torch.save({name: torch.from_numpy(value)
              for name, value in tensors.items()}, path)


TENSORS = {
    ".npz": (np.load, lambda tensors, path: np.savez(path, **tensors)),
    ".safetensors": (safetensors.numpy.load_file, safetensors.numpy.save_file),
    ".h5": (read_h5, write_h5),
    ".pt": (read_pt, write_pt),
}
DAMAGES = (truncated, flipped, emptied, removed, edited, edited)


def check(originals, folder, case):
  """Damages a copy, and loads it."""
  rng = np.random.default_rng([2022, case])
  source, path, original = originals[FORMATS[case % len(FORMATS)]]
  if os.path.exists(folder):
    shutil.rmtree(folder)
  shutil.copytree(source, folder)
  name = rng.choice(files(folder))
  damage = DAMAGES[rng.integers(len(DAMAGES))]
  damage(os.path.join(folder, name), rng)
  what = f"case {case}: {damage.__name__} {name}"
  try:
    denoiser = ddss_tf.load_denoiser(os.path.join(folder, path))
  except UserError as error:
    # gin adds where it was bound.
    message = str(error).split("\n  In call to configurable")[0]
    assert "\n" not in message and len(message) < 1000, (
        f"{what}: {message[:1000]!r}")
    return False
  except Exception as error:
    raise AssertionError(f"{what}: {error!r}") from error
  # Read, and so whole: every weight is filled with numbers, none by chance.
  for variable in denoiser.model.weights:
    assert np.all(np.isfinite(variable)), f"{what}: {variable}"
  # Under its own name: what is called as the original is the original.
  found = identity(denoiser)
  assert found[0] != original()[0] or found == original(), what
  assert identity(ddss_tf.load_denoiser(
      os.path.join(folder, path))) == found, what
  return True


def run(originals, tmp_path, cases):
  read = [check(originals, str(tmp_path / "damaged"), case) for case in cases]
  # A test that refuses all, or none, would say little.
  assert 0 < sum(read) < len(read) / 2


@pytest.mark.slow
def test_damaged_files(originals, tmp_path):
  # Two of each format; some of these are read.
  run(originals, tmp_path, range(2 * len(FORMATS), 4 * len(FORMATS)))


@pytest.mark.slow
def test_500_damaged_files(originals, tmp_path):
  run(originals, tmp_path, range(500))
