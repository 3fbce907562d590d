"""Dumps a tiny random network of the original DDPM code with its outputs.

  git clone https://github.com/hojonathanho/diffusion
  PYTHONPATH=diffusion python -O tools/dump_ddpm_fixture.py tests/testdata

Run once, outside CI, with the original code in a graph of TensorFlow 1. That
code asserts that times are whole numbers, although its arithmetic takes any
time: -O drops its assertions.
"""

import json
import os
import sys
import types

import numpy as np
import small_fixture
import tensorflow.compat.v1 as tf


def _group_norm(x, scope):
  """Stands in for tf.contrib.layers.group_norm: 32 groups, epsilon 1e-6."""
  _, height, width, channels = x.shape.as_list()
  with tf.variable_scope(scope):
    beta = tf.get_variable("beta", [channels])
    gamma = tf.get_variable("gamma", [channels])
  grouped = tf.reshape(x, [-1, height, width, 32, channels // 32])
  mean, variance = tf.nn.moments(grouped, [1, 2, 4], keepdims=True)
  grouped = (grouped - mean) * tf.rsqrt(variance + 1e-6)
  return tf.reshape(grouped, [-1, height, width, channels]) * gamma + beta


def main(folder: str) -> None:
  # The model uses this function of tf.contrib, which TensorFlow 2 lacks.
  contrib = types.ModuleType("tensorflow.contrib")
  contrib.layers = types.SimpleNamespace(group_norm=_group_norm)
  sys.modules["tensorflow.contrib"] = contrib
  sys.modules["tensorflow"].contrib = contrib
  from diffusion_tf.models import unet  # pylint: disable=g-import-not-at-top

  tf.disable_v2_behavior()
  rng = np.random.default_rng(0)
  x = rng.standard_normal((4, 32, 32, 3)).astype(np.float32)
  # Rounded values compress better, and serve as inputs just as well.
  x = np.round(8 * x) / 8
  t = np.array([0.0, 13.0, 400.25, 999.0], np.float32)
  with tf.Graph().as_default(), tf.Session() as session:
    output = unet.model(
        tf.constant(x), t=tf.constant(t), y=None, name="model", num_classes=1,
        ch=32, out_ch=3, ch_mult=(1, 2), num_res_blocks=1,
        attn_resolutions=(16,))
    tensors = {}
    for variable in tf.trainable_variables():
      name = variable.op.name
      tensors[name] = small_fixture.draw(name, variable.shape.as_list(), rng)
      values, scale = tensors[name]
      variable.load(values * np.float32(scale), session)
    output = session.run(output)
  small_fixture.save(os.path.join(folder, "ddpm_tf1.npz"), tensors,
                     x=x, t=t, output=output)

  # The published networks for CIFAR-10 and LSUN, a quarter as wide.
  shapes = {}
  for name, size, widths in (("cifar10", 32, (1, 2, 2, 2)),
                             ("lsun", 256, (1, 1, 2, 2, 4, 4))):
    with tf.Graph().as_default():
      unet.model(
          tf.zeros((1, size, size, 3)), t=tf.zeros([1]), y=None, name="model",
          num_classes=1, ch=32, out_ch=3, ch_mult=widths, num_res_blocks=2,
          attn_resolutions=(16,))
      shapes[name] = {variable.op.name: variable.shape.as_list()
                      for variable in tf.trainable_variables()}
  with open(os.path.join(folder, "ddpm_shapes.json"), "w") as f:
    json.dump(shapes, f)


if __name__ == "__main__":
  main(sys.argv[1])
