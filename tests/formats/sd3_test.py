"""Tests of reading Stable Diffusion 3; golden outputs are of diffusers 0.42.1.

tests/testdata/latent_sd3 is a tiny pipeline. The files sd3_*.npz are networks
of other architectures, see tools/dump_sd3_fixture.py.
"""

import json
import os
import sys

from checkpoint_files import DATA, read_fixture, refusal
from network_folders import NetworkFolder, error
import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf

import ddss_tf
from ddss_tf.formats import diffusers
from ddss_tf.formats import flow_scheduler
from ddss_tf.formats import sd3
from ddss_tf.formats import weight_files
from ddss_tf.networks import files
from ddss_tf.networks import precision
from ddss_tf.networks.keras_hub import MMDiTConfig
from ddss_tf.samplers import chain

LATENT = os.path.join(DATA, "latent_sd3")
FOLDER = os.path.join(LATENT, "transformer")
FIXTURES = ["sd3_normalised", "sd3_one_block"]
# As shares of an output's standard deviation; 1.3e-5 is reached.
TOLERANCE = 2e-4


@pytest.fixture(scope="module", name="hub")
def keras_hub_installed():
  """Skips what needs KerasHub where it is not installed."""
  return pytest.importorskip("keras_hub")


@pytest.fixture(scope="module")
def golden():
  with np.load(os.path.join(LATENT, "golden.npz")) as file:
    return dict(file)


@pytest.fixture(scope="module")
def inputs(golden):
  return [golden[f"net_{name}"] for name in (
      "x", "t", "encoder_hidden_states", "pooled_projections")]


@pytest.fixture(scope="module")
def network(hub):
  """The network of the pipeline: do not change it."""
  del hub
  return sd3.read(FOLDER)[0]


_FIXTURE = NetworkFolder(FOLDER)
config_json, tensors, write = (
    _FIXTURE.config, _FIXTURE.tensors, _FIXTURE.write)


def run(model, inputs):
  return model(inputs, training=False).numpy()


def test_matches_diffusers(network, golden, inputs):
  assert np.any(golden["net_t"] % 1)  # Fractional times are among them.
  output = run(network, inputs)
  for one, truth in zip(output, golden["net_out"], strict=True):
    assert error(one, truth) < TOLERANCE
  assert not any(v.value.trainable for v in network.weights)
  assert not network.trainable
  assert [i.name for i in network.inputs] == ["x_t", "t", "context", "pooled"]
  assert network.output_shape == (None, 8, 8, 16)


@pytest.mark.parametrize("name", FIXTURES)
def test_other_architectures(hub, tmp_path, name):
  del hub
  weights, told = read_fixture(name)
  folder = write(tmp_path, json.loads(str(told["config"])), weights)
  size = told["x"].shape[1:3]
  assert size[0] != size[1]
  model, config = sd3.read(folder, size)
  assert config.image_size == size
  # Every tensor of the file has its own place.
  assert sum(v.size for v in weights.values()) == model.count_params()
  output = run(model, [told[key] for key in ("x", "t", "context", "pooled")])
  for one, truth in zip(output, told["output"], strict=True):
    assert error(one, truth) < TOLERANCE


def test_architectures_of_the_fixtures():
  told = [json.loads(str(read_fixture(name)[1]["config"])) for name in FIXTURES]
  assert told[0]["qk_norm"] == "rms_norm" and told[1]["qk_norm"] is None
  # Blocks with and without, and the last one.
  assert told[0]["dual_attention_layers"] == [0, 1]
  assert told[0]["num_layers"] == 3
  assert told[1]["dual_attention_layers"] == [0]
  assert told[1]["num_layers"] == 1


@pytest.mark.parametrize("name", FIXTURES)
def test_every_tensor_has_a_place(hub, tmp_path, name):
  """Each tensor fills a place, and q, k, v come in this order."""
  del hub
  weights, told = read_fixture(name)
  size = told["x"].shape[1:3]
  model, config = sd3.read(
      write(tmp_path, json.loads(str(told["config"])), weights), size)
  variables = [(v.path, tuple(v.shape)) for v in model.weights]
  numbered = {key: np.full_like(value, i)
              for i, (key, value) in enumerate(weights.items())}
  values = sd3.to_keras(numbered, variables, config.num_layers)
  assert {n for value in values.values() for n in np.unique(value)} == set(
      range(len(weights)))
  names = list(weights)
  if config.query_key_norm:
    # Outputs would not tell: only the product of the two gains counts.
    for ours, theirs in (("x_block/q_norm", "attn.norm_q"),
                         ("x_block/q_norm2", "attn2.norm_q"),
                         ("context_block/q_norm", "attn.norm_added_q")):
      assert np.all(values[f"joint_block_0/{ours}/scale"] == names.index(
          f"transformer_blocks.0.{theirs}.weight"))
  fused = values["joint_block_0/x_block/attention_qkv/kernel"]
  for part, value in zip("qkv", np.split(fused, 3, axis=1), strict=True):
    assert np.all(value == names.index(
        f"transformer_blocks.0.attn.to_{part}.weight"))


def test_config_is_read():
  config = sd3.read_config(FOLDER)
  assert config == MMDiTConfig(
      image_size=(8, 8), in_channels=16, patch_size=2, num_layers=2,
      num_heads=2, head_channels=8, position_size=12, context_width=12,
      pooled_width=10)
  assert config.conditions == (("context", (None, 12)), ("pooled", (10,)))
  assert sd3.read_config(FOLDER, 12).image_size == (12, 12)
  assert sd3.read_config(FOLDER, (6, 10)).image_size == (6, 10)


def test_defaults_are_those_of_diffusers(tmp_path):
  folder = write(tmp_path, {"_class_name": "SD3Transformer2DModel"})
  assert sd3.read_config(folder) == MMDiTConfig(
      image_size=(128, 128), in_channels=16, patch_size=2, num_layers=18,
      num_heads=18, head_channels=64, position_size=96, context_width=4096,
      pooled_width=2048)


def test_what_is_sd3(tmp_path):
  assert sd3.is_sd3(FOLDER)
  assert not sd3.is_sd3(LATENT)
  assert not sd3.is_sd3(str(tmp_path / "nowhere"))
  assert not sd3.is_sd3(write(tmp_path, {"_class_name": "UNet2DModel"}))


@pytest.mark.parametrize("changes,words", [
    (dict(_class_name="FluxTransformer2DModel"), ["'FluxTransformer2DModel'"]),
    (dict(brand_new=1), ["unknown key 'brand_new'", "1"]),
    (dict(sample_size=None), ["sample_size", "None"]),
    (dict(sample_size=[8, 8]), ["sample_size", "[8, 8]"]),
    (dict(patch_size="2"), ["patch_size", "'2'"]),
    (dict(num_layers=0), ["num_layers", "0"]),
    (dict(num_layers=True), ["num_layers", "True"]),
    (dict(pos_embed_max_size=None), ["pos_embed_max_size", "None"]),
    (dict(in_channels=17), ["out_channels must be 17", "16"]),
    (dict(out_channels=32), ["out_channels must be 16", "32"]),
    (dict(out_channels=16.0), ["out_channels", "16.0"]),
    (dict(caption_projection_dim=8),
     ["caption_projection_dim must be 16", "8"]),
    (dict(attention_head_dim=4), ["caption_projection_dim must be 8", "16"]),
    (dict(qk_norm="layer_norm"), ["qk_norm", "'rms_norm'", "'layer_norm'"]),
    (dict(qk_norm=["rms_norm"]), ["qk_norm", "['rms_norm']"]),
    (dict(dual_attention_layers=None), ["dual_attention_layers", "None"]),
    (dict(dual_attention_layers=[0, 2]),
     ["dual_attention_layers", "2 layers", "[0, 2]"]),
    (dict(dual_attention_layers=[-1]), ["dual_attention_layers", "[-1]"]),
])
def test_configurations_that_are_refused(tmp_path, changes, words):
  folder = write(tmp_path, config_json() | changes)
  message = refusal(sd3.read, folder)
  for word in [diffusers.CONFIG, *words]:
    assert word in message, message


def test_refused_sizes_of_latents(hub):
  del hub
  for size, words in ((7, "multiples of 2"), ((8, 26), "at most 24"),
                      ("8", "latent_size"), ((8, 8, 8), "latent_size")):
    message = refusal(sd3.read, FOLDER, size)
    assert words in message and str(size) in message


def test_keys_that_change_nothing(tmp_path):
  folder = write(tmp_path, config_json() | dict(
      out_channels=None, _name_or_path="somewhere", dual_attention_layers=[]))
  assert sd3.read_config(folder) == sd3.read_config(FOLDER)


@pytest.mark.parametrize("changes,words", [
    (dict(num_layers=1), ["Missing: none", "Unused: transformer_blocks."]),
    (dict(num_layers=3), ["Missing: transformer_blocks.1.", "Unused: none"]),
    (dict(qk_norm="rms_norm"), ["Missing: ", "attn.norm_q.weight"]),
    (dict(dual_attention_layers=[1]),
     ["transformer_blocks.1.attn2.to_q.weight"]),
    (dict(dual_attention_layers=[0]), ["transformer_blocks.0.attn2.to_q.bias"]),
    (dict(joint_attention_dim=13), ["context_embedder.weight", "(13, 16)"]),
    (dict(pos_embed_max_size=11), ["pos_embed.pos_embed", "(121, 16)"]),
    (dict(patch_size=4), ["pos_embed.proj.weight", "(4, 4, 16, 16)"]),
    (dict(in_channels=8, out_channels=8), ["(2, 2, 8, 16)"]),
    (dict(num_attention_heads=4, caption_projection_dim=32), ["32"]),
    (dict(attention_head_dim=2**14, caption_projection_dim=2**15),
     ["cannot be built", "width", "32768"]),
])
def test_weights_of_another_architecture(hub, tmp_path, changes, words):
  del hub
  folder = write(tmp_path, config_json() | changes)
  message = refusal(sd3.read, folder)
  for word in [folder, *words]:
    assert word in message, message


@pytest.mark.parametrize("name", [
    "transformer_blocks.0.attn.to_k.bias", "pos_embed.pos_embed",
    "transformer_blocks.1.attn.add_v_proj.weight", "norm_out.linear.weight",
    "transformer_blocks.0.ff_context.net.2.bias", "proj_out.bias"])
def test_missing_and_wrong_tensors(network, tmp_path, name):
  weights = tensors()
  variables = [(v.path, tuple(v.shape)) for v in network.weights]
  wrong = dict(weights)
  wrong[name] = np.concatenate([weights[name]] * 2)
  message = refusal(sd3.to_keras, wrong, variables, 2)
  assert f"tensor {name} must have the shape" in message
  del weights[name]
  folder = write(tmp_path, weights=weights)
  message = refusal(sd3.to_keras, weights, variables, 2)
  assert f"Missing: {name}. Unused: none" in message
  assert folder in refusal(sd3.read, folder)


def shards(folder, weights):
  """Weights in two files with an index, as diffusers saves large networks."""
  folder = write(folder)
  os.remove(os.path.join(folder, diffusers.WEIGHTS))
  names = sorted(weights)
  places = {}
  for i, part in enumerate((names[:9], names[9:]), 1):
    file = f"diffusion_pytorch_model-{i:05}-of-00002.safetensors"
    safetensors.numpy.save_file(
        {name: weights[name] for name in part}, os.path.join(folder, file))
    places |= dict.fromkeys(part, file)
  index = os.path.join(folder, diffusers.WEIGHTS + ".index.json")
  with open(index, "w", encoding="utf-8") as f:
    json.dump({"metadata": {"total_size": 1}, "weight_map": places}, f)
  return folder, index


def test_weights_in_several_files(network, tmp_path, inputs):
  folder, index = shards(tmp_path, tensors())
  model, _ = sd3.read(folder)
  np.testing.assert_array_equal(run(model, inputs), run(network, inputs))
  found = weight_files.files(folder)
  assert found[0] == index and len(found) == 3
  assert {os.path.basename(file) for file in found} | {diffusers.CONFIG} == (
      set(os.listdir(folder)))
  assert [os.path.basename(file) for file in weight_files.files(FOLDER)] == [
      diffusers.WEIGHTS, diffusers.PICKLED_WEIGHTS]
  os.remove(found[2])
  message = refusal(sd3.read, folder)
  assert "00002-of-00002" in message and index in message


@pytest.mark.parametrize("places", [
    None, {}, {"proj_out.bias": 1}, {"proj_out.bias": "../a.safetensors"},
    {"proj_out.bias": "a.bin"}])
def test_damaged_index(tmp_path, places):
  folder, index = shards(tmp_path, tensors())
  with open(index, "w", encoding="utf-8") as f:
    json.dump({"weight_map": places}, f)
  message = refusal(weight_files.files, folder)
  assert index in message and "weight_map" in message


def test_without_keras_hub(monkeypatch):
  for name in ("keras_hub", "keras_hub.models"):
    monkeypatch.setitem(sys.modules, name, None)
  message = refusal(sd3.read, FOLDER)
  assert message.startswith("KerasHub must be installed")
  assert "pip install ddss_tf[kerashub]" in message
  assert sd3.is_sd3(FOLDER) and sd3.read_config(FOLDER).num_layers == 2


def test_keras_file(network, tmp_path, inputs):
  path = str(tmp_path / "sd3.keras")
  network.save(path)
  loaded = files.load_keras(path)
  np.testing.assert_array_equal(run(loaded, inputs), run(network, inputs))
  assert files.graph_text(loaded) == files.graph_text(network)
  assert not any(v.value.trainable for v in loaded.weights)


@pytest.mark.slow
def test_bfloat16(network, golden, inputs, tmp_path):
  model = precision.with_policy(network, precision.BFLOAT16)
  output = model(inputs, training=False)
  assert output.dtype == tf.float32
  assert 1e-4 < error(output, golden["net_out"]) < 0.2
  # The policy and the times in float32 survive a file.
  path = str(tmp_path / "sd3.keras")
  model.save(path)
  loaded = files.load_keras(path)
  assert precision.policy(loaded) == precision.BFLOAT16
  assert error(run(loaded, inputs), golden["net_out"]) < 0.2
  # Times a quarter apart stay apart: bfloat16 itself has steps of 4 there.
  late = [inputs[0], np.full(4, 857, np.float32), *inputs[2:]]
  near = [inputs[0], late[1] + np.float32(0.25), *inputs[2:]]
  exact = run(network, near) - run(network, late)
  for other in (model, loaded):
    moved = run(other, near) - run(other, late)
    assert np.corrcoef(moved.ravel(), exact.ravel())[0, 1] > 0.5


class Guided:
  """The network of [x, t] with the conditions of the pipeline's run."""

  def __init__(self, network, golden):
    self.network = network
    self.conditions = [
        tf.concat([golden[f"run_{key}"], golden[f"run_negative_{key}"]], 0)
        for key in ("prompt_embeds", "pooled_prompt_embeds")]
    self.scale = float(golden["run_guidance"])

  def __call__(self, inputs, training=False):
    given, free = tf.split(self.network(
        [*(tf.concat([value, value], 0) for value in inputs),
         *self.conditions], training=training), 2)
    return free + self.scale * (given - free)


def test_run_of_the_pipeline(network, golden):
  """Network, process and stride together: FlowMatchEuler with guidance."""
  schedule, convention = flow_scheduler.read(FOLDER, (8, 8, 16), 2)
  denoiser = ddss_tf.Denoiser(
      Guided(network, golden), schedule, image_shape=(8, 8, 16), sha256="tiny",
      **convention)
  sampler = ddss_tf.make_sampler(schedule, "ddim", 4, stride="flow-euler")
  latents, states, _ = chain.run_chain(
      denoiser.output, denoiser.for_chain(sampler.coefficients().numpy()),
      golden["run_x_T"], trajectory=True)
  assert error(latents, golden["run_latents"]) < 5e-4
  # Ours are of unit variance: n = alpha + sigma times theirs.
  for state, truth, s in zip(states[1:], golden["run_states"],
                             golden["run_sigmas"][1:]):
    assert error(state * np.hypot(1 - s, s), truth) < 5e-4
