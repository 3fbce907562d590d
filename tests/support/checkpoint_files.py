"""Small checkpoints in the formats of other libraries."""

import json
import os
import sys
import types

from absl import logging
import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf

from ddss_tf.formats import diffusers
from ddss_tf.errors import UserError
from project import TESTDATA

DATA = TESTDATA
OPENAI = ["openai_learned_sigma", "openai_plain"]


def read_fixture(name):
  """Reads (weights by name, golden arrays), see tools/small_fixture.py."""
  with np.load(os.path.join(DATA, name + ".npz")) as file:
    golden = dict(file)
  if "seed" in golden:
    return seeded_weights(golden), golden
  flat = golden.pop("weights").astype(np.float32)
  weights = {}
  for tensor, shape, scale in json.loads(str(golden.pop("index"))):
    values, flat = np.split(flat, [int(np.prod(shape))])
    weights[tensor] = (values * np.float32(scale)).reshape(shape)
  return weights, golden


def seeded_weights(golden):
  """Draws again the weights that `seeded` of tools/small_fixture.py drew."""
  rng = np.random.RandomState(int(golden.pop("seed")))
  return {
      tensor: ((rng.randint(-2, 3, shape) + offset) * scale).astype(np.float32)
      for tensor, shape, scale, offset in json.loads(str(golden.pop("index")))}


def numbered(name, network):
  """Weights with the shapes of a network in a file of tests/testdata.

  The i-th tensor is filled with i. The networks have the depth of published
  ones and a quarter of their width.
  """
  with open(os.path.join(DATA, name)) as f:
    shapes = json.load(f)[network]
  return {tensor: np.full(shape, i, np.float32)
          for i, (tensor, shape) in enumerate(shapes.items())}


def refusal(function, *arguments, **keywords):
  """The one-line message with which `function` refuses its arguments."""
  with pytest.raises(UserError) as error:
    function(*arguments, **keywords)
  message = str(error.value).split("\n  In call to configurable")[0]
  assert "\n" not in message
  return message


def save_checkpoint(prefix, weights):
  """Writes variables as TensorFlow 1 does."""
  tf.raw_ops.SaveV2(
      prefix=prefix, tensor_names=list(weights),
      shape_and_slices=[""] * len(weights), tensors=list(weights.values()))


def training_state(weights):
  """All variables that a training run saves.

  The raw weights differ from their moving averages.
  """
  state = {"global_step": np.int64(790_000), "beta1_power": np.float32(0.0)}
  for name, value in weights.items():
    state[name] = value + np.float32(0.1)
    state[f"{name}/ExponentialMovingAverage"] = value
    state[f"{name}/Adam"] = state[f"{name}/Adam_1"] = np.zeros_like(value)
  return state


@pytest.fixture
def warnings(monkeypatch):
  """The texts of the warnings that are logged."""
  logged = []
  monkeypatch.setattr(logging, "warning",
                      lambda text, *values: logged.append(text % values))
  return logged


@pytest.fixture(scope="module")
def openai():
  """(weights, golden, card) by fixture."""
  fixtures = {}
  for name in OPENAI:
    weights, golden = read_fixture(name)
    fixtures[name] = weights, golden, json.loads(str(golden["card"]))
  return fixtures


class FakeTensor:
  """The part of torch.Tensor that the reader uses."""

  def __init__(self, value):
    self.value = value

  @property
  def dtype(self):
    return f"torch.{self.value.dtype.name}"

  def is_floating_point(self):
    return self.value.dtype.kind == "f"

  def detach(self):
    return self

  def float(self):
    return FakeTensor(self.value.astype(np.float32))

  def numpy(self):
    return self.value


@pytest.fixture
def fake_torch(monkeypatch):
  """Stands in for PyTorch: `torch.load` of any file gives its `state`."""
  torch = types.ModuleType("torch")
  torch.Tensor = FakeTensor

  def load(path, map_location, weights_only):
    assert os.path.exists(path) and map_location == "cpu" and weights_only
    if isinstance(torch.state, Exception):
      raise torch.state
    return torch.state

  torch.load = load
  monkeypatch.setitem(sys.modules, "torch", torch)
  return torch


@pytest.fixture
def state_dict(openai, fake_torch, tmp_path):
  """Path of a PyTorch file with a card; `fake_torch` has its tensors."""
  weights, _, card = openai["openai_plain"]
  path = str(tmp_path / "lsun.pt")
  with open(path, "w") as f:
    f.write("PyTorch reads this, not we")
  with open(path + ".json", "w") as f:
    json.dump(card, f)
  fake_torch.state = {
      name: FakeTensor(value) for name, value in weights.items()}
  return path


def write_folder(folder, name, suffix=".safetensors", **changes):
  """Writes a fixture in diffusers' layout; returns (weights, golden)."""
  weights, golden = read_fixture(name)
  os.makedirs(folder, exist_ok=True)
  for file in ("config", "scheduler"):
    values = json.loads(str(golden[file]))
    values.update(changes if file == "config" else {})
    place = dict(config=diffusers.CONFIG,
                 scheduler=diffusers.SCHEDULER)[file]
    with open(os.path.join(folder, place), "w") as f:
      json.dump(values, f)
  path = os.path.join(folder, "diffusion_pytorch_model" + suffix)
  if suffix == ".safetensors":
    safetensors.numpy.save_file(weights, path)
  else:
    with open(path, "w") as f:
      f.write("PyTorch reads this, not we")
  return weights, golden
