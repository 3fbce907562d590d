"""The loop: validations and ways back."""

import functools

import numpy as np

import ddss_tf
from ddss_tf.runs import run_dir
from ddss_tf.samplers import card
from ddss_tf.samplers import families
from ddss_tf.samplers import solvers
from ddss_tf.searching import loop
from ddss_tf.searching import optimizer as optimizer_lib
from ddss_tf.searching import validation
from small_searches import options, same_arrays


def test_a_worse_validation_takes_the_search_back(
    parts, tmp_path, monkeypatch):
  values = iter([4.0, 3.0, 5.0, np.nan, 2.0, 7.0])
  validated, begun, metrics_of = [], {}, []
  advance = loop.Search.advance
  measure = optimizer_lib.MetricAdam.begin

  def value_of(self, coefficients):
    validated.append(coefficients)
    return next(values)

  def noting(self):
    begun[self.step] = self.rate, self.sampler.coefficients().numpy()
    return advance(self)

  def measuring(self, step):
    metrics_of.append(step)
    return measure(self, step)

  monkeypatch.setattr(validation.Validation, "__call__", value_of)
  monkeypatch.setattr(loop.Search, "advance", noting)
  monkeypatch.setattr(optimizer_lib.MetricAdam, "begin", measuring)
  sampler = ddss_tf.search(run_dir=str(tmp_path), **parts, **options(
      num_search_steps=20, learning_rate=0.1, rate_of_distance=1e9))
  assert metrics_of == [0, 8, 12]
  for step, (source, factor) in {
      0: (0, 1), 4: (1, 1), 8: (1, 0.5), 12: (1, 0.25), 16: (4, 0.25)}.items():
    rate, coefficients = begun[step]
    same_arrays(coefficients, validated[source])
    expected = (0.05 * 0.5 if step == 0 else
                0.05 * (1 + np.cos(np.pi * (step - 1.5) / 18)))
    np.testing.assert_allclose(rate, factor * expected, rtol=1e-4)
  assert np.abs(validated[2].times - validated[1].times).max() > 1e-3
  assert card.read(str(tmp_path / run_dir.SAMPLER)).search["best_step"] == 16
  same_arrays(sampler.coefficients().numpy(), validated[4])


def test_a_search_never_ends_worse_than_it_starts(parts, tmp_path):
  # A rate that destroys every sampler: what is kept is the start.
  family = functools.partial(families.make_sampler, family="ggdm+pred",
                             num_steps=3, init="dpm++2m", stride="linear")
  sampler = ddss_tf.search(run_dir=str(tmp_path), **parts, **options(
      sampler=family, learning_rate=300.0, rate_of_distance=1e9,
      max_skipped=100))
  start = solvers.solver_coefficients(
      parts["denoiser"].schedule, "dpm++2m", 3, "linear").numpy()
  for a, b in zip(sampler.coefficients(), start):
    np.testing.assert_array_equal(a, b)
