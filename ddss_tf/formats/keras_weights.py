"""Reads weights of our own networks as Keras saves them, `.weights.h5`.

`model.save_weights` writes arrays without an architecture. A preset gives it,
see `presets`. What the network's output means is told as for other Keras files
(see `cards`), by arguments or in a card beside the file, `<file>.json`:

  {"preset": "ddpm-cifar10-32", "prediction": "eps",
   "schedule": {"name": "linear", "num_train_steps": 1000}}

A network of EDM has its own process and prediction, and its own schedule unless
one is given.
"""

import collections
import os
import re
from typing import Mapping

import h5py
import keras
import numpy as np
import tensorflow as tf

from ddss_tf import errors
from ddss_tf import storage
from ddss_tf.formats import cards
from ddss_tf.formats import edm
from ddss_tf.formats import presets
from ddss_tf.formats import tensors
from ddss_tf.networks import edm_unet
from ddss_tf.networks import unet
from ddss_tf.errors import UserError
from ddss_tf.networks.edm_unet import EDMConfig

SUFFIX = ".weights.h5"
CARD_KEYS = ("preset", "prediction", "schedule", "null_label",
             *cards.CONVENTION_KEYS)


def is_weights(path: str) -> bool:
  """Whether a path is such a file."""
  return path.endswith(SUFFIX) and storage.isfile(path)


def read_card(path: str, given: Mapping[str, object]) -> dict:
  """Reads what the arrays do not tell.

  Args:
    path: the path of the weights; `<path>.json` is read if it is there. A
      relative path in that card starts in the card's folder.
    given: values of `CARD_KEYS` that take precedence.

  Returns:
    "config", the architecture; "schedule", a `NoiseSchedule`; "prediction",
    "null_label" and "convention" as in `cards.parsed_card`.

  Raises:
    UserError: a key is missing, unknown or not of such a network, or has a
      value that is not allowed.
  """
  source = path + ".json"
  card = cards.merged_card(path, given, CARD_KEYS)
  if "preset" not in card:
    raise UserError(
        f"preset must be given, by {source} or as an argument, for a {SUFFIX} "
        f"file has no architecture: {presets.WANTED}. Received: {sorted(card)}")
  preset = card.pop("preset")
  if "preset" not in given and isinstance(preset, str) and (
      preset not in presets.PRESETS):
    preset = os.path.join(os.path.dirname(path), storage.expanded(preset))
  config, schedule = presets.read(preset)
  if not isinstance(config, EDMConfig):
    return {"config": config, **cards.parsed_card(path, card)}
  others = sorted(set(card) - {"schedule"})
  if others:
    raise UserError(
        f"{path}: {', '.join(others)} must not be given for a network of EDM, "
        f"which has its own. Received: {others[0]}={card[others[0]]!r}")
  if "schedule" in card:
    schedule = edm.read_schedule(path, card["schedule"])
  return {"config": config, "schedule": schedule, "prediction": "eps",
          "null_label": None, "convention": {}}


def convert(path: str, config: unet.UNetConfig | EDMConfig) -> keras.Model:
  """Builds the network of a preset, with the weights of a file.

  Args:
    path: the path of the weights.
    config: the architecture.

  Returns:
    The network, frozen.

  Raises:
    UserError: the network cannot be built; the file is truncated; its arrays
      are not those of the network, one for one, or not finite. The message
      names the arrays.
  """
  model = tensors.frozen(
      path, edm_unet.build_edm if isinstance(config, EDMConfig)
      else unet.build_unet, config)
  names = dataset_names(model)
  variables = [(v.path, tuple(v.shape)) for v in model.weights]
  try:
    with h5py.File(path, "r") as file:
      # Shapes are compared before an array is read: a damaged one may be huge.
      matched = tensors.matched(
          _datasets(path, file), variables, names.get,
          lambda variable, dataset, shape: dataset)
      arrays = {names[variable]: _array(dataset)
                for variable, dataset in matched.items()}
  except UserError:
    raise
  except Exception as error:  # HDF5 raises many kinds for a damaged file.
    raise UserError(f"{path} is not a complete file of Keras weights: "
                    f"{errors.one_line(error)}") from error
  arrays = tensors.finite_float32(path, arrays)
  tensors.fill(
      model, {variable: arrays[name] for variable, name in names.items()})
  return model


def dataset_names(model: keras.Model) -> dict[str, str]:
  """Where Keras saves the variables of one of our networks.

  Keras numbers the layers of each kind in order. What is inside a layer is
  named by the layer's attributes. In our networks an attribute has the name of
  what it holds.

  Args:
    model: a model of `unet.build_unet` or `edm_unet.build_edm`.

  Returns:
    Names of datasets, such as "layers/residual_block_2/conv1/vars/0", by the
    paths of variables.
  """
  names, kinds = {}, collections.Counter()
  for layer in model.layers:
    kind = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=.)(?=[A-Z][a-z])", "_",
                  type(layer).__name__).lower()
    place = f"{kind}_{kinds[kind]}" if kinds[kind] else kind
    kinds[kind] += 1
    counts = collections.Counter()
    for variable in layer.weights:
      inside = variable.path.split("/")[1:-1]
      group = "/".join(["layers", place, *inside, "vars"])
      names[variable.path] = f"{group}/{counts[group]}"
      counts[group] += 1
  return names


def _datasets(path: str, file: h5py.File) -> dict[str, h5py.Dataset]:
  """All datasets of a file by name, also those that Keras would ignore."""
  links, found = [], {}
  # The links are collected first: HDF5 passes on no exception of a visitor.
  file.visititems_links(lambda name, link: links.append((name, link)))
  for name, link in links:
    # A link that is not hard leads out of the file, or to a second name.
    whole = isinstance(link, h5py.HardLink)
    place = file[name] if whole else None
    if isinstance(place, h5py.Dataset):
      found[name] = place
      whole = not (place.external or place.is_virtual)
    if not whole:
      raise UserError(f"{path}: {name} must hold its array. Received: a link")
  return found


def _array(dataset: h5py.Dataset) -> np.ndarray:
  """The array of a dataset. Keras marks bfloat16, which HDF5 does not have."""
  value = dataset[()]
  if dataset.attrs.get("dtype") == "bfloat16":
    value = value.view(tf.bfloat16.as_numpy_dtype)
  return value
