"""The channels of a learned variance in files of diffusers, kept or left out."""

import dataclasses

import numpy as np

from ddss_tf.formats import diffusers
from ddss_tf.errors import UserError
from ddss_tf.networks.unet import UNetConfig


def with_variance(path: str, config: UNetConfig) -> UNetConfig:
  """The architecture with the channels of its learned variance.

  Args:
    path: as in `read_config`.
    config: as `read_config` gives it.

  Raises:
    UserError: the network has no learned variance, or its scheduler does not
      tell a range of variances (Nichol and Dhariwal 2021, equation 15).
  """
  network_json, scheduler_json = diffusers.config_files(path)
  channels = diffusers.read_json(network_json)["out_channels"]
  if channels == config.out_channels:
    raise UserError(f"learned_variance must not be given for {path!r}, whose "
                    f"network predicts none. Received: {channels} out_channels")
  kind = diffusers.read_json(scheduler_json).get("variance_type")
  if kind != "learned_range":
    raise UserError(
        f"{scheduler_json}: variance_type must be 'learned_range' for "
        f"learned_variance. Received: {kind!r}")
  return dataclasses.replace(config, out_channels=channels)


def without_variance(
    path: str, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Removes the channels of a learned variance from the last convolution.

  Args:
    path: as in `read_config`.
    weights: as `read_weights` gives them.

  Returns:
    The weights, with as many output channels as input channels.

  Raises:
    UserError: a tensor of that convolution has another number of channels than
      the configuration says.
  """
  config = diffusers.read_json(diffusers.config_files(path)[0])
  before, kept = config["out_channels"], config["in_channels"]
  if before == kept:
    return weights
  halves = {name: weights[name] for name in ("conv_out.weight", "conv_out.bias")
            if name in weights}
  for name, value in halves.items():
    if value.shape[:1] != (before,):
      raise UserError(f"{path}: tensor {name} must have {before} outputs, as "
                      f"{diffusers.CONFIG} says. Received: shape {value.shape}")
    halves[name] = value[:kept]
  return {**weights, **halves}
