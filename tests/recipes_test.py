"""Tests that every recipe of the paper's tables builds, with stand-in weights."""

import glob
import json
import os
import re

import keras
import numpy as np
import pytest

import checkpoints_test
import ddss_tf
from ddss_tf.denoisers import gaussian
import stand_in_data
from project import ROOT

RECIPES = os.path.join(ROOT, "gin_configs", "papers", "iclr2022")
CELLS = sorted(name for name in os.listdir(RECIPES)
               if re.search(r"_k\d+\.gin$", name))
SIZES = {"cifar10": 32, "imagenet64": 64, "lsun_bedroom": 128,
         "lsun_church": 128}
fake_torch = checkpoints_test.fake_torch  # A fixture.


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
  """Bindings of weights and images of the right shapes, by data set."""
  folder = tmp_path_factory.mktemp("stand_ins")
  inputs = keras.Input((299, 299, 3))
  x = keras.layers.AveragePooling2D(23)(inputs)
  x = keras.layers.Flatten()(x)
  x = keras.layers.Dense(2048, name="pool_3")(x)
  outputs = keras.layers.Dense(1008, name="logits")(x)
  inception = str(folder / "inception.keras")
  keras.Model(inputs, outputs).save(inception)
  bindings = {}
  for name, size in SIZES.items():
    model = str(folder / name)
    gaussian.gaussian_denoiser(
        (size, size, 3),
        schedule=ddss_tf.make_schedule("cosine", 4000)
        if name == "imagenet64" else None).save(model)
    images = str(folder / f"{name}.npz")
    # LSUN's photographs have many sizes, larger than the model's.
    side = size + 32 * name.startswith("lsun")
    np.savez(images, images=np.zeros((4, side, side, 3), np.uint8))
    bindings[name] = [f"load_denoiser.path = {model!r}",
                      f"load_dataset.name = 'npz:{images}'",
                      f"loss/load_features.path = {inception!r}"]
  return bindings


@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_builds(cell, stand_ins, main_in_process, capsys):
  dataset = next(name for name in SIZES if cell.startswith(name))
  path = os.path.join(RECIPES, cell)
  with open(path) as f:
    text = f.read()
  # The command in its header, with stand-ins for what cannot be shipped.
  mode = re.search(r"--mode=(\w+)", text).group(1)
  assert f"--gin_file={os.path.relpath(path, ROOT)}" in text
  main_in_process([
      "--dry_run", f"--gin_file={path}", f"--mode={mode}",
      *(f"--gin_param={binding}" for binding in stand_ins[dataset])])
  config = capsys.readouterr().out
  steps = re.search(r"_k(\d+)", cell).group(1)
  assert re.search(rf"^NUM_STEPS = {steps}$", config, re.MULTILINE)
  assert "evaluate.num_samples = %NUM_SAMPLES" in config
  assert "NUM_SAMPLES = 50000" in config


def test_published_checkpoints_are_read(
    stand_ins, tmp_path, main_in_process, capsys, fake_torch):
  """Small ones of their formats, with nothing but what the recipes say."""
  weights, _ = checkpoints_test.read_fixture("ddpm_tf1")
  cifar10 = tmp_path / "diffusion_cifar10_model"
  cifar10.mkdir()
  checkpoints_test.save_checkpoint(
      str(cifar10 / "model.ckpt-790000"),
      checkpoints_test.training_state(weights))
  weights, _ = checkpoints_test.read_fixture("openai_learned_sigma")
  fake_torch.state = {
      name: checkpoints_test.FakeTensor(value)
      for name, value in weights.items()}
  with open(os.path.join(RECIPES, "imagenet64.gin")) as f:
    header = f.read()
  imagenet64 = tmp_path / re.search(r"checkpoints/(\S+\.pt)", header).group(1)
  imagenet64.write_text("PyTorch reads this, not we")
  told = re.search(r"<path>\.json:\n(.*?\})$", header, re.M | re.S).group(1)
  with open(f"{imagenet64}.json", "w") as f:
    json.dump(json.loads(told.replace("#", "")), f)
  for name, path, steps in (
      ("cifar10", cifar10, 1000), ("imagenet64", imagenet64, 4000)):
    denoiser = ddss_tf.load_denoiser(str(path))
    assert denoiser.image_shape == (SIZES[name], SIZES[name], 3)
    assert len(denoiser.schedule.betas) == steps
    main_in_process([
        "--dry_run", "--mode=run",
        f"--gin_file={RECIPES}/{name}_ggdm_pred_time_k5.gin",
        f"--gin_param=load_denoiser.path = '{path}'",
        *(f"--gin_param={binding}" for binding in stand_ins[name][1:])])
    assert "NUM_STEPS = 5" in capsys.readouterr().out


def test_a_model_of_ones_own_builds(stand_ins, main_in_process, capsys):
  """By the command in the README and in the file's header."""
  configs = os.path.join(ROOT, "gin_configs")
  with open(os.path.join(ROOT, "README.md")) as f:
    assert "--gin_file=gin_configs/own.gin --gin_file=" in f.read()
  for mode in ("run", "compare"):
    main_in_process([
        "--dry_run", f"--mode={mode}", f"--gin_file={configs}/own.gin",
        f"--gin_file={configs}/datasets/folder.gin",
        "--gin_param=load_dataset.resize = 32", "--gin_param=NUM_STEPS = 10",
        *(f"--gin_param={binding}" for binding in stand_ins["cifar10"])])
    assert "search.objective = 'kid_linear'" in capsys.readouterr().out


def test_the_recipes_build_on_the_other_imagenet(
    stand_ins, tmp_path, main_in_process, capsys):
  stand_in_data.prepare(
      str(tmp_path), "imagenet_resized", "64x64", (64, 64, 3), labelled=True)
  datasets = os.path.join(ROOT, "gin_configs", "datasets")
  model, _, features = stand_ins["imagenet64"]
  main_in_process([
      "--dry_run", "--mode=run",
      f"--gin_file={RECIPES}/imagenet64_ggdm_pred_time_k5.gin",
      f"--gin_file={datasets}/imagenet_resized64.gin",
      *(f"--gin_param={binding}" for binding in (
          model, features, f"load_dataset.data_dir = '{tmp_path}'"))])
  config = capsys.readouterr().out
  assert "load_dataset.name = 'imagenet_resized/64x64'" in config


# The published tables, written down a second time: K, then FID or FID/IS.
PUBLISHED = """
cifar10 5 10 15 20 25
ddpm_linear 84.27/5.396 43.39/7.034 31.40/7.609 25.94/7.879 22.60/8.043
ddpm_quadratic 76.25/5.435 42.03/6.965 27.78/7.714 20.225/8.128 16.17/8.350
ddim_linear 44.41/6.750 19.11/7.965 14.06/8.190 11.82/8.420 10.52/8.512
ddim_quadratic 32.66/7.090 13.62/8.190 9.318/8.495 7.500/8.641 6.560/8.759
ggdm_pred_time 13.77/8.520 8.227/8.903 6.115/9.050 4.722/9.261 4.250/9.186
imagenet64 5 10 15 20 25
ddpm_linear 122.0/5.878 58.78/10.67 39.30/13.22 31.36/14.72 26.36/15.71
ddpm_quadratic 394.8/1.351 129.5/5.997 80.10/9.595 61.34/11.60 49.60/13.01
ddim_linear 135.4/5.898 40.70/12.225 28.54/13.99 24.225/14.75 22.13/15.16
ddim_quadratic 409.1/1.380 148.6/5.533 67.65/9.842 45.60/11.99 36.11/13.225
ggdm_pred_time 55.14/12.90 37.32/14.76 24.69/17.225 20.69/17.92 18.40/18.12
lsun_bedroom 5 10 20
ddpm 95.38 44.84 16.88
ddim 168.7 56.33 9.527
ggdm_pred_time 29.20 11.02 4.854
lsun_church 5 10 20
ddpm 96.67 51.05 16.53
ddim 133.1 54.39 14.96
ggdm_pred_time 30.14 11.60 6.651
"""


def test_there_is_a_cell_for_every_published_number():
  expected = {}
  for first, *values in map(str.split, PUBLISHED.strip().splitlines()):
    if first in SIZES:
      dataset, steps = first, values
      continue
    for k, value in zip(steps, values, strict=True):
      expected[f"{dataset}_{first}_k{k}.gin"] = tuple(value.split("/"))
  assert set(CELLS) == set(expected) and len(CELLS) == 2 * 5 * 5 + 2 * 3 * 3
  # No number is printed as ours.
  for cell in CELLS:
    with open(os.path.join(RECIPES, cell)) as f:
      fid, score, other = re.search(
          r"# Published \(.*\): FID ([\d.]+)(?:, IS ([\d.]+))?(, but .*)?\. "
          r"Not measured by us\.", f.read()).groups()
    assert (fid, score)[:len(expected[cell])] == expected[cell], cell
    # The two sources disagree on one of them: both are quoted.
    assert other == (", but 4.82 in the paper's abstract" if cell
                     == "lsun_church_ggdm_pred_time_k20.gin" else None), cell


def test_recipes_are_those_of_their_tool(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(os.path.join(ROOT, "tools"))
  import make_paper_recipes  # pylint: disable=g-import-not-at-top
  monkeypatch.setattr(make_paper_recipes, "ROOT", str(tmp_path))
  make_paper_recipes.main()
  shipped = glob.glob(os.path.join(RECIPES, "*.gin"))
  assert {os.path.basename(p) for p in shipped} == set(os.listdir(tmp_path))
  for path in shipped:
    with open(path) as a, open(tmp_path / os.path.basename(path)) as b:
      assert a.read() == b.read(), path


def test_a_model_of_another_size_is_refused(
    stand_ins, main_in_process, capsys):
  with pytest.raises(SystemExit):
    main_in_process([
        "--dry_run",
        f"--gin_file={os.path.join(RECIPES, 'cifar10_ddim_linear_k5.gin')}",
        "--mode=evaluate", *(f"--gin_param={binding}" for binding in (
            stand_ins["imagenet64"][0], *stand_ins["cifar10"][1:]))])
  assert "must have the image shape (64, 64, 3)" in capsys.readouterr().err
