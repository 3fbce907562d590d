"""Random changes of images, for tools that train classifiers."""

import tensorflow as tf


def augment(images: tf.Tensor, seed: tf.Tensor, shift: float, rotation: float,
            scale: float, background: float = -1.0) -> tf.Tensor:
  """Applies random similarity transforms about the centre.

  Args:
    images: float32 [B, H, H, C].
    seed: integer [2].
    shift: the largest shift along each axis, pixels.
    rotation: the largest rotation, radians.
    scale: the largest relative change of scale.
    background: what comes in from outside of an image.

  Returns:
    float32 [B, H, H, C].
  """
  batch, size = tf.shape(images)[0], images.shape[1]
  dx, dy, angle, zoom = tf.unstack(
      tf.random.stateless_uniform([4, batch], seed, -1.0, 1.0))
  a = tf.cos(rotation * angle) * (1 + scale * zoom)
  b = tf.sin(rotation * angle) * (1 + scale * zoom)
  centre = (size - 1) / 2
  transforms = tf.stack([
      a, -b, centre - a * centre + b * centre + shift * dx,
      b, a, centre - b * centre - a * centre + shift * dy,
      tf.zeros_like(a), tf.zeros_like(a)], axis=1)
  return tf.raw_ops.ImageProjectiveTransformV3(
      images=images, transforms=transforms, output_shape=[size, size],
      interpolation="BILINEAR", fill_mode="CONSTANT", fill_value=background)
