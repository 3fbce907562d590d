"""SavedModels and images from a searched sampler."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import ddss_tf
from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.samplers import chain
from ddss_tf.samplers import generator as generator_lib
from ddss_tf.errors import UserError
from small_searches import ROUNDING, SHAPE


@pytest.mark.parametrize(
    "jit", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_export_needs_only_tensorflow(parts, finished, tmp_path, jit):
  run, sampler = finished
  path = ddss_tf.export(run, parts["denoiser"], jit_compile=jit)
  script = tmp_path / "serve.py"
  script.write_text(f"""
import sys
import numpy as np
import tensorflow as tf
model = tf.saved_model.load({path!r})
serve = model.signatures["serving_default"]
images = serve(seed=tf.constant([4, 0], tf.int32),
               batch_size=tf.constant(9, tf.int32))["images"]
again = serve(seed=tf.constant([4, 0], tf.int32),
              batch_size=tf.constant(5, tf.int32))["images"]
assert not [m for m in sys.modules if m.startswith(("ddss_tf", "gin"))]
np.savez({str(tmp_path / "images.npz")!r}, images=images, again=again)
""")
  subprocess.run([sys.executable, "-I", str(script)], check=True, cwd=tmp_path)
  x_T, noise = chain.draw_noise(tf.constant([4, 0]), tf.range(9), SHAPE, 3)
  images = sampler(x_T, noise, eps_fn=parts["denoiser"].eps)
  with np.load(tmp_path / "images.npz") as served:
    assert served["images"].dtype == np.uint8
    expected = dataset_lib.to_uint8(images.numpy()).astype(int)
    # Compiled, a value on the edge between two may round either way.
    assert np.abs(served["images"] - expected).max() <= (1 if jit else 0)
    np.testing.assert_array_equal(served["again"], served["images"][:5])
  loaded = tf.saved_model.load(path)
  library = loaded.signatures["from_noise"].graph.as_graph_def().library
  assert jit == any(
      function.attr["_XlaMustCompile"].b for function in library.function)
  np.testing.assert_allclose(
      loaded.signatures["from_noise"](x_T=x_T, step_noise=noise)["images"],
      np.clip(images, -1, 1), atol=ROUNDING)


def test_sampling_to_files(parts, finished):
  run, sampler = finished
  path = ddss_tf.sample(
      run, parts["denoiser"], num_images=10, seed=4, jit_compile=False)
  generator = generator_lib.Generator(parts["denoiser"], 10, jit_compile=False)
  with np.load(path) as arrays:
    np.testing.assert_array_equal(
        arrays["images"],
        dataset_lib.to_uint8(generator.images(sampler.coefficients(), 10, 4)))


def test_damaged_or_foreign_sampler(parts, finished, tmp_path):
  with pytest.raises(UserError, match="sampler.json must exist"):
    ddss_tf.sample(str(tmp_path), parts["denoiser"])
  with open(os.path.join(finished[0], "sampler.json")) as f:
    values = json.load(f)
  broken = {**values, "coefficients": {
      **values["coefficients"], "times": [1.0]}}
  foreign = {**values, "denoiser": {"name": "other", "sha256": "00"}}
  newer = {**values, "version": 99}
  for content, message in ((json.dumps(broken), "damaged.*shape"),
                           (json.dumps(foreign), "'other'.*Received"),
                           (json.dumps(newer), "version 1. Received.*99"),
                           ("{", "damaged")):
    (tmp_path / "sampler.json").write_text(content)
    with pytest.raises(UserError, match=message):
      ddss_tf.export(str(tmp_path), parts["denoiser"])
    assert not os.path.exists(tmp_path / "export")
