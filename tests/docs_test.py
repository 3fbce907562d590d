"""Tests of the pages in docs/: their code runs, their links lead somewhere."""

import glob
import os
import re
import shlex

import pytest

from ddss_tf.runs import run_dir
from project import ROOT
from pages import blocks, text  # pylint: disable=unused-import

PAGES = sorted(
    os.path.relpath(page, ROOT)
    for page in glob.glob(os.path.join(ROOT, "docs", "**", "*.md"),
                          recursive=True))


# What a page asks for in full size, and what its test does.
SMALL = {"docs/keras_hub.md": (
    ("image_size=64", "image_size=4"), ("resize=512", "resize=32"),
    ("image_shape=(512, 512, 3)", "image_shape=(32, 32, 3)"),
    ("https://tfhub.dev/tensorflow/tfgan/eval/inception/1", "features.keras"),
    ("num_steps=7", "num_steps=2"), ("[2, 7, ", "[2, 2, "),
    ("num_search_steps=200, batch_size=128",
     "num_search_steps=1, batch_size=2, optimizer='adam', validation_samples=2, "
     "jit_compile=False"),
    ("gradient_samples=32", "gradient_samples=1"),
    ("prompt=prompts[0]", "prompt=prompts[0], jit_compile=False")),
         "docs/stable_diffusion.md": (
    ("=denoiser, num_steps=8", "=denoiser, num_steps=2"),
    ('guidance", num_steps=8', 'guidance", num_steps=2'),
    ("resize=512", "resize=16"),
    ("https://tfhub.dev/tensorflow/tfgan/eval/inception/1", "inception.keras"),
    ("num_search_steps=200, batch_size=128",
     "num_search_steps=1, batch_size=4, pool_samples=8, validation_samples=8, "
     "jit_compile=False"),
    ("num_images=4", "num_images=2, jit_compile=False"))}


@pytest.mark.parametrize("page", [
    pytest.param(page, marks=[pytest.mark.slow] * (page in SMALL))
    for page in PAGES if blocks(page)])
def test_code_of_a_page_runs(page, tmp_path, monkeypatch):
  # The blocks of a page follow each other, as a reader would type them.
  monkeypatch.chdir(tmp_path)
  bring = {"docs/models.md": _bring_models,
           "docs/keras_hub.md": _bring_keras_hub,
           "docs/stable_diffusion.md": _bring_pipeline}.get(page)
  if bring is not None:
    bring()
  code = "\n# Next.\n".join(blocks(page))
  for mine, small in SMALL.get(page, ()):
    assert code.count(mine) == 1, mine
    code = code.replace(mine, small)
  exec(compile(code, page, "exec"), {})  # pylint: disable=exec-used


def _bring_keras_hub():
  """A tiny preset, captions, images and a classifier."""
  pytest.importorskip("keras_hub")
  import keras_hub_models as tiny  # pylint: disable=g-import-not-at-top

  tiny.make_task(tiny.filled_backbone()).save_to_preset("path/to/preset")
  with open("captions.txt", "w", encoding="utf-8") as f:
    f.write("a cat\na dog\ndog\n")
  os.mkdir("my_images")
  _bring_images("my_images", 6)
  _bring_features(32, "features.keras")


def _bring_models():
  """Small ones where a reader's own would be."""
  import keras  # pylint: disable=g-import-not-at-top
  import ddss_tf  # pylint: disable=g-import-not-at-top

  os.makedirs("path/to")
  os.symlink(os.path.join(ROOT, "tests", "testdata", "latent_ldm"),
             "path/to/pipeline")
  ddss_tf.gaussian_denoiser((4, 4, 3)).save("path/to/latent_network")
  latents = keras.Input((4, 4, 3))
  keras.Model(latents, keras.layers.UpSampling2D(2)(latents)).save(
      "path/to/decoder.keras")


def _bring_pipeline():
  """A tiny pipeline, a table of its prompts, images and a feature network."""
  import numpy as np  # pylint: disable=g-import-not-at-top
  import ddss_tf  # pylint: disable=g-import-not-at-top

  pipeline = os.path.join(ROOT, "tests", "testdata", "latent_sd")
  os.makedirs("path/to/images")
  os.symlink(pipeline, "path/to/pipeline")
  with np.load(os.path.join(pipeline, "golden.npz")) as golden:
    ddss_tf.ConditionTable(
        {"context": np.concatenate(
            [golden["run_prompt_embeds"], golden["run_negative_prompt_embeds"][:1]])},
        prompts=["a photo of a cat", "a photo of a dog", "blurry"], null_row=2,
    ).save("prompts.npz")
  _bring_images("path/to/images", 6)
  _bring_features(16)


def _bring_images(folder, count):
  import numpy as np  # pylint: disable=g-import-not-at-top
  from PIL import Image  # pylint: disable=g-import-not-at-top

  rng = np.random.default_rng(0)
  for i in range(count):
    Image.fromarray(rng.integers(0, 255, (70, 90, 3), np.uint8)).save(
        f"{folder}/{i}.png")


def _bring_features(side, path="inception.keras"):
  import keras  # pylint: disable=g-import-not-at-top

  inputs = keras.Input((side, side, 3))
  pool = keras.layers.Dense(5, name="pool")(
      keras.layers.Flatten()(keras.layers.AveragePooling2D(side // 4)(inputs)))
  keras.Model(inputs, keras.layers.Dense(3, name="logits")(pool)).save(path)


@pytest.mark.slow
def test_code_of_the_readme_runs(tmp_path, monkeypatch):
  """With small things where the reader's own and Inception would be."""
  import numpy as np  # pylint: disable=g-import-not-at-top
  import ddss_tf  # pylint: disable=g-import-not-at-top
  from ddss_tf.samplers import card  # pylint: disable=g-import-not-at-top

  monkeypatch.chdir(tmp_path)
  serve, _, search = blocks("README.md")  # The other is PyTorch's.
  denoiser = ddss_tf.gaussian_denoiser((16, 16, 1))
  os.makedirs("runs/demo")
  card.write("runs/demo/sampler.json", card.SamplerCard(
      "DDIM", ddss_tf.solver_coefficients(
          denoiser.schedule, "ddim", 2).numpy(), denoiser.identity, {}))
  ddss_tf.export("runs/demo", denoiser)
  names = {}
  exec(compile(serve, "README.md", "exec"), names)  # pylint: disable=exec-used
  images = names["images"].numpy()
  assert images.dtype == np.uint8 and images.std() > 5
  assert images.shape == (16, 16, 16, 1)

  ddss_tf.gaussian_denoiser((64, 64, 3)).save("path/to/diffusers_folder")
  os.mkdir("my_images")
  _bring_images("my_images", 6)
  _bring_features(64)
  for mine, small in (
      ("https://tfhub.dev/tensorflow/tfgan/eval/inception/1",
       "inception.keras"),
      ("num_search_steps=200, batch_size=128",
       "num_search_steps=1, batch_size=4, pool_samples=8, "
       "validation_samples=8, jit_compile=False"),
      ("gradient_samples=32", "gradient_samples=2"),
      ("num_samples=10000", "num_samples=8, jit_compile=False"),
      ("num_images=64", "num_images=4, jit_compile=False")):
    assert search.count(mine) == 1
    search = search.replace(mine, small)
  exec(compile(search, "README.md", "exec"), {})  # pylint: disable=exec-used
  assert card.read("runs/mine/sampler.json").coefficients.num_steps == 10
  for name in ("metrics.json", "export/saved_model.pb", "generated.png"):
    assert os.path.exists(os.path.join("runs/mine", name)), name


def commands(page):
  """The arguments of each `python -m ddss_tf.main` of a page."""
  fence = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
  fenced = [code for word, code in fence.findall(text(page)) if not word]
  lines = "\n".join(fenced).replace("\\\n", " ").splitlines()
  lines += re.findall(r"`([^`]+)`", fence.sub("", text(page)))
  for line in lines:
    program, found, arguments = line.partition("ddss_tf.main ")
    if found and program.split() == ["python", "-m"]:
      words = shlex.split(arguments, comments=True)
      # A choice of modes is a command for each.
      choice = next((word for word in words if "|" in word), "")
      name, _, modes = choice.partition("=")
      for mode in modes.split("|"):
        yield [f"{name}={mode}" if word == choice else word for word in words]


def test_commands_are_found():
  found = [command for page in ("README.md", "docs/sampler_json.md")
           for command in commands(page)]
  modes = [next((word for word in command if word.startswith("--mode=")), None)
           for command in found]
  assert sorted(map(str, modes)) == [*(f"--mode={mode}" for mode in (
      "compare", "evaluate", "export", "inspect", "sample", "sample", "sample",
      "search", "zoo", "zoo")), "None"]


@pytest.fixture
def readers_folder(tmp_path, monkeypatch):
  """What a reader would bring, small, where the commands look for it."""
  import keras  # pylint: disable=g-import-not-at-top
  import numpy as np  # pylint: disable=g-import-not-at-top
  from PIL import Image  # pylint: disable=g-import-not-at-top
  import ddss_tf  # pylint: disable=g-import-not-at-top

  monkeypatch.chdir(tmp_path)
  os.symlink(os.path.join(ROOT, "gin_configs"), "gin_configs")
  ddss_tf.gaussian_denoiser((64, 64, 3)).save("path/to/model")
  os.mkdir("my_images")
  for i in range(4):
    Image.fromarray(np.full((8, 8, 3), 60 * i, np.uint8)).save(
        f"my_images/{i}.png")
  inputs = keras.Input((299, 299, 3))
  pool = keras.layers.Flatten(name="pool_3")(
      keras.layers.AveragePooling2D(99)(inputs))
  keras.Model(inputs, keras.layers.Dense(3, name="logits")(pool)).save(
      "inception.keras")


@pytest.mark.slow
def test_commands_of_the_pages_build(
    readers_folder, main_in_process, capsys, tfds_dir, monkeypatch):
  del readers_folder
  monkeypatch.setenv("TFDS_DATA_DIR", tfds_dir)
  for page in ("README.md", "docs/sampler_json.md"):
    for command in commands(page):
      command = [word.replace('"PATH"', '"path/to/model"') for word in command]
      if "own.gin" in " ".join(command):
        command.append(
            "--gin_param=loss/load_features.path = 'inception.keras'")
      if not {"--mode=zoo", "--mode=inspect"} & set(command):
        command.append("--dry_run")
      main_in_process(command)
      assert capsys.readouterr().out, command
  assert not os.path.exists("runs")


def test_pages_with_code():
  assert {"docs/index.md", "docs/method.md"} <= {
      page for page in PAGES if blocks(page)}


@pytest.mark.parametrize("page", [
    *PAGES, "README.md", "CONTRIBUTING.md", "CHANGELOG.md",
    "benchmarks/README.md"])
def test_links_of_a_page(page):
  for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text(page)):
    if not target.startswith("http"):
      path = os.path.join(ROOT, os.path.dirname(page), target)
      assert os.path.exists(path), f"{page}: {target}"


def test_every_reference_exists():
  # Griffe reads the source without importing it; so does this.
  for page in PAGES:
    for name in re.findall(r"^::: ddss_tf\.(\S+)", text(page), re.M):
      package, _, rest = name.partition(".")
      module, _, member = rest.partition(".")
      path = os.path.join(ROOT, "ddss_tf", package, module + ".py")
      if not os.path.exists(path):  # A module outside of the packages.
        path, member = os.path.join(ROOT, "ddss_tf", package + ".py"), rest
      with open(path, encoding="utf-8") as f:
        source = f.read()
      members = [member] if member else []
      for listed in re.findall(
          rf"^::: ddss_tf\.{re.escape(name)}\n    options: .*members: "
          r"\[([^\]]*)\]", text(page), re.M):
        members += listed.split(", ")
      for each in members:
        assert re.search(rf"^(def|class) {each}\b", source, re.M), (page, each)


def test_the_readme_lists_the_files_of_a_run():
  section = text("README.md").split("## What it leaves")[1].split("\n## ")[0]
  listed = set(re.findall(r"`([\w./]+)`", section))
  for file in run_dir.FILES:
    assert {file.name, file.name + "/"} & listed, file.name
