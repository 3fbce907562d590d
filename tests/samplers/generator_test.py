"""Images in batches."""

import numpy as np

from ddss_tf.samplers import generator as generator_lib
from ddss_tf.samplers import sampler as sampler_lib


def test_image_i_is_the_same_in_any_batch(parts):
  c = sampler_lib.SolverSampler(
      parts["denoiser"].schedule, 3, "ddpm").coefficients()
  whole, parted = (
      generator_lib.Generator(parts["denoiser"], size, False).images(c, 50, 7)
      for size in (50, 13))
  np.testing.assert_allclose(whole, parted, atol=1e-6)
