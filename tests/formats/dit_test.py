"""Tests of DiT; golden outputs are of diffusers, other truths of NumPy."""

import math
import os

from checkpoint_files import DATA, refusal
import keras
from network_folders import NetworkFolder, error
import numpy as np
import pytest
import tensorflow as tf

from ddss_tf.formats import diffusers
from ddss_tf.formats import dit as reader
from ddss_tf.networks import dit
from ddss_tf.networks import files
from ddss_tf.networks import precision

LATENT = os.path.join(DATA, "latent_dit")
FOLDER = os.path.join(LATENT, "transformer")
EMBEDDER = ("timestep_embedder.linear_1.weight",
            "timestep_embedder.linear_1.bias",
            "timestep_embedder.linear_2.weight",
            "timestep_embedder.linear_2.bias",
            "class_embedder.embedding_table.weight")
# Keys of the class that diffusers' first DiT files name, as it wrote them.
OLD_KEYS = dict(
    _class_name="Transformer2DModel", attention_type="default",
    caption_channels=None, cross_attention_dim=None,
    double_self_attention=False, interpolation_scale=None,
    num_vector_embeds=None, only_cross_attention=False,
    use_additional_conditions=None, use_linear_projection=False)


@pytest.fixture(scope="module")
def golden():
  with np.load(os.path.join(LATENT, "golden.npz")) as file:
    return dict(file)


@pytest.fixture(scope="module")
def inputs(golden):
  return [golden["net_x"], golden["net_t"],
          golden["net_class_labels"].astype(np.int32)]


@pytest.fixture(scope="module")
def network():
  """The fixture's network with its variance: do not change it."""
  return reader.read(FOLDER, learned_variance=True)[0]


_FIXTURE = NetworkFolder(FOLDER)
config_json, tensors, write = (
    _FIXTURE.config, _FIXTURE.tensors, _FIXTURE.write)


def embedder(i):
  return [f"transformer_blocks.{i}.norm1.emb.{name}" for name in EMBEDDER]


def equal_copies():
  """The fixture's tensors, with block 0's embedder in block 1 as well."""
  weights = tensors()
  for first, other in zip(embedder(0), embedder(1), strict=True):
    weights[other] = weights[first]
  return weights


def by_numpy(weights, config, x, t, labels, first=1e-6, last=1e-6):
  """The network in float64 by the names of the file, block by block.

  `first` and `last` are the epsilons of the normalisations before attention
  and of the network's last.
  """
  weights = {name: v.astype(np.float64) for name, v in weights.items()}
  x, t = x.astype(np.float64), t.astype(np.float64)
  silu = lambda v: v / (1 + np.exp(-v))
  batch, height, width, channels = x.shape
  p, heads = config["patch_size"], config["num_attention_heads"]
  rows, columns = height // p, width // p

  def dense(v, name):
    return v @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

  def norm(v, epsilon):
    return (v - v.mean(-1, keepdims=True)) / np.sqrt(
        v.var(-1, keepdims=True) + epsilon)

  def embedding(i):
    place = f"transformer_blocks.{i}.norm1.emb"
    angles = t[:, None] * 10000.0 ** (-np.arange(128) / 127)
    time = np.concatenate([np.cos(angles), np.sin(angles)], 1)
    time = silu(dense(time, f"{place}.timestep_embedder.linear_1"))
    time = dense(time, f"{place}.timestep_embedder.linear_2")
    table = weights[f"{place}.class_embedder.embedding_table.weight"]
    return silu(time + table[labels])[:, None, :]

  def attention(v, place):
    q, k, v = (dense(v, f"{place}.to_{n}").reshape(batch, rows * columns, heads,
                                                   -1) for n in "qkv")
    scores = np.einsum("bqhc,bkhc->bhqk", q, k) / math.sqrt(q.shape[-1])
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    v = np.einsum("bhqk,bkhc->bqhc", scores, v)
    return dense(v.reshape(batch, rows * columns, -1), f"{place}.to_out.0")

  kernel = weights["pos_embed.proj.weight"]
  h = np.einsum("bipjqc,dcpq->bijd",
                x.reshape(batch, rows, p, columns, p, channels), kernel)
  h = h + weights["pos_embed.proj.bias"]
  quarter = h.shape[-1] // 4
  for i in range(rows):
    for j in range(columns):
      for k in range(quarter):
        f = 10000.0 ** (-k / quarter)
        h[:, i, j, [k, quarter + k, 2 * quarter + k, 3 * quarter + k]] += [
            math.sin(j * f), math.cos(j * f), math.sin(i * f), math.cos(i * f)]
  h = h.reshape(batch, rows * columns, -1)
  for i in range(config["num_layers"]):
    place = f"transformer_blocks.{i}"
    shift, scale, gate, shift2, scale2, gate2 = np.split(
        dense(embedding(i), f"{place}.norm1.linear"), 6, -1)
    h = h + gate * attention(norm(h, first) * (1 + scale) + shift,
                             f"{place}.attn1")
    v = dense(norm(h, config["norm_eps"]) * (1 + scale2) + shift2,
              f"{place}.ff.net.0.proj")
    v = v / 2 * (1 + np.tanh(
        math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
    h = h + gate2 * dense(v, f"{place}.ff.net.2")
  shift, scale = np.split(dense(embedding(0), "proj_out_1"), 2, -1)
  h = dense(norm(h, last) * (1 + scale) + shift, "proj_out_2")
  h = h.reshape(batch, rows, columns, p, p, -1).transpose(0, 1, 3, 2, 4, 5)
  return h.reshape(batch, height, width, -1)


def run(model, inputs):
  return model(inputs, training=False).numpy()


def test_matches_diffusers(network, golden, inputs):
  assert np.any(golden["net_t"] % 1)  # Fractional times are among them.
  assert golden["net_class_labels"].max() == 10  # The null label is, too.
  output = run(network, inputs)
  assert error(output, golden["net_out"]) < 2e-4
  # Each time by itself, lest a large one hides a small one.
  for one, truth in zip(output, golden["net_out"], strict=True):
    assert error(one, truth) < 2e-4
  # The reference of this file is right as well.
  assert error(by_numpy(tensors(), config_json(), *inputs),
               golden["net_out"]) < 2e-4
  assert not any(v.value.trainable for v in network.weights)
  assert not network.trainable


def test_config_is_read():
  expected = dit.DiTConfig(
      image_size=(8, 8), in_channels=4, out_channels=4, patch_size=2,
      num_layers=2, num_heads=2, head_channels=8, num_classes=11,
      norm_epsilon=0.002, shared_embedding=False)
  assert reader.read_config(FOLDER) == expected
  assert reader.read_config(FOLDER, learned_variance=True).out_channels == 8


def test_variance_is_dropped(network, inputs):
  model, config = reader.read(FOLDER)
  assert config.out_channels == 4
  output = run(model, inputs)
  np.testing.assert_allclose(output, run(network, inputs)[..., :4], atol=1e-5)


@pytest.mark.slow
def test_network_without_variance(tmp_path, inputs):
  weights = tensors()
  for leaf in ("weight", "bias"):
    name = f"proj_out_2.{leaf}"
    weights[name] = weights[name][:16]
  for value in (None, 4):
    config = config_json() | {"out_channels": value}
    folder = write(tmp_path / str(value), config, weights)
    model, ours = reader.read(folder)
    assert ours.out_channels == 4
    assert error(run(model, inputs), by_numpy(weights, config, *inputs)) < 2e-4
    message = refusal(reader.read, folder, learned_variance=True)
    assert "learned_variance" in message and "4 out_channels" in message


@pytest.mark.parametrize("changes,differs", [
    (dict(num_attention_heads=4, attention_head_dim=4), 1e-2),
    (dict(norm_eps=1e-5), 3e-4),
])
def test_every_key_counts(tmp_path, network, inputs, changes, differs):
  config = config_json() | changes
  model, _ = reader.read(write(tmp_path, config), learned_variance=True)
  truth = by_numpy(tensors(), config, *inputs)
  assert error(run(model, inputs), truth) < 2e-4
  assert error(run(network, inputs), truth) > differs


@pytest.mark.parametrize("gated", [True, False])
def test_epsilons_without_a_key(tmp_path, inputs, gated):
  # Tokens vary by about 1 and hide an epsilon of 1e-6. So these latents undo
  # the sines of the places: tokens become those of a normal draw, times 1e-3.
  config, weights = config_json(), tensors()
  kernel = weights["pos_embed.proj.weight"].astype(np.float64)
  bias = weights["pos_embed.proj.bias"].astype(np.float64)
  angles = np.arange(4)[:, None] * 10000.0 ** (-np.arange(4) / 4)
  waves = np.concatenate([np.sin(angles), np.cos(angles)], 1)
  places = np.concatenate([np.tile(waves, (4, 1)), np.repeat(waves, 4, 0)], 1)
  tokens = np.random.default_rng(0).normal(size=(4, 16, 16)) * 1e-3
  # A column of the patch's numbers by channel, row and column.
  x = np.linalg.solve(kernel.reshape(16, 16),
                      (tokens - places - bias).reshape(-1, 16).T).T
  x = x.reshape(4, 4, 4, 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
  x = x.reshape(4, 8, 8, 4).astype(np.float32)
  if not gated:  # No block does anything: the last normalisation shows.
    for i in range(2):
      for leaf in ("weight", "bias"):
        name = f"transformer_blocks.{i}.norm1.linear.{leaf}"
        weights[name] = weights[name].copy()
        for gate in (2, 5):
          weights[name][16 * gate:16 * (gate + 1)] = 0
  inputs = [x, *inputs[1:]]
  model, _ = reader.read(write(tmp_path, weights=weights),
                         learned_variance=True)
  output = run(model, inputs)
  assert error(output, by_numpy(weights, config, *inputs)) < 1e-2
  wrong = dict(first=1e-5) if gated else dict(last=1e-5)
  assert error(output, by_numpy(weights, config, *inputs, **wrong)) > 0.1


def test_equal_embedders_become_one(tmp_path, network, inputs):
  weights = equal_copies()
  model, config = reader.read(write(tmp_path, weights=weights),
                              learned_variance=True)
  assert config.shared_embedding
  assert len(network.weights) - len(model.weights) == len(EMBEDDER)
  truth = by_numpy(weights, config_json(), *inputs)
  assert error(run(model, inputs), truth) < 2e-4
  assert error(run(network, inputs), truth) > 0.1


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("name", EMBEDDER)
def test_embedders_that_differ_stay_apart(tmp_path, inputs, name, block):
  same, weights = equal_copies(), equal_copies()
  name = f"transformer_blocks.{block}.norm1.emb.{name}"
  # Row 10 is the null label's, which the inputs have.
  weights[name] = weights[name].copy()
  weights[name][..., -1] += 0.5
  model, config = reader.read(write(tmp_path, weights=weights),
                              learned_variance=True)
  assert not config.shared_embedding
  output = run(model, inputs)
  assert error(output, by_numpy(weights, config_json(), *inputs)) < 2e-4
  assert error(output, by_numpy(same, config_json(), *inputs)) > 1e-2


def test_one_last_digit_keeps_embedders_apart(tmp_path):
  weights = equal_copies()
  name = embedder(1)[0]
  weights[name] = weights[name].copy()
  weights[name][3, 5] = np.nextafter(weights[name][3, 5], np.float32(9))
  model, config = reader.read(write(tmp_path, weights=weights))
  assert not config.shared_embedding
  for path, tensor in (("block_0_time_1/kernel", embedder(0)[0]),
                       ("block_1_time_1/kernel", embedder(1)[0])):
    kernel = next(v for v in model.weights if v.path == path)
    np.testing.assert_array_equal(kernel, weights[tensor].T)


def gradients(model, inputs, weight, **options):
  """Of sum(weight * prediction), in latents and times."""

  @tf.function(**options)
  def compute(x, t, labels):
    with tf.GradientTape() as tape:
      tape.watch([x, t])
      total = tf.reduce_sum(weight * model([x, t, labels], training=False))
    return tape.gradient(total, [x, t])

  return [g.numpy() for g in compute(*map(tf.constant, inputs))]


@pytest.mark.slow
def test_gradients(network, inputs):
  rng = np.random.default_rng(0)
  weight = rng.normal(size=(4, 8, 8, 8)).astype(np.float32)
  x, t, labels = inputs
  in_x, in_t = gradients(network, inputs, weight)

  def total(x, t):
    out = by_numpy(tensors(), config_json(), x, t, labels)
    return np.sum(weight * out, axis=(1, 2, 3))

  d = 1e-4
  t = t.astype(np.float64)
  expected = (total(x, t + d) - total(x, t - d)) / (2 * d)
  assert np.min(np.abs(expected)) > 1e-2
  np.testing.assert_allclose(in_t, expected, rtol=2e-3, atol=2e-3)
  direction = rng.normal(size=x.shape)
  expected = (total(x + d * direction, t) - total(x - d * direction, t)) / (
      2 * d)
  np.testing.assert_allclose(np.sum(in_x * direction, axis=(1, 2, 3)), expected,
                             rtol=2e-3, atol=2e-3)
  for one, other in zip(gradients(network, inputs, weight, jit_compile=True),
                        (in_x, in_t), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_xla_equals_eager(network, inputs):
  compiled = tf.function(lambda *a: network(a, training=False),
                         jit_compile=True)
  # XLA's cosine of large angles differs in the last digits.
  assert error(compiled(*map(tf.constant, inputs)),
               run(network, inputs)) < 1e-4


@pytest.mark.parametrize("shared", [True, False])
def test_keras_file(tmp_path, inputs, shared):
  folder = write(tmp_path, weights=equal_copies() if shared else None)
  model, config = reader.read(folder)
  assert config.shared_embedding == shared
  path = str(tmp_path / "dit.keras")
  model.save(path)
  expected = run(model, inputs)
  assert np.std(expected) > 0.1
  for loaded in (files.load_keras(path), keras.saving.load_model(path)):
    np.testing.assert_array_equal(run(loaded, inputs), expected)
  assert files.graph_text(files.load_keras(path)) == files.graph_text(model)


def test_bfloat16(network, golden, inputs):
  model = precision.with_policy(network, precision.BFLOAT16)
  assert precision.policy(model) == precision.BFLOAT16
  output = model(inputs, training=False)
  assert output.dtype == tf.float32
  assert 1e-4 < error(output, golden["net_out"]) < 0.2
  # Times a quarter apart stay apart: bfloat16 itself has steps of 2 there.
  near = [inputs[0], inputs[1] + np.float32(0.25), inputs[2]]
  moved = run(model, near) - output.numpy()
  exact = run(network, near) - run(network, inputs)
  assert np.corrcoef(moved[2].ravel(), exact[2].ravel())[0, 1] > 0.5


def test_global_policy():
  before = keras.config.dtype_policy()
  keras.config.set_dtype_policy("mixed_bfloat16")
  try:
    model = dit.build_dit(random_config())
  finally:
    keras.config.set_dtype_policy(before)
  assert model.output.dtype == "float32"
  assert model.get_layer("output").projection.compute_dtype == "float32"
  assert model.get_layer("time_embedding").compute_dtype == "float32"
  assert model.get_layer("block_1").compute_dtype == "bfloat16"
  assert model.get_layer("block_1").mlp_1.compute_dtype == "bfloat16"


@pytest.mark.slow
def test_published_depth(tmp_path):
  # The names of XL/2: 28 blocks. Tensor i holds i, so that each is found once.
  shapes = {name: v.shape for name, v in tensors().items()}
  for i in range(2, 28):
    shapes |= {name.replace("blocks.0.", f"blocks.{i}."): shape
               for name, shape in shapes.items() if "blocks.0." in name}
  assert len(shapes) == 538
  weights = {name: np.full(shape, i, np.float32)
             for i, (name, shape) in enumerate(shapes.items())}
  model, config = reader.read(
      write(tmp_path, config_json() | dict(num_layers=28), weights),
      learned_variance=True)
  assert config.num_layers == 28
  for v in model.get_weights():
    assert np.min(v) == np.max(v)
  assert sorted(v.flat[0] for v in model.get_weights()) == list(range(538))


@pytest.mark.parametrize("changes", [{}, dict(norm_eps=1e-5)])
def test_files_of_the_old_class(tmp_path, changes):
  config = config_json() | OLD_KEYS | changes
  folder = write(tmp_path, config)
  assert reader.is_dit(folder)
  assert reader.read_config(folder) == reader.read_config(
      write(tmp_path / "new", config_json() | changes))
  config["norm_type"] = "ada_norm_single"
  folder = write(tmp_path, config)
  assert not reader.is_dit(folder)
  message = refusal(reader.read_config, folder)
  assert "'ada_norm_zero'" in message and "'ada_norm_single'" in message
  del config["norm_type"]
  assert "norm_type" in refusal(reader.read_config, write(tmp_path, config))


def test_defaults_are_those_of_diffusers(tmp_path):
  folder = write(tmp_path, {"_class_name": "DiTTransformer2DModel"})
  assert reader.read_config(folder) == dit.DiTConfig(
      image_size=(32, 32), in_channels=4, out_channels=4, patch_size=2,
      num_layers=28, num_heads=16, head_channels=72, num_classes=1001,
      norm_epsilon=1e-5, shared_embedding=False)


def test_what_is_a_dit(tmp_path):
  assert reader.is_dit(FOLDER)
  assert not reader.is_dit(LATENT)
  assert not reader.is_dit(str(tmp_path / "nowhere"))
  assert not reader.is_dit(write(tmp_path, {"_class_name": "UNet2DModel"}))


@pytest.mark.parametrize("changes,words", [
    (dict(_class_name="PixArtTransformer2DModel"), ["'PixArtTransformer2DM"]),
    (dict(activation_fn="gelu"), ["'gelu-approximate'", "'gelu'"]),
    (dict(activation_fn=["geglu"]), ["activation_fn", "['geglu']"]),
    (dict(attention_bias=False), ["attention_bias", "True", "False"]),
    (dict(norm_type="layer_norm"), ["'ada_norm_zero'", "'layer_norm'"]),
    (dict(norm_elementwise_affine=True), ["norm_elementwise_affine", "True"]),
    (dict(norm_eps=0), ["norm_eps", "positive", "0"]),
    (dict(norm_eps="1e-5"), ["norm_eps", "'1e-5'"]),
    (dict(num_embeds_ada_norm=None), ["num_embeds_ada_norm", "None"]),
    (dict(num_layers=0), ["num_layers", "0"]),
    (dict(num_layers=True), ["num_layers", "True"]),
    (dict(sample_size=[8, 8]), ["sample_size", "[8, 8]"]),
    (dict(sample_size=None), ["sample_size", "None"]),
    (dict(patch_size="2"), ["patch_size", "'2'"]),
    (dict(out_channels=6), ["out_channels", "twice", "6"]),
    (dict(out_channels=8.0), ["out_channels", "8.0"]),
    (dict(brand_new=1), ["unknown key 'brand_new'", "1"]),
    # A key of the old class only.
    (dict(cross_attention_dim=None), ["cross_attention_dim"]),
    (OLD_KEYS | dict(cross_attention_dim=8), ["cross_attention_dim", "8"]),
    (OLD_KEYS | dict(num_vector_embeds=5), ["num_vector_embeds", "5"]),
    (OLD_KEYS | dict(attention_type="gated"), ["attention_type", "'gated'"]),
])
def test_configurations_that_are_refused(tmp_path, changes, words):
  folder = write(tmp_path, config_json() | changes)
  message = refusal(reader.read, folder)
  for word in [diffusers.CONFIG, *words]:
    assert word in message, message


def test_keys_that_change_nothing(tmp_path):
  changes = dict(dropout=0.1, norm_num_groups=7, upcast_attention=True,
                 _name_or_path="somewhere")
  folder = write(tmp_path, config_json() | changes)
  assert reader.read_config(folder) == reader.read_config(FOLDER)


@pytest.mark.parametrize("changes,words", [
    (dict(num_layers=1), ["Missing: none", "Unused: transformer_blocks.1."]),
    (dict(num_layers=3), ["Missing: transformer_blocks.2.", "Unused: none"]),
    (dict(num_embeds_ada_norm=11), ["embedding_table.weight", "(12, 16)"]),
    (dict(num_attention_heads=4), ["must have the shape", "32"]),
    (dict(patch_size=4), ["proj_out_2", "128 outputs"]),
    (dict(in_channels=8), ["pos_embed.proj.weight", "(2, 2, 8, 16)"]),
    (dict(sample_size=9), ["multiples of 2", "(9, 9)"]),
    (dict(attention_head_dim=5), ["multiple of 4", "2 times 5"]),
    (dict(attention_head_dim=8192), ["width", "16384"]),
])
def test_weights_of_another_architecture(tmp_path, changes, words):
  message = refusal(reader.read, write(tmp_path, config_json() | changes))
  for word in words:
    assert word in message, message


@pytest.mark.parametrize("name", [
    "proj_out_2.weight", "proj_out_1.bias", "pos_embed.proj.bias",
    "transformer_blocks.0.attn1.to_q.bias",
    "transformer_blocks.1.attn1.to_out.0.weight",
    "transformer_blocks.1.ff.net.2.bias", embedder(0)[4], embedder(1)[0]])
@pytest.mark.parametrize("weights", [tensors, equal_copies])
def test_missing_tensors_are_refused(tmp_path, name, weights):
  weights = weights()
  del weights[name]
  message = refusal(reader.read, write(tmp_path, weights=weights))
  assert f"Missing: {name}. Unused: none" in message


@pytest.mark.parametrize("name", [
    "pos_embed.pos_embed", "transformer_blocks.1.norm3.weight", embedder(2)[1],
    "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.bias"])
@pytest.mark.parametrize("weights", [tensors, equal_copies])
def test_tensors_left_over_are_refused(tmp_path, name, weights):
  weights = weights() | {name: np.zeros(16, np.float32)}
  message = refusal(reader.read, write(tmp_path, weights=weights))
  assert f"Missing: none. Unused: {name}" in message


def test_damage_is_refused(tmp_path):
  weights = tensors()
  name = "transformer_blocks.1.norm1.linear.bias"
  weights[name] = np.full(96, np.nan, np.float32)
  assert f"{name} holds NaN" in refusal(
      reader.read, write(tmp_path, weights=weights))
  folder = write(tmp_path)
  os.truncate(os.path.join(folder, diffusers.WEIGHTS), 1000)
  assert "not a complete safetensors file" in refusal(reader.read, folder)
  os.remove(os.path.join(folder, diffusers.WEIGHTS))
  assert diffusers.WEIGHTS in refusal(reader.read, folder)
  os.remove(os.path.join(folder, diffusers.CONFIG))
  assert "must hold config.json" in refusal(reader.read, folder)
  assert "no folder" in refusal(reader.read, folder + "/nowhere")


def random_config(**changes):
  return dit.DiTConfig(**dict(
      image_size=(8, 8), in_channels=3, out_channels=5, patch_size=4,
      num_layers=2, num_heads=2, head_channels=4, num_classes=3,
      time_features=8) | changes)


def randomise(model):
  rng = np.random.default_rng(0)
  for variable in model.weights:
    variable.assign(rng.normal(size=variable.shape) * 0.3)


def test_larger_patches(tmp_path):
  config = config_json() | dict(patch_size=4, sample_size=16)
  weights = tensors()
  rng = np.random.default_rng(0)
  for name, shape in (("pos_embed.proj.weight", (16, 4, 4, 4)),
                      ("proj_out_2.weight", (128, 16)),
                      ("proj_out_2.bias", (128,))):
    weights[name] = rng.normal(size=shape).astype(np.float32) * 0.3
  inputs = [rng.normal(size=(2, 16, 16, 4)).astype(np.float32),
            np.float32([3.25, 700.5]), np.int32([2, 10])]
  truth = by_numpy(weights, config, *inputs)
  folder = write(tmp_path, config, weights)
  model, ours = reader.read(folder, learned_variance=True)
  assert (ours.patch_size, ours.image_size) == (4, (16, 16))
  assert error(run(model, inputs), truth) < 2e-4
  model, _ = reader.read(folder)
  assert error(run(model, inputs), truth[..., :4]) < 2e-4


def test_latents_that_are_not_square():
  square, wide, tall = (
      dit.build_dit(random_config(image_size=size))
      for size in ((16, 16), (8, 16), (16, 8)))
  randomise(square)
  for variable in square.weights:
    if "output_projection" in variable.path:
      variable.assign(np.zeros(variable.shape))  # No token sees another.
  for model in (wide, tall):
    model.set_weights(square.get_weights())
  x = np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype(np.float32)
  rest = [np.float32([0.5, 30.25]), np.int32([0, 2])]
  whole = run(square, [x, *rest])
  assert whole.shape == (2, 16, 16, 5)
  assert error(run(wide, [x[:, :8], *rest]), whole[:, :8]) < 1e-4
  assert error(run(tall, [x[:, :, :8], *rest]), whole[:, :, :8]) < 1e-4
  # Tokens do know their places.
  same = run(square, [np.ones_like(x), *rest])
  patches = same[0].reshape(4, 4, 4, 4, 5).transpose(0, 2, 1, 3, 4)
  patches = patches.reshape(16, -1)
  distances = np.linalg.norm(patches[:, None] - patches[None], axis=-1)
  assert np.min(distances[~np.eye(16, dtype=bool)]) > 1e-3


@pytest.mark.parametrize("changes,words", [
    (dict(image_size=(8, 10)), "multiples of 4"),
    (dict(image_size=(8,)), "height and width"),
    (dict(image_size=(0, 8)), "image_size must be from 1"),
    (dict(head_channels=3), "multiple of 4.*2 times 3"),
    (dict(time_features=7), "even.*7"),
    (dict(time_features=2), "at least 4.*2"),
    (dict(num_layers=0), "num_layers"),
    (dict(num_heads=0), "num_heads"),
    (dict(num_classes=0), "num_classes"),
    (dict(head_channels=2**13), "width"),
])
def test_networks_that_cannot_be(changes, words):
  with pytest.raises(ValueError, match=words):
    dit.build_dit(random_config(**changes))
