"""Checks that what is asked of a denoiser suits it."""

import tensorflow as tf

from ddss_tf.errors import UserError


def check_classes(model, num_classes: int | None, null_label: int | None,
                  guidance_scale: float | None, conditions=()) -> None:
  """Checks that classes and guidance are those of a model.

  Args:
    model: see `Denoiser`, as for all below. What it tells is compared.
    num_classes: the number of classes, or of rows of a table.
    null_label: one of them, or None.
    guidance_scale: a number, or None.
    conditions: names of the inputs that a table gives.

  Raises:
    ValueError: see `Denoiser`.
  """
  inputs = getattr(model, "input_shape", None)
  if inputs and not conditions and (
      len(inputs) != (2 if num_classes is None else 3)):
    raise ValueError(
        "num_classes must be given exactly for a model of three inputs. "
        f"Received: {num_classes} for {len(inputs)} inputs")
  for layer in () if conditions else getattr(model, "layers", ()):
    known = getattr(layer, "input_dim", num_classes)
    called = getattr(layer, "name", None)
    if called == "label_embedding" and known != num_classes:
      raise ValueError(f"num_classes must be {known}, as the network has "
                       f"them. Received: {num_classes}")
  if null_label is not None and null_label >= (num_classes or 0):
    raise ValueError(
        "null_label must be one of the network's classes, of which there are "
        f"{num_classes or 'none'}. Received: {null_label}")
  if guidance_scale is not None and null_label is None:
    needed = ("a table with a null_row: that of the negative prompt" if conditions
              else "a null_label: the class with which the network is "
              "unconditional")
    raise ValueError(f"guidance_scale needs {needed}. "
                     f"Received: guidance_scale={guidance_scale}")


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
    self.output_and_variance(
        tf.zeros([1, *self.state_shape]), 0.0, self.example_labels(1))

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
          "a sampler with guidance needs a class-conditional denoiser whose "
          "null_label is told, or a table of conditions with a null_row. "
          f"Received: {self.name!r} without")
    if self.guidance_scale is not None:
      raise UserError(
          "guidance_scale must not be given for the denoiser of a sampler that "
          f"has its own. Received: {self.guidance_scale}")

  def check_latents(self, root: str, x0_bound: str | None = None,
                    elbo: bool = False) -> None:
    """Checks that what is asked for makes sense where states are no images.

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
      raise UserError(f"{root}.x0_bound must be None for latents and standardised "
                      f"images, which are not in [-1, 1]. Received: {x0_bound!r}")
    if elbo:
      raise UserError(
          f"{root}.objective must not be 'elbo' for a denoiser with a decoder: "
          "it would need an encoder of the data set's images. Received: "
          f"{self.name!r}")
