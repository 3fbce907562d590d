"""`sampler.json`: a found sampler as a small, portable, versioned file.

`docs/sampler_json.md` describes it field by field, for readers of any language.
"""

import dataclasses
import json
import os
import sys

import numpy as np

from ddss_tf import storage
from ddss_tf.runs import fingerprint
from ddss_tf.runs import records
from ddss_tf.samplers import chain
from ddss_tf.errors import UserError
from ddss_tf.samplers.coefficients import Coefficients

# The zoo that comes with the package: cards by name.
FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(
    __file__))), "assets", "samplers")
SUFFIX = ".json"
_FORMAT = "ddss_tf.sampler"
_VERSION = 1
_LARGEST = float(np.finfo(np.float32).max)
_EQUATIONS = [
    "x0_hat_k = x0_from_state[k] state_k + x0_from_eps[k] eps(state_k, "
    "times[k]); state_0 is x_T, the noise",
    "state_{k+1} = x0_weights[k] x0_hat_k + sum_{u<=k} state_weights[k][u] "
    "state_u + noise_scales[k] z_k; the image is state_K",
]
_IN_V = (
    "x0_hat_k = x0_from_state[k] state_k + x0_from_v[k] v(state_k, times[k]), "
    "v = alpha_t eps - sigma_t x_0; state_0 is x_T, the noise")
_GUIDANCE = (
    "eps(state_k, times[k]) = eps(null) + guidance_scales[k] (eps(label) - "
    "eps(null))")


@dataclasses.dataclass(frozen=True)
class SamplerCard:
  """A sampler and where it comes from.

  Attributes:
    label: what tables and pictures call it.
    coefficients: NumPy, float32.
    denoiser: the denoiser of the model it was found for, see
      `Denoiser.identity`.
    search: how it was found.
    x0_bound: the bound on x0_hat it was found with, see `chain.bound_x0`.
    metrics: records of `metrics.json` with these coefficients, which say under
      which conditions they were measured; a search leaves none, `zoo.add` puts
      them in.
    provenance: where a published card comes from; empty in a run directory.
  """

  label: str
  coefficients: Coefficients
  denoiser: dict
  search: dict
  x0_bound: str | None = None
  metrics: tuple[dict, ...] = ()
  provenance: dict = dataclasses.field(default_factory=dict)

  @property
  def family(self) -> str:
    """Name of the family, as `make_sampler` takes it; "" if it is not known."""
    config = self.search.get("config", {})
    extras = [extra for extra in ("pred", "time", "guidance")
              if config.get(extra)]
    return "+".join([config.get("family", ""), *extras])

  @property
  def coefficients_sha256(self) -> str:
    """The hash by which records of `metrics.json` name a sampler."""
    return fingerprint.coefficients_sha256(self.coefficients)


def write(path: str, card: SamplerCard) -> None:
  """Writes a card, atomically.

  Raises:
    UserError: the sampler has a learned variance, which a card cannot hold.
  """
  if card.coefficients.noise_ratios is not None:
    raise UserError("a card must be of a sampler without a learned variance. "
                    f"Received: {card.label!r}")
  path = storage.expanded(path)
  published = {}
  if card.metrics:
    published["metrics"] = list(card.metrics)
  if card.provenance:
    published["provenance"] = card.provenance
  storage.write_json(path, {
      "format": _FORMAT,
      "version": _VERSION,
      "label": card.label,
      "num_steps": card.coefficients.num_steps,
      "equations": (
          [_IN_V, *_EQUATIONS[1:]] if card.coefficients.in_v else _EQUATIONS) + (
          [_GUIDANCE] if card.coefficients.guidance_scales is not None else []),
      "x0_bound": card.x0_bound,
      "coefficients": card.coefficients.to_dict(),
      "denoiser": card.denoiser,
      "search": card.search,
      **published,
  })


def read(path: str) -> SamplerCard:
  """Reads a card.

  Args:
    path: the path of the file; `~` is the home folder.

  Returns:
    The card, validated.

  Raises:
    UserError: the file is missing, damaged, of another format or version, has
      a field of another kind than `docs/sampler_json.md` says, or has metrics
      of other coefficients; names the field.
  """
  path = storage.expanded(path)
  if not storage.exists(path):
    raise UserError(f"{path} must exist: run --mode=search first")
  try:
    # Some editors put a byte order mark first.
    with storage.open(path, encoding="utf-8-sig") as f:
      values = json.load(f, object_pairs_hook=_unique)
    _check_fields(values)
    card = SamplerCard(
        label=values["label"],
        coefficients=Coefficients.from_dict(values["coefficients"]),
        denoiser=values["denoiser"],
        search=values["search"],
        x0_bound=values["x0_bound"],
        metrics=tuple(values.get("metrics", ())),
        provenance=dict(values.get("provenance", {})))
    if values.get("num_steps", card.coefficients.num_steps) != (
        card.coefficients.num_steps):
      raise ValueError(
          f"num_steps must be {card.coefficients.num_steps}, as many as there "
          f"are coefficients. Received: {values['num_steps']!r}")
    if any(record["coefficients_sha256"] != card.coefficients_sha256
           for record in card.metrics):
      raise ValueError("metrics must be of the card's own coefficients")
    for record in card.metrics:
      records.heldout_fids(record)  # Raises unless each network has one.
    return card
  except KeyError as error:
    raise UserError(f"{path} is damaged: {error} is missing") from error
  except (OSError, RecursionError, ValueError, TypeError, AttributeError
          ) as error:
    raise UserError(f"{path} is damaged: {error}") from error


def names(folder: str | None = None) -> list[str]:
  """The names of a zoo's cards, sorted.

  Args:
    folder: the folder of the cards; None: those that come with the package.
  """
  return sorted(name.removesuffix(SUFFIX) for name in storage.listdir(
      storage.expanded(folder) or FOLDER) if name.endswith(SUFFIX))


def find(sampler: str, folder: str | None = None) -> str:
  """Path of a card.

  Args:
    sampler: its path, or its name in the zoo.
    folder: the folder of the zoo; None: the one that comes with the package.

  Raises:
    UserError: there is neither such a file nor such a name.
  """
  sampler = storage.expanded(sampler)
  if isinstance(sampler, str) and storage.isfile(sampler):
    return sampler
  folder = storage.expanded(folder) or FOLDER
  path = os.path.join(folder, f"{sampler}{SUFFIX}")
  if os.path.basename(path) != f"{sampler}{SUFFIX}" or (
      not storage.isfile(path)):
    raise UserError("sampler must be the path of a card, or one of "
                    f"{', '.join(names(folder)) or 'an empty zoo'}. "
                    f"Received: {sampler!r}")
  return path


def _unique(pairs: list[tuple[str, object]]) -> dict:
  """The object of these pairs; a key given twice is ambiguous and refused."""
  values = dict(pairs)
  if len(values) < len(pairs):
    keys = [key for key, _ in pairs]
    twice = next(key for key in keys if keys.count(key) > 1)
    raise ValueError(f"{twice} must be given once. Received: it, twice")
  return values


def _check_fields(values) -> None:
  """Checks the kinds of all fields, before any of them is used.

  Raises:
    ValueError: names the field.
    KeyError: one is missing.
  """
  if not isinstance(values, dict):
    raise ValueError("it must be a JSON object. Received: "
                     f"{type(values).__name__}")
  # True equals 1.
  if values.get("format") != _FORMAT or values.get("version") != _VERSION or (
      isinstance(values["version"], bool)):
    raise ValueError(
        f"format must be {_FORMAT} version {_VERSION}. Received: "
        f"{values.get('format')} version {values.get('version')}")
  for name, kind, words in (
      ("label", str, "a word"), ("coefficients", dict, "an object"),
      ("denoiser", dict, "an object"), ("search", dict, "an object"),
      ("metrics", list, "a list"), ("provenance", dict, "an object")):
    if name in ("metrics", "provenance") and name not in values:
      continue
    if not isinstance(values[name], kind):
      raise ValueError(
          f"{name} must be {words}. Received: {_shown(values[name])}")
  label = values["label"]
  if not (label.strip() and label.isprintable()):
    raise ValueError(
        f"label must be one line of text. Received: {_shown(label)}")
  if values["x0_bound"] not in (None, *chain.X0_BOUNDS):
    raise ValueError(f"x0_bound must be null, {' or '.join(chain.X0_BOUNDS)}. "
                     f"Received: {_shown(values['x0_bound'])}")
  for name, value in values["coefficients"].items():
    _check_numbers(f"coefficients.{name}", value,
                   2 if name == "state_weights" else 1)
  for name in ("denoiser", "search", "provenance", "metrics"):
    _check_finite(name, values.get(name))
  search = values["search"]
  if not isinstance(search.get("config", {}), dict):
    raise ValueError("search.config must be an object. Received: "
                     f"{_shown(search['config'])}")
  family = search.get("config", {}).get("family", "")
  if not isinstance(family, str):
    raise ValueError("search.config.family must be a word. Received: "
                     f"{_shown(family)}")
  for name, value in values["denoiser"].items():
    if name in ("name", "sha256") and not isinstance(value, (str, type(None))):
      raise ValueError(
          f"denoiser.{name} must be a word. Received: {_shown(value)}")
  for i, record in enumerate(values.get("metrics", ())):
    if not isinstance(record, dict):
      raise ValueError(
          f"metrics.{i} must be an object. Received: {_shown(record)}")
    figures = [(name, record.get(name))
               for name in (*records.FIGURES, "clip_score")]
    for name in ("fid_heldout", *(
        measure.key for measure in records.HELDOUT_MEASURES.values())):
      heldout = record.get(name)
      figures += [(name, value) for value in (
          heldout if isinstance(heldout, list) else [heldout])]
    for name, value in figures:
      if value is not None and not _is_number(value):
        raise ValueError(f"metrics.{i}.{name} must be a number or null. "
                         f"Received: {_shown(value)}")


def _is_number(value) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(value) -> str:
  """The beginning of a value, for messages."""
  return repr(value)[:80]


def _check_numbers(name, value, depth) -> None:
  """Checks a list, or a list of lists, of numbers that are float32.

  `Coefficients` checks how many there are.
  """
  if depth:
    if not isinstance(value, list):
      raise ValueError(f"{name} must be a list"
                       f"{' of lists' if depth > 1 else ''} of numbers. "
                       f"Received: {_shown(value)}")
    for i, inner in enumerate(value):
      _check_numbers(f"{name}.{i}", inner, depth - 1)
      if depth > 1 and len(inner) != len(value):
        raise ValueError(f"{name}.{i} must have {len(value)} entries, as there "
                         f"are steps. Received: {len(inner)}")
  elif not (_is_number(value) and abs(value) <= _LARGEST):
    raise ValueError(f"{name} must be a finite number of float32. "
                     f"Received: {_shown(value)}")


def _check_finite(name, value) -> None:
  """Refuses NaN, infinity and numbers beyond any float, at any depth."""
  if _is_number(value) and not abs(value) <= sys.float_info.max:
    raise ValueError(f"{name} must be finite. Received: {_shown(value)}")
  inner = (value.items() if isinstance(value, dict) else
           enumerate(value) if isinstance(value, list) else ())
  for key, each in inner:
    _check_finite(f"{name}.{key}", each)
