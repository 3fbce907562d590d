"""The format of this library: a folder with `denoiser.json` and `network.keras`.

A latent diffusion model has its decoder beside them, in `decoder.keras`, and a
network of conditions their table, in `conditions.npz`.
"""

import os

from ddss_tf import errors
from ddss_tf import schedules
from ddss_tf import storage
from ddss_tf.denoisers import denoiser as denoiser_lib
from ddss_tf.formats import cards
from ddss_tf.formats import saved_model
from ddss_tf.networks import files as network_files
from ddss_tf.denoisers.decoder import Decoder, Standardised
from ddss_tf.denoisers.denoiser import Denoiser
from ddss_tf.denoisers.table import ConditionTable
from ddss_tf.errors import UserError

CARD = "denoiser.json"
NETWORK = "network.keras"
DECODER = "decoder.keras"
TABLE = "conditions.npz"
_FORMAT, _VERSION = "ddss_tf.denoiser", 1


def save(denoiser: Denoiser, path: str) -> None:
  """Writes a denoiser: its card, and its network as Keras saves it.

  Args:
    denoiser: a denoiser whose network is a Keras model.
    path: a folder, made if need be.

  Raises:
    UserError: the network is a SavedModel, which is a format already.
  """
  if isinstance(denoiser.model, saved_model.SavedModelNetwork):
    raise UserError(
        f"denoiser {denoiser.name!r} must be a Keras model to be saved. "
        "Received: a SavedModel: copy its folder and its card, which "
        "load_denoiser reads")
  path = storage.expanded(path)
  weights = denoiser_lib.weights_sha256(denoiser.model)
  told = {} if denoiser.sha256 == weights else {"told_sha256": denoiser.sha256}
  with storage.replacing(os.path.join(path, NETWORK)) as temporary:
    denoiser.model.save(temporary)
  decoder = denoiser.decoder
  if isinstance(decoder, Decoder):
    with storage.replacing(os.path.join(path, DECODER)) as temporary:
      decoder.model.save(temporary)
  if denoiser.table is not None:
    denoiser.table.save(os.path.join(path, TABLE))
  storage.write_json(os.path.join(path, CARD), {
      "format": _FORMAT,
      "version": _VERSION,
      "name": denoiser.name,
      **denoiser.convention.non_default(),
      "prediction": denoiser.prediction,
      **denoiser.schedule.card(),
      "sha256": weights,
      **told,
      **({} if denoiser.continuous_time else {"continuous_time": False}),
      **({"architecture": denoiser.architecture}
         if denoiser.architecture else {}),
      **_classes(denoiser),
      **({} if decoder is None else {"decoder": {
          **decoder.told(), "sha256": decoder.sha256,
          **({"batch_size": decoder.batch_size}
             if isinstance(decoder, Decoder) else {}),
      }}),
  })


def _classes(denoiser: Denoiser) -> dict:
  """What the card says of classes, or of conditions and their table."""
  told = {"guidance_scale": denoiser.guidance_scale}
  if not denoiser.conditions:
    return {"num_classes": denoiser.num_classes, **told,
            "null_label": denoiser.null_label, **denoiser.card_weights}
  table = denoiser.table
  return {**told, "conditions": list(denoiser.conditions),
          **({} if table is None else {"table": table.sha256})}


def load(folder: str) -> Denoiser:
  """Reads what `save` wrote, frozen, and checks the weights' hash.

  Args:
    folder: the folder with `denoiser.json` and `network.keras`.

  Raises:
    UserError: the card or the network is missing or damaged, or the hash of the
      weights is not the card's; in one line.
  """
  folder = storage.expanded(folder)
  card_path = os.path.join(folder, CARD)
  card = cards.read_json_object(card_path)
  try:
    for key, value in (("format", _FORMAT), ("version", _VERSION)):
      if card[key] != value:
        raise ValueError(f"{key} must be {value!r}. Received: {card[key]!r}")
    name, prediction = card["name"], card["prediction"]
    if not isinstance(name, str):
      raise ValueError(f"name must be a word. Received: {name!r}")
    sha256 = card["sha256"]
    schedule = schedules.from_card(card)
    convention = {key: card[key] for key in cards.CONVENTION_KEYS
                  if key in card}
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"{card_path} is damaged: "
                    f"{errors.one_line(error)}") from error
  network_path = os.path.join(folder, NETWORK)
  if not storage.exists(network_path):
    raise UserError(f"{folder} has {CARD} but no {NETWORK}")
  model = network_files.load_keras(network_path)
  received = denoiser_lib.weights_sha256(model)
  if received != sha256:
    raise UserError(
        f"weights in {network_path} must have the SHA-256 {sha256} of their "
        f"{CARD}. Received: {received}")
  decoder = _load_decoder(folder, card["decoder"], model) if (
      "decoder" in card) else None
  table = _load_table(folder, card["table"]) if "table" in card else None
  try:
    return Denoiser(
        # Older cards say nothing of classes.
        model, schedule, prediction, name, card.get("num_classes"),
        card.get("guidance_scale"), card.get("null_label"),
        sha256=card.get("told_sha256", sha256),
        continuous_time=card.get("continuous_time"),
        architecture=card.get("architecture"), decoder=decoder,
        conditions=card.get("conditions"), table=table,
        label_weights=card.get("label_weights"), **convention)
  except (TypeError, ValueError) as error:
    raise UserError(f"{card_path} is damaged: {error}") from error


def _load_decoder(folder, told, model) -> Decoder | Standardised:
  """Reads the decoder beside a network, and checks its hash."""
  path = os.path.join(folder, DECODER)
  try:
    if "mean" in told:
      decoder = Standardised(
          model.input_shape[0][1:], told["mean"], told["std"])
    elif storage.exists(path):
      decoder = Decoder(network_files.load_keras(path), told["scale"],
                        told["shift"], told["batch_size"])
    else:
      raise UserError(f"{folder} has a decoder in its {CARD} but no {DECODER}")
    expected = told["sha256"]
  except UserError:
    raise
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(f"{os.path.join(folder, CARD)} is damaged: decoder: "
                    f"{errors.one_line(error)}") from error
  if decoder.sha256 != expected:
    raise UserError(f"the decoder in {folder} must have the SHA-256 {expected} of "
                    f"its {CARD}. Received: {decoder.sha256}")
  return decoder


def _load_table(folder, expected) -> ConditionTable:
  """Reads the table beside a network, and checks its hash."""
  table = ConditionTable.load(os.path.join(folder, TABLE))
  if table.sha256 != expected:
    raise UserError(f"{TABLE} in {folder} must have the SHA-256 {expected} of its "
                    f"{CARD}. Received: {table.sha256}")
  return table
