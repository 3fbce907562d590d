"""Objectives: weighted sums of terms."""

import keras
import numpy as np
import pytest

from ddss_tf.features import network as network_lib
from ddss_tf.objectives import distances as distances_lib
from ddss_tf.objectives import objective as objective_lib
from small_searches import SHAPE


def test_an_objective_is_the_weighted_sum_of_its_terms(parts):
  first = parts["features"]
  other = network_lib.FeatureNetwork(
      keras.models.clone_model(first.model), "other")
  rng = np.random.default_rng(0)
  real, images, teacher = (
      (0.3 + size * rng.normal(size=(60, *SHAPE))).astype(np.float32)
      for size in (0.25, 0.4, 0.1))
  reals = [network(real)["pool"].numpy() for network in (first, other)]
  objective = objective_lib.Objective(
      {"kid_linear": 2.0, "frechet_axes": 1.0, "teacher_features": 3.0,
       "teacher_pixels": 4.0}, [first, other], reals, SHAPE, [1.0, 0.5])
  expected = 4 * np.mean((images - teacher) ** 2)
  for network, values, weight in zip((first, other), reals, (1.0, 0.5)):
    pool = network(images)["pool"].numpy()
    target = network(teacher)["pool"].numpy()
    for name, factor in (("kid_linear", 2.0), ("frechet_axes", 1.0)):
      expected += weight * factor * float(
          distances_lib.make_distance(name, values)(pool))
    expected += 3 * weight * np.mean(
        np.sum((pool - target) ** 2, axis=1)) / values.var(axis=0).sum()
  view = objective.view(images)
  assert view.shape == (60, objective.width)
  np.testing.assert_allclose(
      objective.value(view, objective.view(teacher)), expected, rtol=1e-4)


@pytest.mark.parametrize("terms,message", [
    ("beauty", "kid_linear.*'beauty'"), ({}, "terms"),
    ({"kid_linear": -1.0}, "'kid_linear' must be a number above 0"),
    ({"elbo": 1.0, "kid_linear": 1.0}, "stands alone")])
def test_bad_objectives(parts, terms, message):
  with pytest.raises(ValueError, match=message):
    objective_lib.Objective(terms, [parts["features"]],
                         [np.eye(12, dtype=np.float32)], SHAPE)
