"""A learned family from outside: a DDIM of one noise scale for all steps."""

import pytest
import tensorflow as tf

import ddss_tf
from ddss_tf.samplers import families, labels


class OneEta(ddss_tf.LearnedSampler):

  def _create_rows(self):
    self._factor = self._learn("noise_scales", "factor", [1.0])

  def default_start(self):
    return "ddpm", "linear"

  def _rows(self):
    start = self.start.numpy()
    return (start.state_weights, start.x0_weights,
            start.noise_scales * tf.abs(self._factor.value))


@pytest.fixture(autouse=True, scope="module")
def registered():
  yield ddss_tf.register_family("one-eta", label="ONE-ETA")(OneEta)
  del families.LEARNED["one-eta"], labels.LABELS["one-eta"]


def test_a_family_from_outside(parts, tmp_path, bind):
  run = str(tmp_path / "run")
  bind("make_sampler.family = 'one-eta+pred'\nmake_sampler.num_steps = 3")
  sampler = ddss_tf.search(
      run_dir=run, **parts, sampler=families.make_sampler,
      num_search_steps=4, batch_size=8, pool_samples=16,
      validation_samples=16, validate_every=2, jit_compile=False)
  assert sampler.label == "ONE-ETA+PRED"
  assert labels.group(sampler.label) == labels.SEARCHED
  ddss_tf.evaluate(run, **parts, num_samples=16, jit_compile=False)
  assert ddss_tf.export(run, parts["denoiser"], jit_compile=False)
  with open(ddss_tf.report(run), encoding="utf-8") as page:
    assert "ONE-ETA+PRED" in page.read()


@pytest.mark.slow
def test_it_is_compared(parts, tmp_path, bind):
  bind("search.num_search_steps = 2\nsearch.batch_size = 8\n"
       "search.pool_samples = 16\nsearch.validation_samples = 16\n"
       "search.start_samples = 8")
  records = ddss_tf.compare(
      str(tmp_path), **parts, num_steps=[2], solvers=["ddpm"],
      families=["one-eta"], num_samples=16, stride_samples=16, jit_compile=False)
  assert [r["sampler"].split()[0] for r in records] == ["DDPM", "ONE-ETA"]


def test_names_are_taken_once():
  with pytest.raises(ValueError, match="must be new.*'ggdm'.*_ggdm"):
    ddss_tf.register_family("ggdm", label="MINE")(OneEta)
  with pytest.raises(ValueError, match="known.*'other'"):
    ddss_tf.register_family("mine", label="MINE", contains=("other",))
