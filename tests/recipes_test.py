"""Tests that every cell of the paper's tables builds, with stand-in weights."""

import csv
import json
import os
import re
import shlex

import keras
import numpy as np
import pytest

import checkpoint_files
import ddss_tf
import stand_in_data
from ddss_tf.denoisers import gaussian
from ddss_tf.errors import UserError
from ddss_tf.reporting.published import load_published
from project import ROOT

RECIPES = os.path.join(ROOT, "gin_configs", "papers", "iclr2022")
SIZES = {"cifar10": 32, "imagenet64": 64, "lsun_bedroom": 128,
         "lsun_church": 128}
ROWS = {"ddpm": "ddpm", "ddim": "ddim", "ggdm_pred_time": "ggdm+pred+time"}
TABLES = ("table", "slides", "families", "objectives")
fake_torch = checkpoint_files.fake_torch  # A fixture.

with open(os.path.join(RECIPES, "published.csv"), newline="") as published:
  CELLS = list(csv.DictReader(published))
# DDPM at 1000 steps is in a table only.
OF_RECIPES = [cell for cell in CELLS if cell["row"] in ROWS]


def name_of(cell):
  """What pytest calls a cell."""
  return "-".join(filter(None, (
      cell["dataset"], cell["row"], cell["stride"], cell["num_steps"],
      cell["source"])))


def cell_arguments(dataset, row, num_steps, stride=""):
  """The arguments of a cell's command, but for --mode and --run_dir."""
  params = [f"NUM_STEPS = {num_steps}"]
  if stride:
    params.append(f'STRIDE = "{stride}"')
  return [f"--gin_file={RECIPES}/{dataset}.gin",
          f"--gin_file={RECIPES}/{row}.gin",
          *(f"--gin_param={param}" for param in params)]


def commands(name):
  """The arguments of the commands in a file of the recipes."""
  with open(os.path.join(RECIPES, name)) as f:
    found = re.findall(r"python -m ddss_tf\.main (.*(?:\\\n.*)*?[^\\]\n)",
                       f.read())
  return [shlex.split(re.sub(r"\\\n#?", " ", each)) for each in found]


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


@pytest.mark.quick(
    "cifar10-ddpm-linear-5-paper",
    "cifar10-ddim-quadratic-20-paper", "cifar10-ggdm_pred_time-10-paper",
    "cifar10-ggdm_pred_time-20-slides", "imagenet64-ddpm-linear-15-paper",
    "imagenet64-ggdm_pred_time-5-paper")
@pytest.mark.parametrize("cell", OF_RECIPES, ids=name_of)
def test_every_cell_builds(cell, stand_ins, main_in_process, capsys):
  dataset, row, stride = cell["dataset"], cell["row"], cell["stride"]
  searched = row == "ggdm_pred_time"
  main_in_process([
      "--dry_run", f"--mode={'run' if searched else 'evaluate'}",
      *cell_arguments(dataset, row, cell["num_steps"], stride),
      *(f"--gin_param={binding}" for binding in stand_ins[dataset])])
  config = capsys.readouterr().out.splitlines()
  for line in (
      f"NUM_STEPS = {cell['num_steps']}", "NUM_SAMPLES = 50000",
      "evaluate.num_samples = %NUM_SAMPLES", "evaluate.rounding = False",
      "loss/load_features.resize = 'bilinear_tf1'",
      *((f"FAMILY = '{ROWS[row]}'", "searched/make_sampler.family = %FAMILY",
         "search.optimizer = 'adam'", "search.real_samples = 512",
         "searched/make_sampler.parameterisation = 'paper'",
         "searched/make_sampler.num_steps = %NUM_STEPS",
         "search.objective = 'kid_linear'", "evaluate.baselines = []")
        if searched else
        (f"row/make_sampler.family = '{ROWS[row]}'",
         "row/make_sampler.num_steps = %NUM_STEPS",
         "row/make_sampler.stride = %STRIDE",
         # Where no stride is published, the linear one is our choice.
         f"STRIDE = '{stride or 'linear'}'",
         "evaluate.baselines = [@row/make_sampler]"))):
    assert line in config, line


@pytest.mark.parametrize("row", ROWS)
def test_the_command_of_a_row_builds(row, stand_ins, main_in_process, capsys):
  """The one in the header of its file, with stand-ins for what is not shipped."""
  (command,) = commands(f"{row}.gin")
  searched = row == "ggdm_pred_time"
  assert ("--mode=evaluate" in command) != searched
  assert f"--gin_file=gin_configs/papers/iclr2022/{row}.gin" in command
  command = [word.replace("gin_configs", f"{ROOT}/gin_configs")
             for word in command if not word.startswith("--run_dir=")]
  main_in_process([
      "--dry_run", *command,
      *(f"--gin_param={binding}" for binding in stand_ins["cifar10"])])
  config = capsys.readouterr().out
  assert re.search(r"^NUM_STEPS = 5$", config, re.MULTILINE)
  assert searched or re.search(r"^STRIDE = 'quadratic'$", config, re.MULTILINE)


@pytest.mark.parametrize("extras", ["", "+pred", "+time", "+pred+time"])
@pytest.mark.parametrize("family", ["ddim-learned", "vars", "rddim", "ggdm"])
def test_every_family_builds(family, extras, stand_ins, main_in_process, capsys):
  """The families' table, by the command in the header of its file."""
  (command,) = commands("family.gin")
  assert command.pop() == "--gin_param=FAMILY = \"vars+pred\""
  main_in_process([
      "--dry_run", *(word.replace("gin_configs", f"{ROOT}/gin_configs")
                     for word in command if not word.startswith("--run_dir=")),
      f"--gin_param=FAMILY = '{family}{extras}'",
      *(f"--gin_param={binding}" for binding in stand_ins["cifar10"])])
  assert f"FAMILY = '{family}{extras}'" in capsys.readouterr().out.splitlines()


@pytest.mark.quick(
    "ddpm-cifar10", "ggdm_pred_time-lsun_church",
    "table-imagenet64", "slides-cifar10", "families-lsun_bedroom",
    "objectives-imagenet64")
@pytest.mark.parametrize("dataset", SIZES)
@pytest.mark.parametrize("row", [*ROWS, *TABLES])
def test_a_cell_and_a_table_are_compared_with_what_is_published(
    row, dataset, stand_ins, main_in_process, capsys):
  """--mode=compare takes the recipes; a table's header has the command."""
  if row in TABLES:
    (command,) = commands(f"{row}.gin")
    command = [word.replace("gin_configs", f"{ROOT}/gin_configs").replace(
        "cifar10", dataset) for word in command if "--run_dir=" not in word]
    assert command[0] == "--mode=compare"
  else:
    command = ["--mode=compare", *cell_arguments(dataset, row, 5)]
  main_in_process([
      "--dry_run", *command,
      *(f"--gin_param={binding}" for binding in stand_ins[dataset])])
  config = capsys.readouterr().out.splitlines()
  told = "slides" if dataset.startswith("lsun") else "paper"
  sources = (["load_published.source = 'slides'"] if row == "slides" else
             ["load_published.source = %SOURCE", f"SOURCE = '{told}'"])
  for line in ("compare.published = @load_published()",
               f"load_published.dataset = '{dataset}'",
               *sources,
               "compare.parameterisation = 'paper'",
               "compare.rounding = False", "compare.num_samples = %NUM_SAMPLES",
               "search.optimizer = 'adam'"):
    assert line in config, line
  # The comparison's own list of K, or that of the cell.
  assert ("compare.num_steps = [%NUM_STEPS]" in config) == (row in ROWS)


@pytest.mark.parametrize("table", TABLES)
def test_a_table_builds_on_a_model_of_ones_own(
    table, stand_ins, main_in_process, capsys):
  configs = os.path.join(ROOT, "gin_configs")
  main_in_process([
      "--dry_run", "--mode=compare", f"--gin_file={configs}/own.gin",
      f"--gin_file={configs}/datasets/folder.gin",
      f"--gin_file={RECIPES}/search.gin", f"--gin_file={RECIPES}/{table}.gin",
      "--gin_param=load_dataset.resize = 32",
      *(f"--gin_param={binding}" for binding in stand_ins["cifar10"])])
  config = capsys.readouterr().out
  assert "compare.parameterisation = 'paper'" in config
  assert "search.optimizer = 'adam'" in config
  assert "compare.published" not in config


def test_every_published_cell_is_found():
  for dataset, source in {(cell["dataset"], cell["source"]) for cell in CELLS}:
    known = load_published(dataset, source)
    assert (known.dataset, known.source) == (dataset, source)
    cells = [cell for cell in CELLS
             if (cell["dataset"], cell["source"]) == (dataset, source)]
    assert len(known.cells) == len(cells)
    for cell in cells:
      row = ROWS.get(cell["row"], cell["row"])
      assert known.of(row, cell["stride"], int(cell["num_steps"])) == {
          "fid": float(cell["fid"]), "source": source, "note": cell["note"],
          "inception_score": float(cell["inception_score"])
                             if cell["inception_score"] else None}
  paper, slides = (load_published("cifar10", source)
                   for source in ("paper", "slides"))
  # Where no stride is published, the figure stands beside every stride.
  assert slides.of("ddim", "linear", 5) == slides.of("ddim", "quadratic", 5)
  assert paper.of("ddim", "linear", 5) != paper.of("ddim", "quadratic", 5)
  assert paper.of("ddim", "trailing", 5) is paper.of("ddim", "linear", 6) is None
  assert slides.of("full_chain", "posterior", 1000)["note"]


@pytest.mark.parametrize("content,words", [
    (None, "path must exist.*nowhere.csv"),
    ("dataset,row\nd,r\n", "must be a CSV with the columns dataset, row"),
    ("dataset,row,stride,num_steps,fid,inception_score,source,note\n"
     "d,r,,five,1,,s,\n", "must be a CSV.*five"),
    ("dataset,row,stride,num_steps,fid,inception_score,source,note\n"
     "e,r,,5,1,,s,\n", "must be out of 'e' of 's'. Received: 'd' of 's'")])
def test_a_bad_file_of_published_figures_is_refused(content, words, tmp_path):
  path = tmp_path / ("nowhere.csv" if content is None else "some.csv")
  if content is not None:
    path.write_text(content)
  with pytest.raises(UserError, match=words):
    load_published("d", "s", str(path))


def test_the_commands_of_the_readme_build(stand_ins, main_in_process, capsys):
  searched, fixed, table = commands("README.md")
  for command, line in ((searched, "NUM_STEPS = 5"),
                        (fixed, "STRIDE = 'quadratic'"),
                        (table, "compare.full_chain_steps = 1000")):
    main_in_process([
        "--dry_run", *(word.replace("gin_configs", f"{ROOT}/gin_configs")
                       for word in command),
        *(f"--gin_param={binding}" for binding in stand_ins["cifar10"])])
    assert line in capsys.readouterr().out.splitlines()
  assert not os.path.exists("runs/cifar10-k5")


@pytest.mark.slow
def test_published_checkpoints_are_read(
    stand_ins, tmp_path, main_in_process, capsys, fake_torch):
  """Small ones of their formats, with nothing but what the recipes say."""
  weights, _ = checkpoint_files.read_fixture("ddpm_tf1")
  cifar10 = tmp_path / "diffusion_cifar10_model"
  cifar10.mkdir()
  checkpoint_files.save_checkpoint(
      str(cifar10 / "model.ckpt-790000"),
      checkpoint_files.training_state(weights))
  weights, _ = checkpoint_files.read_fixture("openai_learned_sigma")
  fake_torch.state = {
      name: checkpoint_files.FakeTensor(value)
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
        *cell_arguments(name, "ggdm_pred_time", 5),
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
      *cell_arguments("imagenet64", "ggdm_pred_time", 5),
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
slides/cifar10 5 10 20 1000
ddpm 60.71 31.13 16.08 -
ddim 35.02 12.39 7.442 -
ggdm_pred_time 15.97 6.358 3.320 -
full_chain - - - 3.065
slides/imagenet64 5 10 20 1000
ddpm 71.29 59.36 38.42 -
ddim 254.8 127.6 44.54 -
ggdm_pred_time 80.45 46.98 26.61 -
full_chain - - - 16.58
slides/lsun_bedroom 5 10 20 1000
ddpm 95.38 44.84 16.88 -
ddim 168.7 56.33 9.527 -
ggdm_pred_time 29.20 11.02 4.854 -
full_chain - - - 2.457
slides/lsun_church 5 10 20 1000
ddpm 96.67 51.05 16.53 -
ddim 133.1 54.39 14.96 -
ggdm_pred_time 30.14 11.60 6.651 -
full_chain - - - 2.718
"""


def test_there_is_a_cell_for_every_published_number():
  expected = {}
  for first, *values in map(str.split, PUBLISHED.strip().splitlines()):
    source, _, dataset_or_row = first.rpartition("/")
    if dataset_or_row in SIZES:
      dataset, steps = (dataset_or_row, source or "paper"), values
      continue
    row, stride = re.fullmatch(
        r"(.+?)(?:_(linear|quadratic))?", first).groups(default="")
    for k, value in zip(steps, values, strict=True):
      if value != "-":
        expected[*dataset, row, stride, k] = value
  assert len(CELLS) == 2 * 5 * 5 + 4 * (3 * 3 + 1) == len(expected)
  found = {}
  for cell in CELLS:
    key = (cell["dataset"], cell["source"], cell["row"], cell["stride"],
           cell["num_steps"])
    found[key] = "/".join(filter(None, (cell["fid"], cell["inception_score"])))
    # The two sources disagree on one of them: both are quoted.
    assert cell["note"] == {
        ("lsun_church", "slides", "ggdm_pred_time", "", "20"):
            "4.82 in the paper's abstract",
        (cell["dataset"], "slides", "full_chain", "", "1000"):
            "its variance is not published"}.get(key, ""), key
    # Only the paper has Inception scores.
    assert bool(cell["inception_score"]) == (cell["source"] == "paper"), key
  assert found == expected


def test_no_number_is_printed_as_ours():
  with open(os.path.join(RECIPES, "README.md")) as f:
    readme = f.read()
  assert "the published figures. We measured none of them." in readme
  for source in ("`paper`", "`slides`", "6.651", "4.82"):
    assert source in readme
  for name in os.listdir(RECIPES):
    if name.endswith(".gin"):
      with open(os.path.join(RECIPES, name)) as f:
        assert not re.search(r"\d\.\d", f.read()), name


def test_the_folder_holds_data_sets_and_rows():
  assert set(os.listdir(RECIPES)) == {
      *(f"{name}.gin" for name in (*SIZES, *ROWS, *TABLES)), "common.gin",
      "search.gin", "family.gin", "published.csv", "README.md"}


def test_a_model_of_another_size_is_refused(
    stand_ins, main_in_process, capsys):
  with pytest.raises(SystemExit):
    main_in_process([
        "--dry_run", *cell_arguments("cifar10", "ddim", 5, "linear"),
        "--mode=evaluate", *(f"--gin_param={binding}" for binding in (
            stand_ins["imagenet64"][0], *stand_ins["cifar10"][1:]))])
  assert "must have the image shape (64, 64, 3)" in capsys.readouterr().err
