"""Tests of the reader of UNet2DConditionModel; golden values are of diffusers."""

import dataclasses
import functools
import json
import os
import shutil

from checkpoint_files import DATA, read_fixture, refusal
import keras
from network_folders import error
import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf

from ddss_tf.formats import condition_unet as reader
from ddss_tf.formats import diffusers
from ddss_tf.formats import tensors
from ddss_tf.networks import condition_layers
from ddss_tf.networks import condition_unet
from ddss_tf.networks.condition_unet import ConditionUNetConfig

LATENT = os.path.join(DATA, "latent_sd")
FIXTURES = ["linear", "text_time", "refiner", "odd", "no_middle"]
INPUTS = ("x", "t", "context", "pooled", "time_ids")
PARAMETERS = dict(sd1=859_520_964, sd2=865_910_724, sdxl=2_567_463_684)


@functools.cache
def fixture(name):
  """(weights, golden arrays, configuration); see tools/small_fixture.py."""
  weights, golden = read_fixture(f"condition_{name}")
  return weights, golden, json.loads(str(golden["config"]))


@functools.cache
def published():
  """The configuration, and the tensors' shapes, of published networks."""
  with np.load(os.path.join(DATA, "condition_shapes.npz")) as file:
    return {name: json.loads(str(value)) for name, value in file.items()}


def write(folder, name, changes=None, weights=None):
  """A folder with a fixture's files, or what is given instead."""
  own_weights, _, config = fixture(name)
  folder = str(folder)
  os.makedirs(folder, exist_ok=True)
  write_config(folder, config | (changes or {}))
  safetensors.numpy.save_file(
      {key: np.ascontiguousarray(value)
       for key, value in (weights or own_weights).items()},
      os.path.join(folder, diffusers.WEIGHTS))
  return folder


def write_config(folder, config):
  with open(os.path.join(str(folder), diffusers.CONFIG), "w",
            encoding="utf-8") as f:
    json.dump(config, f)
  return str(folder)


def num_sizes(name):
  return 5 if name == "refiner" else 6


def read(folder, name):
  return reader.read(folder, num_sizes=num_sizes(name))[0]


@pytest.fixture(scope="module")
def network(tmp_path_factory):
  """Gives the network of a fixture: do not change it."""
  return functools.cache(lambda name: read(
      write(tmp_path_factory.mktemp(name), name), name))


def matched(weights, model):
  """What `reader.read` does with weights, for a network that is built."""
  return tensors.matched(
      weights, [(v.path, tuple(v.shape)) for v in model.weights],
      reader.source_name, tensors.torch_layout)


def inputs(golden):
  return [tf.constant(golden[key]) for key in INPUTS if key in golden]


@pytest.mark.quick("refiner", "odd", "no_middle")
@pytest.mark.parametrize("name", FIXTURES)
def test_matches_diffusers(network, name):
  model = network(name)
  _, golden, _ = fixture(name)
  given = inputs(golden)
  assert [i.name for i in model.inputs] == [
      "x_t", "t", "context", "pooled", "time_ids"][:len(given)]
  # Each time by itself, lest a large one hides a small one.
  for one, truth in zip(model(given, training=False), golden["output"],
                        strict=True):
    assert error(one, truth) < 1e-4
  assert not any(v.value.trainable for v in model.weights)
  assert not model.trainable


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    "text_time", "odd", pytest.param("linear", marks=pytest.mark.slow),
    pytest.param("refiner", marks=pytest.mark.slow),
    pytest.param("no_middle", marks=pytest.mark.slow)])
def test_gradients_match_diffusers(network, name):
  _, golden, _ = fixture(name)
  given = inputs(golden)
  with tf.GradientTape() as tape:
    tape.watch(given)
    total = tf.reduce_sum(
        golden["weight"] * network(name)(given, training=False))
  for key, gradient in zip(INPUTS, tape.gradient(total, given)):
    assert error(gradient, golden[f"d_{key}"]) < 5e-4, key


@pytest.fixture(scope="module")
def latent():
  """The network of the pipeline fixture, its inputs and its output."""
  model, config = reader.read(os.path.join(LATENT, "unet"))
  with np.load(os.path.join(LATENT, "golden.npz")) as file:
    return model, config, [
        file["net_x"], file["net_t"], file["net_encoder_hidden_states"]], (
            file["net_out"])


def test_pipeline_fixture(latent):
  model, config, given, truth = latent
  assert np.any(given[1] % 1)  # Fractional times are among them.
  assert config.conditions == (("context", (None, 12)),)
  for one, expected in zip(model(given, training=False), truth, strict=True):
    assert error(one, expected) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name,changes", [
    ("linear", dict(norm_eps=1e-5)), ("linear", dict(attention_head_dim=2)),
    ("linear", dict(flip_sin_to_cos=False)),
    ("text_time", dict(attention_head_dim=1)),
    ("refiner", dict(act_fn="silu")), ("refiner", dict(freq_shift=0)),
    ("refiner", dict(mid_block_scale_factor=1)),
    ("refiner", dict(flip_sin_to_cos=True)),
    ("refiner", dict(norm_num_groups=2)),
    ("odd", dict(act_fn="silu")), ("odd", dict(timestep_post_act=None)),
    ("odd", dict(time_embedding_act_fn=None)),
    ("odd", dict(center_input_sample=False)),
    ("odd", dict(downsample_padding=1)), ("no_middle", dict(act_fn="silu")),
    ("no_middle", dict(downsample_padding=0)),
])
def test_every_key_counts(tmp_path, name, changes):
  """The golden values tell these values from those of the fixture."""
  _, golden, _ = fixture(name)
  model = read(write(tmp_path, name, changes), name)
  assert error(model(inputs(golden), training=False), golden["output"]) > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name,constant,wrong", [
    ("linear", "_GROUP_EPSILON", 1e-5), ("text_time", "_EPSILON", 1e-6)])
def test_epsilons_without_a_key(tmp_path, monkeypatch, name, constant, wrong):
  monkeypatch.setattr(condition_layers, constant, wrong)
  _, golden, _ = fixture(name)
  model = read(write(tmp_path, name), name)
  assert error(model(inputs(golden), training=False), golden["output"]) > 0.05


def test_config_is_read(tmp_path):
  folder = write_config(tmp_path, fixture("text_time")[2])
  assert reader.read_config(folder) == ConditionUNetConfig(
      image_size=8, in_channels=4, out_channels=4, channels=(8, 12, 16),
      blocks_per_level=(1, 1, 1), down_transformers=((), (2,), (3,)),
      up_transformers=((3, 3), (2, 2), ()), num_heads=(1, 3, 4),
      context_width=10, mid_transformer=3, norm_groups=4, pooled_width=5,
      num_sizes=6, size_features=8)
  folder = write_config(tmp_path, fixture("odd")[2])
  assert reader.read_config(folder) == ConditionUNetConfig(
      image_size=(7, 10), in_channels=3, out_channels=5, channels=(8, 12, 8),
      blocks_per_level=(1, 2, 1), down_transformers=((), (1, 1), (1,)),
      up_transformers=((), (1, 1, 1), ()), num_heads=(2, 2, 2), context_width=9,
      only_context_levels=(1,), middle="block", norm_groups=4,
      symmetric_downsample=False, scale_shift=True, activation="gelu",
      time_width=20, time_activation="mish", embedding_activation="relu",
      center_input=True, kernel_in=5, kernel_out=1)
  folder = write_config(tmp_path, fixture("refiner")[2])
  assert reader.read_config(folder, num_sizes=5) == ConditionUNetConfig(
      image_size=8, in_channels=4, out_channels=4, channels=(8, 16),
      blocks_per_level=(1, 1), down_transformers=((1,), ()),
      up_transformers=((), (2, 0)), num_heads=(2, 4), context_width=6,
      mid_transformer=2, mid_divisor=1.5, norm_groups=4, sin_first=True,
      frequency_shift=1.0, activation="relu", kernel_in=1, pooled_width=7,
      num_sizes=5, size_features=6)


def test_defaults_are_those_of_diffusers(tmp_path):
  folder = write_config(tmp_path, {"_class_name": "UNet2DConditionModel"})
  two, three = (1, 1), (1, 1, 1)
  assert reader.read_config(folder, 64) == ConditionUNetConfig(
      image_size=64, in_channels=4, out_channels=4,
      channels=(320, 640, 1280, 1280), blocks_per_level=(2, 2, 2, 2),
      down_transformers=(two, two, two, ()),
      up_transformers=((), three, three, three), num_heads=(8, 8, 8, 8),
      context_width=1280)


def test_sizes_of_images(tmp_path):
  config = fixture("no_middle")[2]
  folder = write_config(tmp_path, config)
  assert reader.read_config(folder).image_size == (9, 6)
  assert reader.read_config(folder, 16).image_size == 16
  assert reader.read_config(folder, (16, 24)).image_size == (16, 24)
  assert "image_size" in refusal(reader.read_config, folder, "large")
  folder = write_config(tmp_path, config | dict(sample_size=None))
  assert "image_size must be given" in refusal(reader.read_config, folder)
  assert reader.read_config(folder, 16).image_size == 16
  # The same weights fit all.
  model, _ = reader.read(os.path.join(LATENT, "unet"), (11, 1))
  assert model.output.shape == (None, 11, 1, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    "sd1", "sdxl", pytest.param("sd2", marks=pytest.mark.slow)])
def test_published_networks(tmp_path, name):
  folder = write_config(tmp_path, published()[name]["config"])
  shapes = published()[name]["shapes"]
  config = reader.read_config(folder)
  try:
    # No variable gets a value here, and so no memory.
    with keras.StatelessScope(initialize_variables=False):
      model = condition_unet.build_condition_unet(config)
    variables = [(v.path, tuple(v.shape)) for v in model.variables]
  finally:
    # It lists the variables that still want a value.
    keras.utils.clear_session()
  assert len(dict(variables)) == len(variables) == len(shapes)
  assert sum(np.prod(shape) for _, shape in variables) == PARAMETERS[name]
  weights = {key: np.broadcast_to(np.float32(0), shape)
             for key, shape in shapes.items()}
  assert matched(weights, model).keys() == dict(variables).keys()
  side = dict(sd1=64, sd2=96, sdxl=128)[name]
  assert model.output.shape == (None, side, side, 4)
  assert config.conditions == dict(
      sd1=(("context", (None, 768)),), sd2=(("context", (None, 1024)),),
      sdxl=(("context", (None, 2048)), ("pooled", (1280,)),
            ("time_ids", (6,))))[name]


@pytest.mark.slow
def test_each_tensor_is_found_once(network):
  # Tensor i holds i.
  weights = {key: np.full(value.shape, i, np.float32) for i, (key, value)
             in enumerate(fixture("text_time")[0].items())}
  values = matched(weights, network("text_time")).values()
  assert all(np.min(value) == np.max(value) for value in values)
  assert sorted(value.flat[0] for value in values) == list(range(len(weights)))


def test_projections_of_both_kinds(tmp_path, latent):
  # A dense layer is a convolution of one pixel.
  model, config, _, _ = latent
  folder = shutil.copytree(os.path.join(LATENT, "unet"), tmp_path / "unet")
  weights = safetensors.numpy.load_file(folder / diffusers.WEIGHTS)
  names = [name for name in weights
           if name.endswith(("proj_in.weight", "proj_out.weight"))]
  assert len(names) == 8 and all(weights[name].ndim == 4 for name in names)
  dense = weights | {name: weights[name][:, :, 0, 0] for name in names}
  values = matched(weights, model)
  for path, value in matched(dense, model).items():
    np.testing.assert_array_equal(value, values[path])
  theirs = json.loads((folder / diffusers.CONFIG).read_text())
  write_config(folder, theirs | dict(use_linear_projection=True))
  assert reader.read_config(str(folder)) == config


def test_what_is_a_condition_unet(tmp_path):
  assert reader.is_condition_unet(os.path.join(LATENT, "unet"))
  assert not reader.is_condition_unet(LATENT)
  assert not reader.is_condition_unet(str(tmp_path / "nowhere"))
  assert not reader.is_condition_unet(
      write_config(tmp_path, {"_class_name": "UNet2DModel"}))


@pytest.mark.parametrize("name,changes,words", [
    ("linear", dict(_class_name="UNet2DModel"), ["'UNet2DConditionModel'"]),
    ("linear", dict(brand_new=1), ["unknown key 'brand_new'", "1"]),
    ("linear", dict(act_fn="geglu"), ["act_fn", "'geglu'"]),
    ("linear", dict(act_fn=None), ["act_fn", "None"]),
    ("linear", dict(time_embedding_act_fn="tanh"), ["time_embedding_act_fn"]),
    ("linear", dict(timestep_post_act=["silu"]), ["timestep_post_act"]),
    ("linear", dict(num_attention_heads=8), ["num_attention_heads", "None"]),
    ("linear", dict(attention_head_dim=None), ["attention_head_dim", "None"]),
    ("linear", dict(attention_head_dim=[2, 4]), ["attention_head_dim", "3 ent"]),
    ("linear", dict(attention_head_dim=[2, 4, 0]), ["attention_head_dim"]),
    ("linear", dict(attention_type="gated"), ["attention_type", "'gated'"]),
    ("linear", dict(dual_cross_attention=True), ["dual_cross_attention"]),
    ("linear", dict(class_embed_type="timestep"), ["class_embed_type"]),
    ("linear", dict(num_class_embeds=1000), ["num_class_embeds", "1000"]),
    ("linear", dict(class_embeddings_concat=True), ["class_embeddings_conc"]),
    ("linear", dict(time_cond_proj_dim=256), ["time_cond_proj_dim", "256"]),
    ("linear", dict(time_embedding_type="fourier"), ["'fourier'"]),
    ("linear", dict(encoder_hid_dim=768), ["encoder_hid_dim", "768"]),
    ("linear", dict(encoder_hid_dim_type="image_proj"), ["'image_proj'"]),
    ("linear", dict(addition_embed_type="text"), ["'text_time'", "'text'"]),
    ("linear", dict(addition_embed_type="text_time"),
     ["projection_class_embeddings_input_dim", "None"]),
    ("text_time", dict(addition_time_embed_dim=None),
     ["addition_time_embed_dim", "None"]),
    ("text_time", dict(projection_class_embeddings_input_dim=48),
     ["projection_class_embeddings_input_dim", "48 of 6 sizes", "48"]),
    ("linear", dict(down_block_types=["DownBlock2D"] * 2), ["3 entries"]),
    ("linear", dict(down_block_types=["DownBlock2D"] * 2 + ["AttnDownBlock2D"]),
     ["CrossAttnDownBlock2D", "'AttnDownBlock2D'"]),
    ("linear", dict(up_block_types="UpBlock2D"), ["up_block_types", "a list"]),
    ("linear", dict(up_block_types=[["UpBlock2D"]] * 3), ["up_block_types"]),
    ("linear", dict(mid_block_type="UNetMidBlock2DSimpleCrossAttn"),
     ["mid_block_type", "SimpleCrossAttn"]),
    ("no_middle", dict(down_block_types=["DownBlock2D"] * 3,
                       up_block_types=["UpBlock2D"] * 3), ["attends to a text"]),
    ("linear", dict(block_out_channels=[]), ["down_block_types", "0 entries"]),
    ("linear", dict(block_out_channels=8), ["block_out_channels", "8"]),
    ("linear", dict(layers_per_block=[1, 2]), ["layers_per_block", "3 entries"]),
    ("linear", dict(layers_per_block=0), ["layers_per_block", "0"]),
    ("linear", dict(cross_attention_dim=[6, 7, 6]),
     ["cross_attention_dim", "the same"]),
    ("linear", dict(cross_attention_dim=None), ["cross_attention_dim", "None"]),
    ("linear", dict(only_cross_attention=[True]), ["only_cross_attention"]),
    ("linear", dict(only_cross_attention=1), ["only_cross_attention", "true"]),
    ("linear", dict(transformer_layers_per_block=[1, 1]), ["3 entries"]),
    ("linear", dict(transformer_layers_per_block=-1), ["from 0 to", "-1"]),
    ("linear", dict(transformer_layers_per_block=[[1], [1], [1]]),
     ["reverse_transformer_layers_per_block must be given"]),
    ("linear", dict(transformer_layers_per_block=[[], 1, 1]),
     ["at least 1 entries", "[]"]),
    ("linear", dict(reverse_transformer_layers_per_block=[1, [1], 1]),
     ["reverse_transformer_layers_per_block", "at least 2 entries", "[1]"]),
    ("linear", dict(reverse_transformer_layers_per_block=1),
     ["reverse_transformer_layers_per_block", "a list"]),
    ("linear", dict(downsample_padding=2), ["downsample_padding", "2"]),
    ("linear", dict(resnet_time_scale_shift="spatial"), ["'spatial'"]),
    ("linear", dict(norm_num_groups=None), ["norm_num_groups", "None"]),
    ("linear", dict(norm_eps=0), ["norm_eps", "positive", "0"]),
    ("linear", dict(freq_shift=-1), ["freq_shift", "-1"]),
    ("linear", dict(flip_sin_to_cos=None), ["flip_sin_to_cos", "None"]),
    ("linear", dict(center_input_sample="no"), ["center_input_sample"]),
    ("linear", dict(sample_size=[8]), ["sample_size", "[8]"]),
    ("linear", dict(sample_size=8.0), ["sample_size", "8.0"]),
    ("linear", dict(time_embedding_dim="wide"), ["time_embedding_dim"]),
])
def test_configurations_that_are_refused(tmp_path, name, changes, words):
  folder = write_config(tmp_path, fixture(name)[2] | changes)
  message = refusal(reader.read, folder)
  for word in [diffusers.CONFIG, *words]:
    assert word in message, message


def test_every_key_of_diffusers_is_known(tmp_path):
  # `to_json_string` of diffusers wrote all of them.
  config = fixture("linear")[2]
  assert len([key for key in config if not key.startswith("_")]) > 40
  for key in config:
    if not key.startswith("_"):
      folder = write_config(tmp_path, config | {key: {"no": "value"}})
      if key in ("dropout", "addition_embed_type_num_heads",
                 "cross_attention_norm", "mid_block_only_cross_attention",
                 "resnet_out_scale_factor", "resnet_skip_time_act",
                 "upcast_attention", "use_linear_projection",
                 # Without that type of embedding, these have no meaning.
                 "addition_time_embed_dim",
                 "projection_class_embeddings_input_dim"):
        assert reader.read_config(folder) == reader.read_config(
            write_config(tmp_path, config))
      else:
        assert key in refusal(reader.read_config, folder)


@pytest.mark.parametrize("changes,words", [
    (dict(cross_attention_dim=7), ["attn2.to_k.weight", "(7, 8)"]),
    (dict(attention_head_dim=3), ["num_heads must divide the 8", "3"]),
    (dict(norm_num_groups=3), ["norm_groups must divide the 8", "3"]),
    (dict(conv_in_kernel=2), ["kernel_in", "odd", "2"]),
    (dict(freq_shift=4), ["channels[0]", "frequency_shift", "8"]),
    (dict(sample_size=10**4), ["image_size", "10000"]),
    (dict(mid_block_type=None), ["Missing: none", "Unused: mid_block."]),
])
def test_weights_of_another_architecture(tmp_path, changes, words):
  message = refusal(reader.read, write(tmp_path, "linear", changes))
  for word in words:
    assert word in message, message


@pytest.mark.parametrize("name", [
    "add_embedding.linear_1.weight", "conv_norm_out.bias",
    "down_blocks.1.attentions.0.norm.weight",
    "mid_block.attentions.0.transformer_blocks.2.attn1.to_out.0.bias",
    "up_blocks.0.attentions.1.transformer_blocks.0.ff.net.2.weight"])
def test_tensors_missing_or_left_over(network, name):
  weights = dict(fixture("text_time")[0])
  model, value = network("text_time"), weights.pop(name)
  assert f"Missing: {name}. Unused: none" in refusal(matched, weights, model)
  other = f"{name}s"
  assert f"Missing: none. Unused: {other}" in refusal(
      matched, weights | {name: value, other: value}, model)


def test_damage_is_refused(tmp_path):
  weights = dict(fixture("linear")[0])
  name = "mid_block.attentions.0.proj_in.bias"
  weights[name] = np.full(16, np.nan, np.float32)
  folder = write(tmp_path, "linear", weights=weights)
  assert f"{name} holds NaN" in refusal(reader.read, folder)
  path = os.path.join(folder, diffusers.WEIGHTS)
  with open(path, "r+b") as f:
    f.truncate(1000)
  assert "complete safetensors" in refusal(reader.read, folder)
  os.remove(path)
  assert diffusers.WEIGHTS in refusal(reader.read, folder)
  assert diffusers.CONFIG in refusal(reader.read, str(tmp_path / "nowhere"))


def test_hashes_see_the_whole_architecture(tmp_path):
  # `converted` writes the fields as JSON.
  config = reader.read_config(write_config(tmp_path, fixture("odd")[2]))
  assert json.dumps(dataclasses.asdict(config), sort_keys=True)
