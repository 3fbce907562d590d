"""What a search shows."""

import os
import shutil

import numpy as np
import pytest
import tensorflow as tf

import ddss_tf
from ddss_tf.reporting import grids
from ddss_tf.reporting import sampler as sampler_figures
from ddss_tf.runs import run_dir
from ddss_tf.samplers import card
from ddss_tf.samplers import chain
from ddss_tf.samplers import generator as generator_lib
from small_searches import ROUNDING, SHAPE, events, options


def test_tensorboard_has_every_coefficient_by_name(finished):
  """With its values: at the start, and at the step that was the best."""
  run, sampler = finished
  found, pictures = {}, set()
  for root, _, files in os.walk(os.path.join(run, "tensorboard")):
    for file in files:
      for event in tf.compat.v1.train.summary_iterator(
          os.path.join(root, file)):
        for value in event.summary.value:
          found.setdefault(value.tag, {})[event.step] = tf.make_ndarray(
              value.tensor)
          if value.metadata.plugin_data.plugin_name == "images":
            pictures.add(value.tag)
  card_ = card.read(os.path.join(run, run_dir.SAMPLER))
  best = card_.search["best_step"]
  start = options()["sampler"](sampler.schedule).coefficients().numpy()
  for step, coefficients in ((0, start), (best, card_.coefficients)):
    for name, value in coefficients.named_scalars().items():
      np.testing.assert_allclose(
          found[f"coefficients/{name}"][step], value, rtol=1e-6)
  # A validation every 4 of 12 steps, and before the first.
  values = found["validation/objective"]
  assert sorted(values) == [0, 4, 8, 12]
  np.testing.assert_allclose(
      min(values.values()), card_.search["validation"], rtol=1e-6)
  assert values[best] == min(values.values())
  for name in ("search/loss", "search/gradient_norm",
               "search/seconds_per_step"):
    assert sorted(found[name]) == [5, 10, 12]
    assert all(np.isfinite(v) and v > 0 for v in found[name].values()), name
  assert b"" != found["config"][0]
  assert {"samples", *(name.removesuffix(".png") for name in run_dir.PICTURES)
          } <= pictures
  for name, values in card_.coefficients.arrays().items():
    # Rows of a histogram are [left, right, count].
    buckets = found[f"coefficients/{name}"][best]
    count = 6 if name == "state_weights" else 3
    assert buckets.shape[1] == 3 and buckets[:, 2].sum() == count
    lower = values[np.tril_indices(3)] if name == "state_weights" else values
    np.testing.assert_allclose(
        [buckets[0, 0], buckets[-1, 1]], [lower.min(), lower.max()], rtol=1e-6)


def test_tensorboard_has_the_hyper_parameters(finished):
  """As its own table of them is made."""
  # pylint: disable=g-import-not-at-top
  from tensorboard import context
  from tensorboard.backend.event_processing import data_provider
  from tensorboard.backend.event_processing import plugin_event_multiplexer
  from tensorboard.plugins import base_plugin
  from tensorboard.plugins.hparams import backend_context
  folder = os.path.join(finished[0], "tensorboard")
  events_of_runs = plugin_event_multiplexer.EventMultiplexer()
  events_of_runs.AddRunsFromDirectory(folder)
  events_of_runs.Reload()
  request, table = context.RequestContext(), backend_context.Context(
      base_plugin.TBContext(data_provider=data_provider.MultiplexerDataProvider(
          events_of_runs, folder)))
  found = table.experiment_from_metadata(
      request, "", True, table.hparams_metadata(request, ""),
      table.hparams_from_data_provider(request, "", None))
  words = {info.name: [value.string_value
                       for value in info.domain_discrete.values]
           for info in found.hparam_infos}
  assert words["family"] == ["GGDM+PRED+TIME"]
  assert "kid_linear" in words["objective"][0]
  numbers = {info.name: info.domain_interval.max_value
             for info in found.hparam_infos}
  assert numbers["num_steps"] == 3 and numbers["batch_size"] == 16
  assert "validation/objective" in [
      info.name.tag for info in found.metric_infos]


@pytest.mark.slow
def test_pictures_are_of_the_sampler_and_its_start(
    parts, tmp_path, monkeypatch):
  drawn = {}
  for module, name in ((sampler_figures, "coefficients_png"),
                       (sampler_figures, "path_png"), (grids, "samples_png")):
    inner = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, _inner=inner, _name=name: (
        drawn.update({_name: args}), _inner(*args)))
  run = str(tmp_path)
  searched = options(num_search_steps=2)
  sampler = ddss_tf.search(run_dir=run, **parts, **searched)
  start = searched["sampler"](parts["denoiser"].schedule).coefficients().numpy()
  best = sampler.coefficients().numpy()
  _, found, _, first, schedule = drawn["coefficients_png"]
  assert schedule is parts["denoiser"].schedule
  for a, b, c, d in zip(found, best, first, start):
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(c, d)
  # Before and after are made of the same noise.
  before, after = (images for _, images in drawn["samples_png"][1])
  x_T, noise = chain.draw_noise(
      generator_lib.seed_pair(1), tf.range(len(after)), SHAPE, 3)
  for coefficients, images in ((start, before), (best, after)):
    np.testing.assert_allclose(
        chain.run_chain(parts["denoiser"].eps, coefficients, x_T, noise),
        images, atol=ROUNDING)
  assert len(after) == 64
  # The way of the first of them, by the definition of every state.
  _, states, x0_hats, image, times, _ = drawn["path_png"]
  np.testing.assert_allclose(image, after[0], atol=ROUNDING)
  np.testing.assert_allclose(states[0], x_T[0], atol=ROUNDING)
  np.testing.assert_array_equal(times, best.times)
  for k in range(3):
    made = best.x0_weights[k] * x0_hats[k] + sum(
        best.state_weights[k, u] * states[u] for u in range(k + 1))
    if k < 2:
      made += best.noise_scales[k] * noise[0, k]
    np.testing.assert_allclose(
        made, [*states, image][k + 1], atol=ROUNDING)
  # What is there already is not drawn again.
  drawn.clear()
  ddss_tf.search(run_dir=run, **parts, **searched)
  assert not drawn
  os.remove(os.path.join(run, run_dir.PATH))
  ddss_tf.search(run_dir=run, **parts, **searched)
  assert os.path.exists(os.path.join(run, run_dir.PATH))


@pytest.mark.slow
def test_pictures_come_into_tensorboard_though_it_was_killed(
    parts, finished, tmp_path, monkeypatch):
  """Between the files and the events."""
  copy = str(tmp_path / "copy")
  shutil.copytree(finished[0], copy)
  pictures = os.path.join(copy, "tensorboard", "pictures")
  expected = events(copy, "pictures/*")
  shutil.rmtree(pictures)

  def killed(*_, **__):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(tf.summary, "image", killed)
    with pytest.raises(KeyboardInterrupt):
      ddss_tf.search(run_dir=copy, **parts, **options())
  assert not os.path.exists(pictures)
  ddss_tf.search(run_dir=copy, **parts, **options())
  assert len(expected) == len(run_dir.PICTURES)
  assert events(copy, "pictures/*") == expected
