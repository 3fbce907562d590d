"""Tests of what is counted for the estimates on paper."""

import numpy as np
import tensorflow as tf

from benchmarks import scaling


def test_operations_are_multiplications_and_additions():
  kernel = tf.ones([3, 3, 4, 8])
  assert scaling.flops(
      lambda x: tf.nn.conv2d(x, kernel, 2, "SAME"),
      tf.TensorSpec((1, 10, 10, 4))) == 2 * 3 * 3 * 4 * 8 * 5 * 5


def test_replicas_share_the_work():
  cost = scaling.Cost(flops=2e9, bytes=1e8)

  def step(num_steps, micro_batch, replicas, features=1e6):
    return scaling.step(
        cost, scaling.Cost(flops=1e9, bytes=features), num_steps, 1000,
        micro_batch, replicas, scaling.A100, 0.5)

  one, eight = step(5, 64, 1), step(5, 64, 8)
  assert (one.passes, eight.passes) == (2, 1)
  # Each image: 5 calls to sample; 5 again, 5 recomputed, 5 gradients.
  np.testing.assert_allclose(
      one.seconds, 512 * (5 * 4 * 2e9 + 3e9) / (0.5 * 156e12))
  np.testing.assert_allclose(
      eight.seconds, 64 * (5 * 3 * 2e9 + 2e9) / (0.5 * 156e12))
  assert one.sent_seconds == 0 < eight.sent_seconds
  # A machine sends to another more slowly than within.
  assert step(5, 64, 16).sent_seconds > 2 * eight.sent_seconds
  # Five times the steps, and the memory of a call.
  assert step(25, 64, 8).gib < 1.01 * eight.gib
  # What the features hold counts where it is more.
  assert step(5, 64, 8, 3e7).gib == eight.gib < step(5, 64, 8, 8e7).gib / 1.9
