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
from ddss_tf.samplers import chain
from ddss_tf.samplers import generator as generator_lib
from small_searches import ROUNDING, SHAPE, events, options


def test_tensorboard_has_every_coefficient_by_name(finished):
  tags = set()
  for root, _, files in os.walk(os.path.join(finished[0], "tensorboard")):
    for file in files:
      for event in tf.compat.v1.train.summary_iterator(
          os.path.join(root, file)):
        tags.update(value.tag for value in event.summary.value)
  for name in finished[1].coefficients().named_scalars():
    assert f"coefficients/{name}" in tags
  for name in ("search/loss", "search/gradient_norm",
               "search/seconds_per_step", "validation/objective", "samples"):
    assert name in tags
  assert "config" in tags
  for name in run_dir.PICTURES:
    assert name.removesuffix(".png") in tags
  for name in finished[1].coefficients().arrays():
    assert f"coefficients/{name}" in tags  # Distributions.


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
