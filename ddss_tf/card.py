"""`sampler.json`: a found sampler as a small, portable, versioned file.

`docs/sampler_json.md` describes it field by field, for readers of any language.
"""

import dataclasses
import os

from ddss_tf import fingerprint
from ddss_tf import metrics
from ddss_tf import paths
from ddss_tf import storage
from ddss_tf.coefficients import Coefficients
from ddss_tf.errors import UserError

FILE = "sampler.json"
_FORMAT = "ddss_tf.sampler"
_VERSION = 1
_EQUATIONS = [
    "x0_hat_k = x0_from_state[k] x_k + x0_from_eps[k] eps(x_k, times[k])",
    "x_{k+1} = x0_weights[k] x0_hat_k + sum_{u<=k} state_weights[k][u] x_u + "
    "noise_scales[k] z_k; the image is x_K",
]
_GUIDANCE = (
    "eps(x_k, times[k]) = eps(null) + guidance_scales[k] (eps(label) - "
    "eps(null))")


@dataclasses.dataclass(frozen=True)
class SamplerCard:
  """A sampler and where it comes from.

  Attributes:
    label: what tables and pictures call it.
    coefficients: NumPy, float32.
    denoiser: of the model it was found for, see `Denoiser.identity`.
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
    """By which records of `metrics.json` name a sampler."""
    return fingerprint.coefficients_sha256(self.coefficients)


def write(path: str, card: SamplerCard) -> None:
  """Writes a card, atomically."""
  path = paths.expanded(path)
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
      "equations": _EQUATIONS + (
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
    path: of the file; `~` is the home folder.

  Returns:
    The card, validated.

  Raises:
    UserError: missing, damaged, of another format or version, or with metrics
      of other coefficients.
  """
  path = paths.expanded(path)
  if not os.path.exists(path):
    raise UserError(f"{path} must exist: run --mode=search first")
  try:
    values = storage.read_json(path)
    if values.get("format") != _FORMAT or values.get("version") != _VERSION:
      raise ValueError(
          f"format must be {_FORMAT} version {_VERSION}. Received: "
          f"{values.get('format')} version {values.get('version')}")
    card = SamplerCard(
        label=values["label"],
        coefficients=Coefficients.from_dict(values["coefficients"]),
        denoiser=values["denoiser"],
        search=values["search"],
        x0_bound=values["x0_bound"],
        metrics=tuple(values.get("metrics", ())),
        provenance=dict(values.get("provenance", {})))
    if any(record["coefficients_sha256"] != card.coefficients_sha256
           for record in card.metrics):
      raise ValueError("metrics must be of the card's own coefficients")
    for record in card.metrics:
      metrics.heldout_fids(record)  # As many as there are networks.
    return card
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f"{path} is damaged: {error}") from error
