"""From the states of a model to images, where they are not images themselves.

  Decoder       of latents, by a network, image by image
  Standardised  of images that were shifted and scaled before training
"""

import functools
import json

import numpy as np
import tensorflow as tf

from ddss_tf.runs import fingerprint
from ddss_tf.errors import UserError, shape_text


class Decoder:
  """A frozen decoder: what makes an image of a latent.

  The decoder, not the sampling chain, is what needs memory: that of Stable
  Diffusion keeps gigabytes of activations for one image of 512 pixels. So
  images are decoded a few at a time, and the gradient decodes them again a few
  at a time. The peak of the memory does not grow with the batch.

  Args:
    model: a Keras model from latents [B, h, w, c] to images [B, H, W, C],
      nominally in [-1, 1]. It is frozen.
    scale: the network's latents are the decoder's times this, less `shift`
      times it: the decoder is given z / scale + shift. A number, or one for
      each channel c.
    shift: see `scale`.
    batch_size: images that are decoded at once.

  Attributes:
    state_shape: (h, w, c).
    image_shape: (H, W, C).
    sha256: hash of weights, scale and shift.

  Raises:
    UserError: the model's shapes are not told, it has several inputs or
      outputs, or scale or shift are not what they must be.
  """

  def __init__(self, model, scale=1.0, shift=0.0, batch_size: int = 1):
    self.model = model
    model.trainable = False
    self.state_shape = _shape("take", getattr(model, "input_shape", None))
    self.image_shape = _shape("give", getattr(model, "output_shape", None))
    self.scale, self.shift = (
        _numbers(f"a decoder's {name}", value, self.state_shape[-1])
        for name, value in (("scale", scale), ("shift", shift)))
    if not np.all(self.scale):
      raise UserError(f"a decoder's scale must not be 0. Received: {scale!r}")
    if batch_size < 1:
      raise UserError("a decoder's batch_size must be at least 1. "
                      f"Received: {batch_size}")
    self.batch_size = batch_size
    self.sha256 = fingerprint.text_sha256(json.dumps([
        fingerprint.arrays_sha256(model.get_weights()), self.told()]))

  def told(self) -> dict:
    """Scale and shift, as JSON has them."""
    return {name: value.tolist() for name, value in (
        ("scale", self.scale), ("shift", self.shift))}

  @property
  def variables(self) -> list:
    """What a SavedModel that decodes must hold."""
    return [variable.value for variable in self.model.variables]

  @property
  def description(self) -> str:
    """How it makes images of states, in words."""
    return (f"of latents of {_by(self.state_shape)} by a decoder of "
            f"{self.model.count_params():,} parameters")

  def __call__(self, states: tf.Tensor) -> tf.Tensor:
    """Decodes latents, differentiable in them.

    Args:
      states: float32 [B, h, w, c], latents as the network knows them.

    Returns:
      float32 [B, H, W, C], nominally in [-1, 1] but not clipped.
    """
    states = tf.convert_to_tensor(states, tf.float32)
    return self._each(states)

  @functools.cached_property
  def _each(self):
    """The map over images, with its gradient."""

    def parts(values):
      """[B, ...] as [parts, batch_size, ...], filled up with zeros."""
      count = -(-tf.shape(values)[0] // self.batch_size)
      missing = count * self.batch_size - tf.shape(values)[0]
      values = tf.pad(
          values, [[0, missing]] + [[0, 0]] * (values.shape.rank - 1))
      return tf.reshape(
          values, tf.concat([[count, self.batch_size],
                             tf.shape(values)[1:]], axis=0))

    def whole(values, like, shape):
      return tf.reshape(
          values, tf.concat([[-1], shape], axis=0))[:tf.shape(like)[0]]

    def back(pair):
      states, cotangents = pair
      with tf.GradientTape() as tape:
        tape.watch(states)
        images = self._decoded(states)
      return tape.gradient(images, states, cotangents)

    @tf.custom_gradient
    def each(states):
      images = whole(tf.map_fn(
          self._decoded, parts(states), parallel_iterations=1,
          fn_output_signature=tf.TensorSpec(
              [self.batch_size, *self.image_shape])),
                     states, self.image_shape)

      def gradient(upstream, variables=()):
        # Keras makes variables that TensorFlow could train. None is wanted.
        return whole(tf.map_fn(
            back, (parts(states), parts(upstream)), parallel_iterations=1,
            fn_output_signature=tf.TensorSpec(
                [self.batch_size, *self.state_shape])),
                     states, self.state_shape), [None] * len(variables)

      return images, gradient

    return each

  def _decoded(self, states):
    """Some images at once."""
    scale, shift = (tf.constant(value, tf.float32)
                    for value in (self.scale, self.shift))
    # training=False: no dropout, or the gradient would redraw its mask.
    return tf.cast(
        self.model(states / scale + shift, training=False), tf.float32)


class Standardised:
  """Images that were standardised: x = (image - mean) / std.

  Many networks are trained on images with a mean of 0 and a deviation of 1,
  such as those behind a normalisation layer of Keras. A layer that was fitted to
  images in [0, 1], with the means m and the deviations d, means here
  mean = 2 m - 1 and std = 2 d.

  Args:
    state_shape: (H, W, C).
    mean: of images in [-1, 1]; a number, or one for each channel.
    std: see `mean`; positive.

  Attributes:
    state_shape, image_shape: (H, W, C).
    sha256: hash of mean and std.

  Raises:
    UserError: mean or std are not numbers, or std is not positive.
  """

  def __init__(self, state_shape: tuple[int, int, int], mean=0.0, std=1.0):
    self.state_shape = self.image_shape = tuple(state_shape)
    self.mean, self.std = (
        _numbers(f"an image's {name}", value, self.state_shape[-1])
        for name, value in (("mean", mean), ("std", std)))
    if not np.all(self.std > 0):
      raise UserError(f"an image's std must be positive. Received: {std!r}")
    self.sha256 = fingerprint.text_sha256(json.dumps(self.told()))
    self.variables = []

  @property
  def description(self) -> str:
    """How it makes images of states, in words."""
    return "standardised for the network"

  def told(self) -> dict:
    """Mean and std, as JSON has them."""
    return {"mean": self.mean.tolist(), "std": self.std.tolist()}

  def __call__(self, states: tf.Tensor) -> tf.Tensor:
    """The images, float32 [B, H, W, C], of standardised ones."""
    return states * tf.constant(self.std, tf.float32) + tf.constant(
        self.mean, tf.float32)


def _by(shape):
  return " x ".join(map(str, shape))


def _shape(does, shape) -> tuple[int, int, int]:
  """(H, W, C) of a model's input or output."""
  if not isinstance(shape, tuple) or len(shape) != 4 or None in shape[1:]:
    raise UserError(f"a decoder must {does} one array of known shape (None, "
                    "height, width, channels). Received: "
                    f"{shape_text(shape) if isinstance(shape, tuple) else shape}")
  return tuple(shape[1:])


def _numbers(what, value, channels) -> np.ndarray:
  """A number, or one for each channel, float64."""
  try:
    numbers = np.asarray(value, np.float64)
  except (TypeError, ValueError):
    numbers = np.asarray(np.nan)
  if numbers.shape not in ((), (channels,)) or not np.all(np.isfinite(numbers)):
    raise UserError(f"{what} must be a number, or one for each of its {channels} "
                    f"channels. Received: {value!r}")
  return numbers
