"""Whatever the gradients, a search's coefficients stay valid."""

from hypothesis import assume, given, HealthCheck, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from ddss_tf.objectives import objective as objective_lib
from ddss_tf.samplers import families
from ddss_tf.samplers import solvers
from ddss_tf.samplers import strides
from ddss_tf.searching import options as options_lib
from ddss_tf.searching import search as search_lib
from ddss_tf.errors import UserError

_T = 1000
_LEARNED = [name for name in families.family_names() if name not in solvers.SOLVERS]
# What gradients may look like; their sizes come from `magnitudes`.
_KINDS = ("normal", "one", "ones", "signs", "zero", "mixed", "nan")
_magnitudes = st.sampled_from(
    [1e-45, 1e-38, 1e-20, 1e-6, 1e-2, 1.0, 1e2, 1e6, 1e18, 1e37])


@st.composite
def _samplers(draw):
  """Options of `make_sampler` for anything that learns."""
  options = {"family": draw(st.sampled_from(_LEARNED)),
             "num_steps": draw(st.integers(1, 12))}
  if draw(st.booleans()):
    options["stride"] = draw(st.sampled_from(sorted(strides.STRIDES)))
  if draw(st.booleans()):
    options["init"] = draw(st.sampled_from(sorted(solvers.SOLVERS)))
  if draw(st.integers(0, 3)) == 0:
    options["parameterisation"] = "paper"
    options["init"] = draw(st.sampled_from(["ddim", "ddpm"]))
  return options


def _gradient(rng, kind, magnitude, sign, size):
  sign = 1.0 if sign else -1.0
  if kind == "normal":
    values = rng.normal(size=size)
  elif kind == "one":
    values = np.eye(size)[rng.integers(size)]
  elif kind == "ones":
    values = np.ones(size)
  elif kind == "signs":
    values = rng.choice([-1.0, 1.0], size)
  elif kind == "mixed":
    values = rng.choice([-1.0, 1.0], size) * 10 ** rng.uniform(-30, 1, size)
  elif kind == "nan":
    values = np.where(rng.random(size) < 0.5, np.nan, 1.0)
  else:
    values = np.zeros(size)
  with np.errstate(under="ignore", over="ignore"):
    return (sign * magnitude * values).astype(np.float32)


def _check(sampler):
  c = sampler.coefficients().numpy()
  c.validate()
  assert np.all(c.times <= _T)
  if "times" in sampler.variables_by_kind:
    # In order, but for rounding: a float32 near 1000 is exact to 6e-5.
    assert np.all(np.diff(c.times) <= 2e-4), c.times
    if sampler.parameterisation == "real":
      assert np.all(c.times <= _T - 1)


def _walk(parts, optimizer, options, gradients, seed, rate, spread):
  """A search of these steps, whose gradients are given."""
  schedule = parts["denoiser"].schedule
  try:
    sampler = families.make_sampler(schedule, **options)
  except UserError:
    assume(False)  # Not a start of this family, or not a stride for this K.
  assume(sampler.variables_by_kind)  # One step of some has nothing to learn.
  search = search_lib.assemble(
      parts["denoiser"], sampler, objective_lib.Objective(
          "kid_linear", [parts["features"]], [np.eye(12, dtype=np.float32)],
          parts["denoiser"].image_shape),
      options_lib.SearchOptions(
          batch_size=4, num_search_steps=len(gradients), learning_rate=rate,
          optimizer=optimizer))
  rng = np.random.default_rng(seed)
  size = sum(search.optimizer.variables.sizes)
  assume(size)
  if optimizer == "metric":
    # Its directions mix the variables, over decades.
    mixed, _ = np.linalg.qr(rng.normal(size=(size, size)))
    scales = 10.0 ** rng.uniform(-spread, spread / 2, size)
    search.optimizer.metric.value.assign(np.eye(size))
    search.optimizer.metric.inverse.assign(
        scales[:, None] * (mixed * scales) @ mixed.T * scales)
  _check(sampler)
  for kind, magnitude, sign in gradients:
    gradient = _gradient(rng, kind, magnitude, sign, size)
    search.gradient = lambda step, g=gradient: (0.0, g)
    search.advance()
    _check(sampler)
  return len(gradients)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["metric", "adam"])
@pytest.mark.parametrize("walks,steps", [
    (12, 20), pytest.param(100, 100, marks=pytest.mark.slow)])
def test_coefficients_stay_valid(gaussian_parts, walks, steps, optimizer):
  taken = []
  gradients = st.lists(
      st.tuples(st.sampled_from(_KINDS), _magnitudes, st.booleans()),
      min_size=steps, max_size=steps)

  @settings(max_examples=walks, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck))
  @given(options=_samplers(), gradients=gradients,
         seed=st.integers(0, 2**32 - 1),
         rate=st.sampled_from([1e-3, 0.15, 1.0, 30.0]), spread=st.floats(0, 4))
  def check(**arguments):
    taken.append(_walk(gaussian_parts, optimizer, **arguments))

  check()
  assert sum(taken) >= walks * steps
