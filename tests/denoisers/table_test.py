"""Tests of tables of conditions, on conditions that are means of Gaussians.

The network of a table is told the mean as an array. So each row must give what
the class-conditional network gives for the class of that mean.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

import ddss_tf
from ddss_tf.denoisers import conditions
from ddss_tf.denoisers import denoiser as denoiser_lib
from ddss_tf.denoisers import table as table_lib
from ddss_tf.formats import own
from ddss_tf.reporting import inspection
from ddss_tf.runs import run_dir as run_dir_lib
from ddss_tf.samplers import card
from ddss_tf.samplers import families
from ddss_tf.samplers import generator as generator_lib
from ddss_tf.errors import UserError
import conditional_parts
from conditional_parts import MEANS, NULL, SHAPE, STD, STEPS, images

PROMPTS = ["a cat", "", "a dog", "a fish"]


@keras.saving.register_keras_serializable(package="tests")
class MeanEps(keras.layers.Layer):
  """eps of the exact denoiser of a mean, context [B, 1] + shift [B, 1, 1]."""

  def call(self, x_t, t, context, shift):
    alpha_t, sigma_t = ddss_tf.make_schedule("linear", 1000).alpha_sigma(t)
    alpha_t, sigma_t = (
        value[:, None, None, None] for value in (alpha_t, sigma_t))
    mean = context[:, :, None, None] + shift[..., None]
    return sigma_t * (x_t - alpha_t * mean) / (
        (alpha_t * STD) ** 2 + sigma_t**2)


def model():
  inputs = [keras.Input(SHAPE), keras.Input(()), keras.Input((1,), name="context"),
            keras.Input((1, 1), name="shift")]
  return keras.Model(inputs, MeanEps()(*inputs))


def table(**options):
  # On purpose not in the network's order.
  return ddss_tf.ConditionTable(
      {"shift": np.full([4, 1, 1], 0.25, np.float16), "context": MEANS[:, None] - 0.25},
      **{"prompts": PROMPTS, **options})


def make(given=None, **options):
  return denoiser_lib.Denoiser(
      model(), ddss_tf.make_schedule("linear", 1000), name="prompts",
      conditions=("context", "shift"), table=given or table(), **options)


@pytest.mark.slow
def test_rows_are_classes():
  np.testing.assert_allclose(
      images(make()), images(conditional_parts.make()), atol=1e-5)
  np.testing.assert_allclose(
      images(make(table(null_row=NULL), guidance_scale=2.5)),
      images(conditional_parts.make(null_label=NULL, guidance_scale=2.5)),
      atol=2e-5)


@pytest.mark.slow
def test_each_row_has_its_own_negative_prompt():
  denoiser = make(table(null_row=[3, 3, 1, 3]), guidance_scale=3.0)
  x = tf.random.stateless_normal([2, *SHAPE], [0, 1])
  t, rows = tf.constant([300.0, 700.0]), tf.constant([0, 2])
  plain = make()
  given = plain.eps(x, t, rows)
  null = plain.eps(x, t, tf.constant([3, 1]))
  np.testing.assert_allclose(
      denoiser.eps(x, t, rows), null + 3.0 * (given - null), atol=1e-5)
  drawn = denoiser.draw_labels(generator_lib.seed_pair(0), tf.range(300)).numpy()
  assert set(drawn) == {0, 2}  # 1 and 3 stand for none.


def test_rows_are_drawn_at_their_frequencies():
  denoiser = make(table(weights=[5, 0, 3, 0], null_row=3))
  pair = generator_lib.seed_pair(3)
  rows = tf.function(denoiser.draw_labels)(pair, tf.range(4000)).numpy()
  counts = np.bincount(rows, minlength=4)
  assert counts[1] == counts[3] == 0
  # Within five standard errors of 5 : 3.
  assert abs(counts[0] - 2500) < 5 * np.sqrt(4000 * 0.625 * 0.375)
  np.testing.assert_array_equal(
      denoiser.draw_labels(pair, tf.constant([77, 3])), rows[[77, 3]])


def test_classes_are_drawn_as_often_as_told(tmp_path):
  denoiser = conditional_parts.make(null_label=NULL, label_weights=[1, 7, 0, 3])
  # Without a graph each draw would take 20 milliseconds.
  rows = tf.function(denoiser.draw_labels)(
      generator_lib.seed_pair(3), tf.range(2000)).numpy()
  counts = np.bincount(rows, minlength=4)
  assert counts[NULL] == counts[2] == 0
  assert abs(counts[3] - 1500) < 5 * np.sqrt(2000 * 0.75 * 0.25)
  plain = conditional_parts.make(null_label=NULL)
  # A sampler that was found with other weights is a sampler of this network.
  assert denoiser.identity == plain.identity
  assert denoiser.key != plain.key and denoiser.setting != plain.setting
  assert denoiser.with_label_weights(None).key == plain.key
  # Neither copies nor files round the weights anew.
  for scale in (1.0, 2.5):
    assert denoiser.guided(scale).guided(1.0).key == denoiser.guided(1.0).key
  denoiser.save(str(tmp_path))
  assert ddss_tf.Denoiser.load(str(tmp_path)).key == denoiser.key


@pytest.mark.parametrize("weights", [
    [1, 2, 3], [1, -1, 1, 1], [0, 1, 0, 0], [1, np.nan, 1, 1], "many"])
def test_weights_that_mean_nothing(weights):
  with pytest.raises(ValueError, match="weights must be 4 numbers"):
    conditional_parts.make(null_label=NULL, label_weights=weights)


def test_a_draw_leaves_no_gap():
  ends = conditions._cumulative(  # pylint: disable=protected-access
      conditions.frequencies([0.1] * 10 + [0.0], 11))
  assert ends.dtype == np.float32 and ends[9] == ends[10] == 1


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("remat", [False, True])
def test_gradients_through_the_table(jit_compile, remat):
  denoiser = make(table(null_row=NULL))
  output = denoiser.compiled_output(jit_compile, remat)
  x = tf.random.stateless_normal([3, *SHAPE], [0, 1])
  t, rows = tf.constant([5.0, 300.0, 900.0]), tf.constant([0, 2, 3])
  guidance = tf.constant([1.0, 2.0, 0.5])

  def of(function):
    with tf.GradientTape() as tape:
      tape.watch([x, t, guidance])
      loss = tf.reduce_sum(function(x, t, rows, guidance) ** 2)
    return tape.gradient(loss, [x, t, guidance])

  for found, expected in zip(of(output), of(denoiser.output)):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
  assert np.all(np.abs(of(output)[2]) > 1e-3)


def test_our_own_format_keeps_the_table(tmp_path):
  denoiser = make(table(weights=[1, 2, 3, 4], null_row=[1, 1, 3, 1]),
                  guidance_scale=2.0)
  denoiser.save(str(tmp_path / "saved"))
  again = ddss_tf.load_denoiser(str(tmp_path / "saved"))
  assert again.key == denoiser.key and again.identity == denoiser.identity
  assert again.table.prompts == tuple(PROMPTS)
  np.testing.assert_array_equal(images(again), images(denoiser))
  # Another table, from a file: the sampler fits, the images are others.
  table(null_row=NULL).save(str(tmp_path / "other.npz"))
  other = ddss_tf.load_denoiser(
      str(tmp_path / "saved"), conditions=str(tmp_path / "other.npz"))
  assert other.identity == denoiser.identity
  assert other.setting != denoiser.setting and other.key != denoiser.key
  # A table that was changed is not taken for the one that was saved.
  table().save(str(tmp_path / "saved" / own.TABLE))
  with pytest.raises(UserError, match="conditions.npz .* must have the SHA-256"):
    ddss_tf.load_denoiser(str(tmp_path / "saved"))


def test_a_keras_file_with_a_table(tmp_path):
  model().save(str(tmp_path / "network.keras"))
  table().save(str(tmp_path / "table.npz"))
  with pytest.raises(UserError):
    ddss_tf.load_denoiser(str(tmp_path / "network.keras"), prediction="eps",
                          schedule={"name": "linear", "num_train_steps": 1000})
  ordered = ddss_tf.ConditionTable(
      {"context": MEANS[:, None] - 0.25, "shift": np.full([4, 1, 1], 0.25)})
  ordered.save(str(tmp_path / "table.npz"))
  denoiser = ddss_tf.load_denoiser(
      str(tmp_path / "network.keras"), prediction="eps",
      schedule={"name": "linear", "num_train_steps": 1000},
      conditions=str(tmp_path / "table.npz"))
  np.testing.assert_allclose(images(denoiser), images(make()), atol=1e-6)


def test_a_network_without_its_table(tmp_path):
  bare = denoiser_lib.Denoiser(
      model(), ddss_tf.make_schedule("linear", 1000),
      conditions=["context", "shift"])
  bare.save(str(tmp_path / "saved"))
  again = ddss_tf.load_denoiser(str(tmp_path / "saved"))
  assert "a table of context, shift is needed" in inspection.inspect(denoiser=again)
  with pytest.raises(UserError, match="load_denoiser.conditions"):
    again.eps(tf.zeros([1, *SHAPE]), 5.0, 0)
  np.testing.assert_array_equal(
      images(again.with_table(table())), images(make()))
  assert "4 rows of" in inspection.inspect(denoiser=make())


@pytest.mark.slow
def test_exported_prompts(tmp_path):
  run = run_dir_lib.RunDir(str(tmp_path))
  denoiser = make(table(null_row=NULL), guidance_scale=2.0)
  sampler = families.make_sampler(denoiser.schedule, "ddim", STEPS)
  card.write(run.path(run_dir_lib.SAMPLER), card.SamplerCard(
      sampler.label, sampler.coefficients(), denoiser.identity, {}))
  exported = tf.saved_model.load(ddss_tf.export(str(tmp_path), denoiser))
  seed, rows = tf.constant([4, 0]), tf.constant([3, 0, 2])
  of_rows = exported.signatures["of_classes"](seed=seed, labels=rows)["images"]
  given = table().rows(rows)
  of_conditions = exported.signatures["of_conditions"](seed=seed, **given)["images"]
  np.testing.assert_array_equal(of_rows, of_conditions)
  assert np.unique(of_rows.numpy().reshape(3, -1).mean(1)).size == 3


def test_samples_of_prompts(tmp_path):
  run = run_dir_lib.RunDir(str(tmp_path))
  denoiser = make()
  sampler = families.make_sampler(denoiser.schedule, "ddim", STEPS)
  card.write(run.path(run_dir_lib.SAMPLER), card.SamplerCard(
      sampler.label, sampler.coefficients(), denoiser.identity, {}))

  def sampled(**options):
    path = ddss_tf.sample(str(tmp_path), denoiser, 5, batch_size=2, **options)
    return np.load(path)["images"]

  both = sampled(prompt=["a fish", "a cat"])
  np.testing.assert_array_equal(both[::2], sampled(label=3)[::2])
  np.testing.assert_array_equal(both[1::2], sampled(prompt="a cat")[1::2])
  for options, message in (
      (dict(prompt="a bird"), "one of the table's: 'a cat'.*tools/encode_prompts.py"),
      (dict(prompt=[]), "a list of texts"),
      (dict(prompt="a cat", label=0), "must not be given with sample.prompt")):
    with pytest.raises(UserError, match=message):
      sampled(**options)
  with pytest.raises(UserError, match="needs a denoiser with a table"):
    ddss_tf.sample(str(tmp_path), conditional_parts.make(), prompt="a cat")


@pytest.mark.parametrize("options, message", [
    (dict(arrays={"context": np.ones([3])}), r"\[N, ...\]"),
    (dict(arrays={"context": np.full([3, 1], np.inf)}), "finite"),
    (dict(arrays={"context": np.array([["a"]])}), "finite numbers"),
    (dict(arrays={}), "Received: {}"),
    (dict(arrays={"a": np.ones([3, 1]), "b": np.ones([2, 1])}), "number of rows"),
    (dict(prompts=["a"]), "4 texts"), (dict(null_row=4), "from 0 to 3"),
    (dict(null_row=[0, 1]), "each of 4 rows"), (dict(null_row=0.5), "must be a row"),
    (dict(weights=[0, 0, 0, 0]), "weights must be 4"),
])
def test_tables_that_mean_nothing(options, message):
  arrays = options.pop("arrays", {"context": np.ones([4, 1])})
  with pytest.raises(ValueError, match=message):
    table_lib.ConditionTable(arrays, **options)


def test_files_that_are_no_tables(tmp_path):
  path = tmp_path / "table.npz"
  with pytest.raises(UserError, match="must be a file .npz"):
    table_lib.ConditionTable.load(str(path))
  path.write_bytes(b"PK\x03\x04 cut")
  with pytest.raises(UserError, match="not damaged"):
    table_lib.ConditionTable.load(str(path))
  # One array under that name, and an archive whose compressed bytes are others.
  with open(path, "wb") as file:
    np.save(file, np.ones([2, 1]))
  with pytest.raises(UserError, match="not damaged"):
    table_lib.ConditionTable.load(str(path))
  np.savez_compressed(path, context=np.arange(4000.0).reshape(4, -1))
  content = bytearray(path.read_bytes())
  content[100:400] = bytes(300)
  path.write_bytes(content)
  with pytest.raises(UserError, match="not damaged"):
    table_lib.ConditionTable.load(str(path))
  np.savez(path, context=np.array([{}], object))
  with pytest.raises(UserError, match="not damaged"):
    table_lib.ConditionTable.load(str(path))
  np.savez(path, context=np.ones([2, 1]), prompts=np.array(["a"]))
  with pytest.raises(UserError, match="2 texts"):
    table_lib.ConditionTable.load(str(path))


@pytest.mark.parametrize("options, message", [
    (dict(num_classes=4), "num_classes must not be given"),
    (dict(null_label=1), "null_label must not be given"),
    (dict(guidance_scale=2.0), "needs a table with a null_row"),
    (dict(given=ddss_tf.ConditionTable({"context": np.ones([2, 1])})),
     "must hold context, shift"),
])
def test_denoisers_of_conditions_that_mean_nothing(options, message):
  with pytest.raises(ValueError, match=message):
    make(**options)
