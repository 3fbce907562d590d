"""Searches give what they gave before the code was taken apart.

`testdata/searches.npz` holds the coefficients of three searches of the digits at
commit 263e1da, made on a CPU with AVX-512. Compiled by XLA, as they were, they
are equal bit for bit on that machine. Another machine rounds otherwise, and a search carries such differences
on, so the comparison allows for them.
"""

import functools
import os

import numpy as np
import pytest

import ddss_tf
from project import TESTDATA

_SMALL = dict(
    num_search_steps=6, batch_size=48, gradient_samples=32, micro_batch_size=16,
    pool_samples=192, validation_samples=64, validate_every=2,
    checkpoint_every=3)
SEARCHES = {
    # A teacher, and a gradient of two passes.
    "teacher": dict(
        family=dict(family="ggdm+pred", num_steps=3, init="dpm++2m",
                    stride="trailing", parameterisation="real"),
        objective={"kid_cubic": 1.0, "teacher_features": 0.5,
                   "teacher_pixels": 0.1},
        teacher=dict(solver="ddim", num_steps=10, stride="trailing"), **_SMALL),
    "elbo": dict(
        family=dict(family="ggdm", num_steps=3, init="ddpm", stride="trailing"),
        objective="elbo", control_variate=False, **_SMALL),
    # The settings of gin_configs/demo.gin, 20 steps.
    "demo": dict(
        family=dict(family="ggdm+pred+time", num_steps=5, init="unipc2-bh2",
                    stride="linear", parameterisation="real"),
        objective="frechet", num_search_steps=20, batch_size=768,
        gradient_samples=96, pool_samples=15360, start_samples=500,
        validation_samples=1000, validate_every=5, checkpoint_every=5)}


@pytest.mark.slow
@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_is_what_it_was(name, digits, tmp_path):
  options = dict(SEARCHES[name])
  sampler = functools.partial(ddss_tf.make_sampler, **options.pop("family"))
  found = ddss_tf.search(
      ddss_tf.load_denoiser("digits16-ddpm"), sampler,
      ddss_tf.load_features("digits_cnn"), digits, run_dir=str(tmp_path),
      learning_rate=0.15, **options)
  with np.load(os.path.join(TESTDATA, "searches.npz")) as before:
    for part, values in found.coefficients().numpy().arrays().items():
      np.testing.assert_allclose(
          values, before[f"{name}/{part}"], rtol=1e-3, atol=1e-4, err_msg=part)
