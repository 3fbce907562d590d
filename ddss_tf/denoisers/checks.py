"""Checks that what is asked of a denoiser suits it."""

import tensorflow as tf

from ddss_tf.errors import UserError


class Checks:
  """The checks of a `Denoiser`, which inherits them."""

  def check_times(self, label: str) -> None:
    """Checks that a sampler may learn the times that the network is fed with.

    Args:
      label: the label of the sampler.

    Raises:
      UserError: the network takes whole steps, or has no gradient in the time.
    """
    if not self.continuous_time:
      raise UserError(
          f"sampler {label!r} must not learn times with the denoiser "
          f"{self.name!r}, which takes whole steps only or has no gradient "
          "in the time: search a family without +time")

  def check_variance(self) -> None:
    """Checks that the network predicts a variance which a chain can use.

    Raises:
      UserError: see `output_and_variance`.
    """
    labels = None if self.num_classes is None else 0
    self.output_and_variance(tf.zeros([1, *self.state_shape]), 0.0, labels)

  def check_guidance(self, scales) -> None:
    """Checks that a sampler's own guidance scales, if any, can be used.

    Args:
      scales: the scales of the sampler, or None.

    Raises:
      UserError: the network has no null label, or a scale of its own.
    """
    if scales is None:
      return
    if self.null_label is None:
      raise UserError(
          f"a sampler with guidance needs a class-conditional denoiser whose "
          f"null_label is told. Received: {self.name!r} without")
    if self.guidance_scale is not None:
      raise UserError(
          "guidance_scale must not be given for the denoiser of a sampler that "
          f"has its own. Received: {self.guidance_scale}")

  def check_latents(self, root: str, x0_bound: str | None = None,
                    elbo: bool = False) -> None:
    """Checks that what is asked for makes sense where states are latents.

    Args:
      root: the function whose options they are, for the message.
      x0_bound: see `chain.bound_x0`.
      elbo: whether the bound is minimised.

    Raises:
      UserError: there is a decoder, and a bound on x0_hat or the ELBO.
    """
    if self.decoder is None:
      return
    if x0_bound is not None:
      raise UserError(f"{root}.x0_bound must be None for latents, which have no "
                      f"range of their own. Received: {x0_bound!r}")
    if elbo:
      raise UserError(
          f"{root}.objective must not be 'elbo' for a denoiser with a decoder: "
          "it would need an encoder of the data set's images. Received: "
          f"{self.name!r}")
