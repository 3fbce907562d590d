"""A class-conditional Gaussian denoiser."""

import keras
import numpy as np
import tensorflow as tf

import ddss_tf
from ddss_tf.denoisers import denoiser as denoiser_lib
from ddss_tf.samplers import families
from ddss_tf.samplers import generator as generator_lib

SHAPE = (4, 4, 1)
STD = 0.25
MEANS = np.array([0.4, -0.1, -0.5, 0.7], np.float32)
NULL = 1  # On purpose not the last label.
STEPS = 3


@keras.saving.register_keras_serializable(package="tests")
class ClassEps(keras.layers.Layer):
  """eps of the exact denoiser of each label's class."""

  def call(self, x_t, t, labels):
    alpha_t, sigma_t = ddss_tf.make_schedule("linear", 1000).alpha_sigma(t)
    alpha_t, sigma_t = (
        value[:, None, None, None] for value in (alpha_t, sigma_t))
    mean = tf.gather(tf.constant(MEANS), labels)[:, None, None, None]
    return sigma_t * (x_t - alpha_t * mean) / (
        (alpha_t * STD) ** 2 + sigma_t**2)


def make(**options):
  inputs = [keras.Input(SHAPE), keras.Input(()),
            keras.Input((), dtype="int32")]
  return denoiser_lib.Denoiser(
      keras.Model(inputs, ClassEps()(*inputs)),
      ddss_tf.make_schedule("linear", 1000), name="classes",
      num_classes=len(MEANS), **options)


def gaussian(mean):
  return ddss_tf.gaussian_denoiser(SHAPE, mean=float(mean), std=STD)


def images(denoiser, count=12, seed=5, batch_size=5, **options):
  sampler = families.make_sampler(denoiser.schedule, "ddpm", STEPS)
  return generator_lib.Generator(denoiser, batch_size, False).images(
      sampler.coefficients(), count, seed, **options)
