"""Tests of the embedded latent flow model of the digits."""

import json
import os

import numpy as np
import pytest
import tensorflow as tf

import ddss_tf
from ddss_tf.denoisers import denoiser as denoiser_lib
from ddss_tf.samplers import chain
from project import ROOT

NAME = "digits28-latent"


def test_it_is_what_its_record_says():
  with open(os.path.join(ROOT, "ddss_tf", "formats", "assets", NAME,
                         "training.json"), encoding="utf-8") as f:
    told = json.load(f)
  denoiser = ddss_tf.load_denoiser(NAME)
  assert denoiser.sha256 == told["sha256"]
  assert denoiser.decoder.sha256 == told["decoder_sha256"]
  assert (denoiser.state_shape, denoiser.image_shape) == (
      (7, 7, 4), (28, 28, 1))
  # Samplers may learn their guidance.
  assert (denoiser.null_label, denoiser.guidance_scale) == (10, None)


@pytest.mark.slow
def test_its_samples_are_the_digits_that_were_asked_for():
  denoiser = ddss_tf.load_denoiser(NAME, guidance_scale=1.5)
  labels = tf.constant(np.arange(50) % 10, tf.int32)
  coefficients = ddss_tf.make_sampler(
      denoiser.schedule, "ddim", 12, stride="trailing").coefficients()
  states = chain.run_chain(
      denoiser_lib.with_labels(denoiser.compiled_output(), labels),
      denoiser.for_chain(coefficients),
      tf.random.stateless_normal([50, *denoiser.state_shape], [0, 1]))
  features = ddss_tf.load_features(
      "digits_resnet", resize="bilinear_antialias", image_size=16)
  read = np.argmax(features(denoiser.decode(states))["logits"], axis=1)
  assert np.mean(read == labels) > 0.9
