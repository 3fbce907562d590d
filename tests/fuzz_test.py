"""Damaged files: each is refused in one line, or read as the network it is.

Every case is drawn from its number: a format, and a damage to one of its files.
"""

import json
import os
import shutil

import checkpoints_test
import edm_test
import numpy as np
import pytest
import safetensors.numpy

import ddss_tf
from ddss_tf import denoisers
from ddss_tf.errors import UserError

FORMATS = ("diffusers", "ddpm", "edm.npz", "edm.safetensors", "own")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
  """By format: a folder, and what to load in it."""
  base = tmp_path_factory.mktemp("originals")
  folders = {name: base / name for name in FORMATS}
  for folder in folders.values():
    folder.mkdir()
  checkpoints_test.write_folder(str(folders["diffusers"]), "diffusers_relu")
  weights, _ = checkpoints_test.read_fixture("ddpm_tf1")
  checkpoints_test.save_checkpoint(str(folders["ddpm"] / "model.ckpt-1"), {
      f"{name}/ExponentialMovingAverage": value
      for name, value in weights.items()})
  for name in ("edm.npz", "edm.safetensors"):
    edm_test.write(folders[name], "edm_song", name.removeprefix("edm"))
  ddss_tf.load_denoiser(str(folders["diffusers"])).save(str(folders["own"]))
  return {"diffusers": (folders["diffusers"], ""),
          "ddpm": (folders["ddpm"], ""),
          "edm.npz": (folders["edm.npz"], "edm_song.npz"),
          "edm.safetensors": (folders["edm.safetensors"],
                              "edm_song.safetensors"),
          "own": (folders["own"], "")}


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
  elif path.endswith((".npz", ".safetensors")):
    read, write = ((np.load, lambda path, w: np.savez(path, **w))
                   if path.endswith(".npz") else (
                       safetensors.numpy.load_file,
                       lambda path, w: safetensors.numpy.save_file(w, path)))
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
    write(path, tensors)
  else:
    flipped(path, rng)


DAMAGES = (truncated, flipped, emptied, removed, edited, edited)


def check(originals, folder, case):
  """Damages a copy, and loads it."""
  rng = np.random.default_rng([2022, case])
  source, path = originals[FORMATS[case % len(FORMATS)]]
  if os.path.exists(folder):
    shutil.rmtree(folder)
  shutil.copytree(source, folder)
  name = rng.choice(sorted(os.listdir(folder)))
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
    assert np.all(np.isfinite(variable)), f"{what}: {variable.path}"
  assert denoiser.sha256 == denoisers.weights_sha256(denoiser.model), what
  assert ddss_tf.load_denoiser(
      os.path.join(folder, path)).sha256 == denoiser.sha256, what
  return True


def run(originals, tmp_path, cases):
  read = [check(originals, str(tmp_path / "damaged"), case) for case in cases]
  # A test that refuses all, or none, would say little.
  assert 0 < sum(read) < len(read) / 2


def test_damaged_files(originals, tmp_path):
  run(originals, tmp_path, range(20))


@pytest.mark.slow
def test_500_damaged_files(originals, tmp_path):
  run(originals, tmp_path, range(500))
