"""Trains a latent flow model of the digits, for gin_configs/latent_digits.gin.

First an autoencoder from images of 28x28 to latents of 7x7x4, then a diffusion
transformer that is told the class, on these latents, by flow matching. Both see
the first 9 000 digits; the others judge them. A run that was stopped goes on
where it was, to the same weights.

Example:
  python tools/train_latent_digits.py --state=runs/latent_digits --minutes=30
"""

import dataclasses
import json
import os
import time

from absl import app
from absl import flags
import keras
from keras import layers
import numpy as np
import tensorflow as tf

import ddss_tf
from ddss_tf.networks import autoencoder
from ddss_tf.networks import dit
from ddss_tf.networks.layers import ResidualBlock

NAME = "digits28-latent"
_ASSETS = os.path.join(os.path.dirname(__file__), "..", "ddss_tf", "formats",
                       "assets", NAME)
_NUM_TRAIN = 9000
_NUM_CLASSES = 10  # The null label comes after them.
_TIME_SCALE = 1000.0
# The deviation of a pixel in the autoencoder's likelihood, in [-1, 1].
_PIXEL_STD = 0.1
_LABEL_DROPOUT = 0.1
_AVERAGE_DECAY = 0.999
# An image at once would keep a CPU busy with calls.
_DECODED_AT_ONCE = 32
_SAVE_EVERY = 120.0  # Seconds.

DECODER = autoencoder.DecoderConfig(
    latent_size=7, latent_channels=4, out_channels=1, channels=(16, 32, 32),
    layers_per_block=1, norm_groups=8, mid_attention=False,
    post_quant_conv=False)
TRANSFORMER = dit.DiTConfig(
    image_size=(7, 7), in_channels=4, out_channels=4, patch_size=1,
    num_layers=4, num_heads=4, head_channels=24, num_classes=_NUM_CLASSES + 1)

_STATE = flags.DEFINE_string(
    "state", None, "Folder of the training's state, to go on from. Needed.")
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", _ASSETS, "Folder of the denoiser.")
_STEPS = flags.DEFINE_integer(
    "steps", None, "Steps of the transformer, instead of the recipe's. A "
    "training that is ready goes on to more of them.", 1)
_MINUTES = flags.DEFINE_float(
    "minutes", None, "Stop after so many minutes, if not ready before.", 0.0)
_THREADS = flags.DEFINE_integer("threads", 1, "CPU threads of TensorFlow.", 1)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Where TFDS keeps prepared data sets.")


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How a network is trained: by Adam, with a warm-up.

  Attributes:
    num_steps: steps of training.
    batch_size: images of a step.
    learning_rate: the largest.
    seed: of the first weights, the batches and all that is drawn.
    warmup_steps: steps on which the rate grows linearly.
    last_rate: what is left of the rate at the end of a cosine decay. With 1 it
      stays, and a longer training goes on from a shorter one.
  """

  num_steps: int
  batch_size: int
  learning_rate: float
  seed: int
  warmup_steps: int = 100
  last_rate: float = 0.0

  def optimizer(self) -> keras.optimizers.Optimizer:
    """A new one."""
    return keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(
        0.0, self.num_steps - self.warmup_steps, alpha=self.last_rate,
        warmup_target=self.learning_rate, warmup_steps=self.warmup_steps),
                                 beta_2=0.99)

  def batch(self, count: int, step: int) -> np.ndarray:
    """Which of `count` images step `step` sees, int64 [batch_size].

    Every pass over the images has its own order; those that fill no batch are
    left out of it.
    """
    number, place = divmod(step, count // self.batch_size)
    order = np.random.default_rng([self.seed, number]).permutation(count)
    return order[place * self.batch_size:(place + 1) * self.batch_size]


AUTOENCODER = Recipe(
    num_steps=1500, batch_size=64, learning_rate=2e-3, seed=1)
# The average of its weights does what a decay of the rate would.
DENOISER = Recipe(num_steps=6000, batch_size=64, learning_rate=1e-3, seed=2,
                  last_rate=1.0)


def build_encoder() -> keras.Model:
  """The network from images to the distribution of their latents.

  Returns:
    A model from float [B, 28, 28, 1] to float [B, 7, 7, 8]: means, and
    logarithms of variances.
  """
  norm = dict(norm_groups=8, norm_epsilon=1e-6, timed=False)
  x = images = keras.Input((28, 28, 1), name="images")
  x = layers.Conv2D(16, 3, padding="same", activation="silu", name="in")(x)
  for level in (0, 1):
    x = layers.Conv2D(32, 3, 2, "same", name=f"down_{level}")(x)
    x = ResidualBlock(32, **norm, name=f"block_{level}")(x)
  x = ResidualBlock(32, **norm, name="block_2")(x)
  x = layers.Conv2D(2 * DECODER.latent_channels, 1, name="out")(x)
  return keras.Model(images, x, name="encoder")


def draw_latents(moments: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
  """Draws latents from the encoder's distributions.

  Args:
    moments: float32 [B, 7, 7, 8], as the encoder gives them.
    seed: int [2].

  Returns:
    float32 [B, 7, 7, 4].
  """
  mean, log_variance = tf.split(moments, 2, axis=-1)
  return mean + tf.exp(0.5 * log_variance) * tf.random.stateless_normal(
      tf.shape(mean), seed)


def negative_elbo(images: tf.Tensor, decoded: tf.Tensor,
                  moments: tf.Tensor) -> tf.Tensor:
  """The autoencoder's loss, up to a constant, in nats for each pixel.

  Kingma and Welling (2014, https://arxiv.org/abs/1312.6114, appendix B), with
  a normal distribution of the pixels whose deviation is 0.1.

  Args:
    images: float32 [B, 28, 28, 1] in [-1, 1].
    decoded: float32 [B, 28, 28, 1], the decoded latents.
    moments: float32 [B, 7, 7, 8], as the encoder gives them.

  Returns:
    float32, the mean over the images.
  """
  mean, log_variance = tf.split(moments, 2, axis=-1)
  divergence = 0.5 * tf.reduce_sum(
      mean**2 + tf.exp(log_variance) - log_variance - 1.0, axis=[1, 2, 3])
  error = tf.reduce_sum((images - decoded) ** 2, axis=[1, 2, 3])
  pixels = tf.cast(tf.reduce_prod(tf.shape(images)[1:]), tf.float32)
  return tf.reduce_mean(0.5 * error / _PIXEL_STD**2 + divergence) / pixels


def flow_loss(network, latents: tf.Tensor, labels: tf.Tensor,
              seed: tf.Tensor) -> tf.Tensor:
  """The squared error of the velocity, at times uniform in [0, 1].

  At time s the network sees z = (1 - s) x_0 + s eps and 1000 s, and predicts
  eps - x_0. The times of a batch are one in each of B equal intervals, which
  makes the loss less noisy. A tenth of the labels become the null label.

  Args:
    network: a DiT.
    latents: float32 [B, 7, 7, 4], standardised.
    labels: int32 [B] in [0, 9].
    seed: int [2].

  Returns:
    float32, the mean over latents and their elements.
  """
  seeds = tf.unstack(tf.random.split(seed, 3))
  count = tf.shape(latents)[0]
  eps = tf.random.stateless_normal(tf.shape(latents), seeds[0])
  s = (tf.range(count, dtype=tf.float32) + tf.random.stateless_uniform(
      [count], seeds[1])) / tf.cast(count, tf.float32)
  dropped = tf.random.stateless_uniform([count], seeds[2]) < _LABEL_DROPOUT
  labels = tf.where(dropped, _NUM_CLASSES, labels)
  share = s[:, None, None, None]
  predicted = network(
      [(1.0 - share) * latents + share * eps, _TIME_SCALE * s, labels],
      training=True)
  return tf.reduce_mean((predicted - (eps - latents)) ** 2)


class Training:
  """A training that saves its state and goes on from it.

  Args:
    folder: of the state.
    recipe: how to train.
    models: the models to train, by name, as they are before.
    average: whether to keep an average of the weights over the steps.
  """

  def __init__(self, folder: str, recipe: Recipe,
               models: dict[str, keras.Model], average: bool = False):
    self.recipe = recipe
    self.variables = [variable for model in models.values()
                      for variable in model.trainable_variables]
    self.optimizer = recipe.optimizer()
    self.optimizer.build(self.variables)
    self.averages = [tf.Variable(variable.numpy()) for variable in self.variables
                     ] if average else []
    self.step = tf.Variable(0, dtype=tf.int64)
    self.seconds = tf.Variable(0.0, dtype=tf.float64)
    self._manager = tf.train.CheckpointManager(
        tf.train.Checkpoint(
            optimizer=self.optimizer, averages=self.averages, step=self.step,
            seconds=self.seconds, **models), folder, max_to_keep=1)
    self._manager.restore_or_initialize()

  def told(self) -> dict:
    """The recipe, and the seconds that the steps took."""
    return {**dataclasses.asdict(self.recipe),
            "seconds": round(float(self.seconds.numpy()))}

  def apply(self, gradients) -> None:
    """One step of Adam, and of the average."""
    self.optimizer.apply(gradients, self.variables)
    # The first weights are forgotten sooner.
    step = tf.cast(self.optimizer.iterations, tf.float32)
    decay = tf.minimum(_AVERAGE_DECAY, step / (step + 10.0))
    for average, variable in zip(self.averages, self.variables):
      average.assign(decay * average + (1.0 - decay) * variable)

  def run(self, name: str, step_fn, count: int, deadline: float) -> bool:
    """Trains until the recipe's end or the deadline, and saves.

    Args:
      name: what messages call it.
      step_fn: takes which images, int64 [batch_size], and a seed, int32 [2];
        gives the loss.
      count: number of images.
      deadline: in seconds of `time.time()`.

    Returns:
      Whether the recipe's end was reached.
    """
    last = self.recipe.num_steps
    losses, told, saved = [], time.time(), time.time()
    while int(self.step) < last and time.time() < deadline:
      start, step = time.time(), int(self.step)
      losses.append(float(step_fn(
          tf.constant(self.recipe.batch(count, step)),
          tf.constant([self.recipe.seed, step]))))
      if not np.isfinite(losses[-1]):
        raise FloatingPointError(f"{name}: the loss at step {step} is not finite")
      self.step.assign_add(1)
      self.seconds.assign_add(time.time() - start)
      if time.time() - told > 20.0 or step + 1 == last:
        each = float(self.seconds) / (step + 1)
        print(f"{name}: step {step + 1} of {last}, loss {np.mean(losses):.4f}, "
              f"{each:.3f} s a step, {each * (last - step - 1) / 60:.0f} min "
              "left", flush=True)
        losses, told = [], time.time()
      if time.time() - saved > _SAVE_EVERY:
        self._manager.save(int(self.step))
        saved = time.time()
    self._manager.save(int(self.step))
    return int(self.step) == last


def train_autoencoder(folder: str, images: np.ndarray, deadline: float,
                      recipe: Recipe = AUTOENCODER):
  """Trains encoder and decoder.

  Args:
    folder: of the state.
    images: float32 [N, 28, 28, 1] in [-1, 1].
    deadline: see `Training.run`.
    recipe: how to train.

  Returns:
    encoder, decoder, and the `Training` if it came to its end, or else None.
  """
  keras.utils.set_random_seed(recipe.seed)
  encoder, decoder = build_encoder(), autoencoder.build_decoder(DECODER)
  training = Training(folder, recipe, {"encoder": encoder, "decoder": decoder})
  pixels = tf.constant(images)

  @tf.function(jit_compile=True)  # A third faster than without.
  def gradients_of(chosen, seed):
    batch = tf.gather(pixels, chosen)
    with tf.GradientTape() as tape:
      moments = encoder(batch, training=True)
      decoded = decoder(draw_latents(moments, seed), training=True)
      loss = negative_elbo(batch, decoded, moments)
    return loss, tape.gradient(loss, training.variables)

  @tf.function
  def step_fn(chosen, seed):
    loss, gradients = gradients_of(chosen, seed)
    training.apply(gradients)
    return loss

  ready = training.run("autoencoder", step_fn, len(images), deadline)
  return encoder, decoder, training if ready else None


def build_transformer() -> keras.Model:
  """The DiT, whose blocks begin as the identity and its output as 0."""
  network = dit.build_dit(TRANSFORMER)
  for variable in network.trainable_variables:
    if "/modulation/" in variable.path or variable.path.startswith(
        "output/projection"):
      variable.assign(np.zeros(variable.shape, np.float32))
  return network


def train_transformer(folder: str, moments: np.ndarray, labels: np.ndarray,
                      standard: tuple[np.ndarray, np.ndarray], deadline: float,
                      recipe: Recipe = DENOISER):
  """Trains the DiT.

  Args:
    folder: of the state.
    moments: float32 [N, 7, 7, 8], as the encoder gives them.
    labels: int [N] in [0, 9].
    standard: mean and deviation of latents, float32 [4] each.
    deadline: see `Training.run`.
    recipe: how to train.

  Returns:
    The network with the average of its weights, and the `Training` if it came
    to its end, or else None.
  """
  keras.utils.set_random_seed(recipe.seed)
  network = build_transformer()
  training = Training(folder, recipe, {"network": network}, average=True)
  moments, labels = tf.constant(moments), tf.constant(labels, tf.int32)
  mean, std = standard

  @tf.function  # Compiled by XLA it is slower by a tenth.
  def step_fn(chosen, seed):
    own, seed = tf.unstack(tf.random.split(seed, 2))
    latents = (draw_latents(tf.gather(moments, chosen), own) - mean) / std
    with tf.GradientTape() as tape:
      loss = flow_loss(network, latents, tf.gather(labels, chosen), seed)
    training.apply(tape.gradient(loss, training.variables))
    return loss

  ready = training.run("transformer", step_fn, len(labels), deadline)
  averaged = build_transformer()
  for variable, average in zip(averaged.trainable_variables,
                               training.averages, strict=True):
    variable.assign(average)
  return averaged, training if ready else None


def standard_of(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean and deviation of drawn latents for each channel, float32 [4]."""
  mean, log_variance = np.split(moments.astype(np.float64), 2, axis=-1)
  axes = (0, 1, 2)
  variance = mean.var(axis=axes) + np.exp(log_variance).mean(axis=axes)
  return (mean.mean(axis=axes).astype(np.float32),
          np.sqrt(variance).astype(np.float32))


def make_denoiser(network: keras.Model, decoder: keras.Model,
                  standard: tuple[np.ndarray, np.ndarray]
                  ) -> ddss_tf.Denoiser:
  """The denoiser of trained networks.

  It has no guidance scale of its own, or samplers could not learn theirs.

  Args:
    network: the DiT.
    decoder: the decoder.
    standard: see `train_transformer`.
  """
  mean, std = standard
  fields = {field.name: getattr(TRANSFORMER, field.name)
            for field in dataclasses.fields(TRANSFORMER)
            if getattr(TRANSFORMER, field.name) != field.default}
  return ddss_tf.Denoiser(
      network, ddss_tf.make_schedule("flow", 1000, shift=1.0), "flow", NAME,
      num_classes=_NUM_CLASSES + 1, null_label=_NUM_CLASSES, process="flow",
      time_input="flow", time_scale=_TIME_SCALE,
      architecture={"format": "ours", "kind": "DiTConfig", **fields},
      decoder=ddss_tf.Decoder(
          decoder, 1.0 / std.astype(np.float64), mean,
          batch_size=_DECODED_AT_ONCE))


def held_out_errors(encoder: keras.Model, denoiser: ddss_tf.Denoiser,
                    images: np.ndarray, labels: np.ndarray) -> dict:
  """How well digits that were not trained on are decoded and denoised.

  Args:
    encoder: the encoder.
    denoiser: the denoiser.
    images: float32 [N, 28, 28, 1] in [-1, 1].
    labels: int [N] in [0, 9].

  Returns:
    "reconstruction_mse", of decoded means, for pixels in [-1, 1]; and
    "velocity_mse", the loss of the transformer.
  """
  mean, _ = np.split(encoder.predict(images, verbose=0), 2, axis=-1)
  decoder = denoiser.decoder
  latents = ((mean - decoder.shift) * decoder.scale).astype(np.float32)
  decoded = denoiser.decode(latents).numpy()
  loss = flow_loss(denoiser.model, tf.constant(latents),
                   tf.constant(labels, tf.int32), tf.constant([0, 0]))
  return {"reconstruction_mse": float(np.mean((decoded - images) ** 2)),
          "velocity_mse": float(loss)}


def save(folder: str, denoiser: ddss_tf.Denoiser, told: dict) -> None:
  """Writes the denoiser, and `training.json` about how it came about.

  Args:
    folder: of the denoiser.
    denoiser: the denoiser.
    told: what is known of the training, as JSON has it.
  """
  denoiser.save(folder)
  with open(os.path.join(folder, "training.json"), "w", encoding="utf-8") as f:
    json.dump(told, f, indent=1)
    f.write("\n")
  ddss_tf.load_denoiser(folder)  # Checks what was written.


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  if not _STATE.value:
    raise app.UsageError("--state must be given")
  tf.config.threading.set_intra_op_parallelism_threads(_THREADS.value)
  tf.config.threading.set_inter_op_parallelism_threads(_THREADS.value)
  deadline = (float("inf") if _MINUTES.value is None
              else time.time() + 60 * _MINUTES.value)
  digits = ddss_tf.load_dataset("ddss_digits", data_dir=_DATA_DIR.value)
  images, labels = digits.images[:_NUM_TRAIN], digits.labels[:_NUM_TRAIN]
  encoder, decoder, of_autoencoder = train_autoencoder(
      os.path.join(_STATE.value, "autoencoder"), images, deadline)
  if of_autoencoder is None:
    return
  moments = encoder.predict(images, batch_size=100, verbose=0)
  standard = standard_of(moments)
  recipe = dataclasses.replace(
      DENOISER, num_steps=_STEPS.value or DENOISER.num_steps)
  network, of_transformer = train_transformer(
      os.path.join(_STATE.value, "transformer"), moments, labels, standard,
      deadline, recipe)
  if of_transformer is None:
    return
  denoiser = make_denoiser(network, decoder, standard)
  errors = held_out_errors(encoder, denoiser, digits.images[_NUM_TRAIN:],
                           digits.labels[_NUM_TRAIN:])
  print(errors)
  save(_OUTPUT_DIR.value, denoiser, {
      "sha256": denoiser.sha256,
      "decoder_sha256": denoiser.decoder.sha256,
      "trained_by": "python tools/train_latent_digits.py",
      "dataset": digits.name,
      "dataset_sha256": digits.sha256,
      "num_train": _NUM_TRAIN,
      "cpu_threads": _THREADS.value,
      "autoencoder": of_autoencoder.told(),
      "transformer": of_transformer.told(),
      "held_out": errors,
  })


if __name__ == "__main__":
  app.run(main)
