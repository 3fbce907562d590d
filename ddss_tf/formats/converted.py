"""From a converted network to a `Denoiser`, with a hash of all that it is."""

import dataclasses
import json

from ddss_tf.denoisers import denoiser as denoiser_lib
from ddss_tf.runs import fingerprint
from ddss_tf.denoisers.denoiser import Denoiser
from ddss_tf.networks.edm_unet import EDMConfig
from ddss_tf.schedules import NoiseSchedule


def converted(source: str, model, config, schedule: NoiseSchedule,
              prediction: str = "eps", null_label: int | None = None,
              **convention) -> Denoiser:
  """The denoiser of a network that was converted.

  Args:
    source: what it was read from, in words.
    model: the network, frozen.
    config: its architecture, a dataclass such as `UNetConfig`. It is part of the
      hash, because no weight tells the padding of a convolution or the epsilon
      of a normalisation. A network of texts has `conditions`, pairs of name and
      shape, in it.
    schedule: see `Denoiser`, as for all below. It is the only one of these for
      a network of EDM, whose process and prediction are its own.
    prediction: see `Denoiser`.
    null_label: see `Denoiser`.
    **convention: see `Denoiser`.
  """
  # Defaults are left out, so that a field that is added changes no hash.
  architecture = {
      "kind": type(config).__name__,
      **{field.name: getattr(config, field.name)
         for field in dataclasses.fields(config)
         if getattr(config, field.name) != field.default}}
  classes = getattr(config, "num_classes", None)
  if isinstance(config, EDMConfig):
    convention = {"process": "ve", "time_input": "sigma"}
    # The label after the last stands for no class: all zeros, see
    # `layers.OneHot`. The network has seen it only if it was trained with
    # dropped labels.
    knows_null = bool(config.label_dim and config.label_dropout)
    null_label = config.label_dim if knows_null else None
    classes = config.label_dim + knows_null or None
  sha256 = told_sha256(
      denoiser_lib.weights_sha256(model), prediction, schedule,
      {**convention, "architecture": architecture})
  conditions = [name for name, _ in getattr(config, "conditions", ())]
  return Denoiser(model, schedule, prediction, num_classes=classes,
                  null_label=null_label, sha256=sha256, conditions=conditions,
                  architecture={"format": source, **architecture}, **convention)


def told_sha256(sha256: str | None, prediction: str,
                 schedule: NoiseSchedule, others: dict,
                 num_classes: int | None = None) -> str:
  """Hash of a network and of what its weights do not tell.

  If any of it changes, a run must not go on, and no cached result may be used.

  Args:
    sha256: the hash of the weights, or of the files.
    prediction: see `Denoiser`.
    schedule: see `Denoiser`.
    others: the rest by name, such as the convention and the architecture.
    num_classes: the number of classes of a foreign network.
  """
  told = [sha256, prediction, schedule.card(), others]
  if num_classes is not None:
    told.append(num_classes)
  return fingerprint.text_sha256(json.dumps(told, sort_keys=True))
