"""Files with weights of EDM's networks."""

import json

from checkpoint_files import read_fixture
import numpy as np
import safetensors.numpy

from project import TESTDATA

DATA = TESTDATA


def write(folder, name, suffix=".npz", changes=None, **words):
  """Writes a fixture as tools/convert_edm.py does; returns (path, golden)."""
  weights, golden = read_fixture(name)
  weights = {**weights, **(changes or {})}
  card = json.loads(str(golden["card"]))
  card["init_kwargs"] |= words
  path = str(folder / (name + suffix))
  if suffix == ".npz":
    np.savez(path, **weights)
  else:
    safetensors.numpy.save_file(weights, path)
  with open(path + ".json", "w") as f:
    json.dump(card, f)
  return path, golden
