"""A format of denoisers from outside: Gaussians in a line of text."""

import functools

import pytest

import ddss_tf


@ddss_tf.register_format(
    "gaussian text", lambda path: path.endswith(".gauss"), ("image_shape",))
def read_gaussian(path, given):
  with open(path, encoding="utf-8") as f:
    mean, std = map(float, f.read().split())
  return ddss_tf.gaussian_denoiser(
      given.get("image_shape", (4, 4, 1)), mean=mean, std=std)


@pytest.fixture
def path(tmp_path):
  (tmp_path / "model.gauss").write_text("0.3 0.25\n")
  return str(tmp_path / "model.gauss")


@pytest.mark.slow
def test_a_format_from_outside(parts, path, tmp_path, bind):
  run = str(tmp_path / "run")
  own = {name: parts[name] for name in ("dataset", "features")}
  bind(f"search.denoiser = @load_denoiser()\n"
       f"evaluate.denoiser = @load_denoiser()\n"
       f"export.denoiser = @load_denoiser()\n"
       f"compare.denoiser = @load_denoiser()\n"
       f"load_denoiser.path = {path!r}")
  ddss_tf.search(
      run_dir=run, **own, sampler=functools.partial(
          ddss_tf.make_sampler, family="ggdm", num_steps=2),
      num_search_steps=4, batch_size=8, pool_samples=16,
      validation_samples=16, validate_every=2, jit_compile=False)
  ddss_tf.evaluate(run, **own, num_samples=16, jit_compile=False)
  assert ddss_tf.export(run, jit_compile=False)
  records = ddss_tf.compare(
      str(tmp_path / "table"), **own, num_steps=[2], solvers=["ddim"],
      families=[], num_samples=16, stride_samples=16, jit_compile=False)
  assert records[0]["denoiser"]["sha256"] == parts["denoiser"].sha256
  with open(ddss_tf.report(run), encoding="utf-8") as page:
    assert "GGDM" in page.read()


def test_arguments_and_names(path):
  model = ddss_tf.load_denoiser(path, image_shape=(8, 8, 3))
  assert model.image_shape == (8, 8, 3)
  with pytest.raises(ddss_tf.UserError, match="prediction must not be given"):
    ddss_tf.load_denoiser(path, prediction="v")
  with pytest.raises(ValueError, match="must be new.*'diffusers'"):
    ddss_tf.register_format("diffusers", lambda path: False)(read_gaussian)
