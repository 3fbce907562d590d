"""The frozen, pre-trained network, behind one boundary.

What a foreign model is - its architecture, what it predicts, how its times are
scaled - ends here. Beyond this module there is `eps(x_t, t)`, NHWC, images in
[-1, 1], `t` a (fractional) index of a training step; and `eps(x_t, t, labels)`
of a class-conditional network.
"""

import json
import os

import gin
import keras
import numpy as np
import tensorflow as tf

from ddss_tf import checkpoints
from ddss_tf import ddpm_format
from ddss_tf import diffusers_format
from ddss_tf import fingerprint
from ddss_tf import openai_format
from ddss_tf import storage
from ddss_tf.errors import UserError
from ddss_tf.frozen import frozen_variables
from ddss_tf.schedules import NoiseSchedule

PREDICTIONS = ("eps", "x0", "v")
_ASSETS = os.path.join(os.path.dirname(__file__), "assets")
_CARD = "denoiser.json"
_NETWORK = "network.keras"


class Denoiser:
  """A frozen network with the process it was trained for.

  Args:
    model: maps `[x_t, t]`, float [B, H, W, C] and float [B], to the prediction
      [B, H, W, C]; a class-conditional one `[x_t, t, labels]`, labels int [B].
    schedule: its forward process.
    prediction: "eps"; "x0"; or "v" = alpha_t eps - sigma_t x0 (Salimans and Ho
      2022, https://arxiv.org/abs/2202.00512).
    name: what results call it.
    num_classes: given exactly if the model is class-conditional.
    guidance_scale: of classifier-free guidance (Ho and Salimans 2022,
      https://arxiv.org/abs/2207.12598), s in eps(null) + s (eps(label) -
      eps(null)): 1 is none, 0 unconditional. It takes two network calls, made
      as one of twice the batch. None: no guidance, one call.
    null_label: the label that stands for no class, with which the network was
      trained to be unconditional; never drawn.

  Attributes:
    image_shape: (H, W, C).
    num_classes: of a class-conditional network; None: it is unconditional.
    sha256: hash of all weights, whatever file they came from; None if the
      network has none.
    key: `sha256`, or with guidance a hash that covers it too: what decides eps.

  Raises:
    ValueError: unknown prediction; `num_classes` does not fit the model;
      guidance of an unconditional network or without a null label.
  """

  def __init__(self, model, schedule: NoiseSchedule, prediction: str = "eps",
               name: str = "denoiser", num_classes: int | None = None,
               guidance_scale: float | None = None,
               null_label: int | None = None):
    if prediction not in PREDICTIONS:
      raise ValueError(
          f"prediction must be one of {', '.join(PREDICTIONS)}. "
          f"Received: {prediction!r}")
    if len(model.input_shape) != (2 if num_classes is None else 3):
      raise ValueError(
          "num_classes must be given exactly for a model of three inputs. "
          f"Received: {num_classes} for {len(model.input_shape)} inputs")
    if null_label is not None and not (
        num_classes and 0 <= null_label < num_classes):
      raise ValueError(
          "null_label must be one of the network's classes, of which there are "
          f"{num_classes or 'none'}. Received: {null_label}")
    if guidance_scale is not None and null_label is None:
      raise ValueError(
          "guidance_scale needs a null_label: the class with which the network "
          f"is unconditional. Received: guidance_scale={guidance_scale}")
    self.model = model
    self.num_classes = num_classes
    self.guidance_scale = guidance_scale
    self.null_label = null_label
    self.schedule = schedule
    self.prediction = prediction
    self.name = name
    self.image_shape = tuple(model.input_shape[0][1:])
    weights = model.get_weights()
    self.sha256 = fingerprint.arrays_sha256(weights) if weights else None
    self.key = self.sha256
    if guidance_scale is not None:
      self.key = fingerprint.text_sha256(
          f"{self.sha256} {float(guidance_scale)} {null_label}")
    self._compiled = {}

  @property
  def identity(self) -> dict:
    """How results name it: "name", "sha256", and its guidance if there is."""
    guidance = {} if self.guidance_scale is None else {
        "guidance_scale": self.guidance_scale, "null_label": self.null_label}
    return {"name": self.name, "sha256": self.sha256, **guidance}

  def network(self, x, t, labels=None) -> tf.Tensor:
    """The raw prediction.

    Args:
      x: float [B, H, W, C].
      t: float [B], or a scalar for all of them, in [0, T - 1].
      labels: int [B], or a scalar for all of them, in [0, num_classes - 1];
        None exactly if the network is unconditional. Labels that are symbolic,
        inside a `tf.function`, are not checked.

    Returns:
      float32 [B, H, W, C].

    Raises:
      ValueError: labels are missing, not wanted, not whole numbers or out of
        range.
    """
    x = tf.convert_to_tensor(x, tf.float32)
    t = tf.convert_to_tensor(t, tf.float32)
    if t.shape.rank == 0:
      t = tf.repeat(t[None], tf.shape(x)[0])
    inputs = [x, t, *self._label_input(labels, tf.shape(x)[0])]
    # training=False: no dropout, or rematerialisation would redraw its mask.
    return tf.cast(self.model(inputs, training=False), tf.float32)

  def _label_input(self, labels, batch_size) -> list[tf.Tensor]:
    """The network's third input, int32 [B], in a list; empty if it has none."""
    if self.num_classes is None:
      if labels is not None:
        raise ValueError(f"labels must be None: {self.name!r} is unconditional."
                         f" Received: {type(labels).__name__}")
      return []
    if labels is None:
      raise ValueError(f"labels must be given: {self.name!r} has "
                       f"{self.num_classes} classes. Received: None")
    labels = tf.convert_to_tensor(labels)
    if not labels.dtype.is_integer:
      raise ValueError("labels must be whole numbers. "
                       f"Received: {labels.dtype.name}")
    known = tf.get_static_value(labels)
    if known is not None and not np.all(
        (0 <= known) & (known < self.num_classes)):
      raise ValueError(f"labels must be in [0, {self.num_classes - 1}]. "
                       f"Received: {known.min()} to {known.max()}")
    labels = tf.cast(labels, tf.int32)
    return [tf.repeat(labels[None], batch_size) if labels.shape.rank == 0
            else labels]

  def eps(self, x_t: tf.Tensor, t: tf.Tensor, labels=None) -> tf.Tensor:
    """The predicted noise [B, H, W, C], whatever the network predicts.

    Args:
      x_t: float [B, H, W, C].
      t: float [B], or a scalar for all of them.
      labels: see `network`.
    """
    if self.guidance_scale is None:
      prediction = self.network(x_t, t, labels)
    else:
      prediction = self._guided(x_t, t, labels)
    if self.prediction == "eps":
      return prediction
    alpha_t, sigma_t = self.schedule.alpha_sigma(t)
    alpha_t = alpha_t[..., None, None, None]
    sigma_t = sigma_t[..., None, None, None]
    if self.prediction == "x0":
      return (x_t - alpha_t * prediction) / sigma_t
    return sigma_t * x_t + alpha_t * prediction

  def _guided(self, x_t, t, labels):
    """The prediction with guidance: eps, x0 and v are affine in each other."""
    batch_size = tf.shape(x_t)[0]
    (labels,) = self._label_input(labels, batch_size)
    t = tf.convert_to_tensor(t, tf.float32)
    if t.shape.rank == 0:
      t = tf.repeat(t[None], batch_size)
    null = tf.fill(tf.shape(labels), self.null_label)
    given, free = tf.split(self.network(
        tf.concat([x_t, x_t], axis=0), tf.concat([t, t], axis=0),
        tf.concat([labels, null], axis=0)), 2)
    return free + self.guidance_scale * (given - free)

  def draw_labels(self, seed: tf.Tensor, indices: tf.Tensor):
    """Draws a class for every sample, from its own seed.

    All classes but the null one are as frequent: our choice, and right for a
    data set with as many images of each.

    Args:
      seed: int32 [2].
      indices: int [B], the global indices of the samples.

    Returns:
      int32 [B]; None for an unconditional network.
    """
    if self.num_classes is None:
      return None
    count = self.num_classes - (self.null_label is not None)

    def one(index):
      own = tf.random.experimental.stateless_fold_in(
          tf.cast(seed, tf.int32), index, alg="philox")
      # 0 and 1 are the noise's, see chain.draw_noise.
      own = tf.random.experimental.stateless_fold_in(own, 2, alg="philox")
      return tf.random.stateless_uniform(
          [], own, 0, count, tf.int32, alg="philox")

    labels = tf.map_fn(one, tf.cast(indices, tf.int32))
    if self.null_label is None:
      return labels
    return labels + tf.cast(labels >= self.null_label, tf.int32)

  def compiled_eps(self, jit_compile: bool = True):
    """`eps` as a `tf.function`, the same one at every call.

    Compiling a U-Net takes longer than many steps of a search. TensorFlow keeps
    what it compiled, gradients too, with the function; so all chains, searches
    and evaluations of a process share this one.

    Args:
      jit_compile: compile it with XLA.
    """
    if jit_compile not in self._compiled:
      self._compiled[jit_compile] = tf.function(
          self.eps, jit_compile=jit_compile)
    return self._compiled[jit_compile]

  def save(self, path: str) -> None:
    """Writes our own format: `denoiser.json` and `network.keras`.

    Args:
      path: a folder, made if need be.
    """
    with storage.replacing(os.path.join(path, _NETWORK)) as temporary:
      self.model.save(temporary)
    storage.write_json(os.path.join(path, _CARD), {
        "format": "ddss_tf.denoiser",
        "version": 1,
        "name": self.name,
        "prediction": self.prediction,
        "betas": self.schedule.betas.tolist(),
        "sha256": self.sha256,
        "num_classes": self.num_classes,
        "guidance_scale": self.guidance_scale,
        "null_label": self.null_label,
    })


@keras.saving.register_keras_serializable(package="ddss_tf")
class _GaussianEps(keras.layers.Layer):
  """eps of the exact denoiser of N(mean, std^2 I) data."""

  def __init__(self, betas, mean, std, **kwargs):
    super().__init__(**{**kwargs, "trainable": False})
    self.schedule = NoiseSchedule(betas)
    self.mean = mean
    self.std = std

  def call(self, x_t, t):
    alpha_t, sigma_t = self.schedule.alpha_sigma(t)
    alpha_t = alpha_t[:, None, None, None]
    sigma_t = sigma_t[:, None, None, None]
    variance = (alpha_t * self.std) ** 2 + sigma_t**2
    return sigma_t * (x_t - alpha_t * self.mean) / variance

  def get_config(self):
    return {**super().get_config(), "betas": self.schedule.betas.tolist(),
            "mean": self.mean, "std": self.std}


@gin.register
def gaussian_denoiser(image_shape=(8, 8, 1), mean: float = 0.0,
                      std: float = 0.5, schedule=None) -> Denoiser:
  """The exact denoiser of a Gaussian data set: what tests measure against.

  For x_0 ~ N(mean, std^2 I),
  eps(x_t, t) = sigma_t (x_t - alpha_t mean) / (alpha_t^2 std^2 + sigma_t^2),
  and every sampler's output distribution is known in closed form.

  Args:
    image_shape: (H, W, C).
    mean: of every pixel.
    std: of every pixel.
    schedule: forward process; linear betas, T = 1000, if None.

  Returns:
    A `Denoiser` without weights.
  """
  schedule = schedule or NoiseSchedule.linear()
  x_t = keras.Input(image_shape, name="x_t")
  t = keras.Input((), name="t")
  eps = _GaussianEps(schedule.betas.tolist(), mean, std, name="eps")(x_t, t)
  return Denoiser(keras.Model([x_t, t], eps), schedule, name="gaussian")


@gin.register
def load_denoiser(
    path: str = gin.REQUIRED,
    image_size: int | None = None,
    num_heads: int | None = None,
    num_head_channels: int | None = None,
    use_new_attention_order: bool | None = None,
    diffusion_steps: int | None = None,
    noise_schedule: str | None = None,
    rescale_timesteps: bool | None = None,
    null_label: int | None = None,
    guidance_scale: float | None = None,
) -> Denoiser:
  """Loads a frozen, pre-trained denoiser.

  Args:
    path: one of
      - a folder in our own format (`denoiser.json`, see `Denoiser.save`);
      - a folder in the diffusers layout: `config.json` of a `UNet2DModel`,
        `scheduler_config.json`, `diffusion_pytorch_model.safetensors` or
        `.bin` (which needs PyTorch); or such a file of any name, with the two
        others beside it;
      - a TensorFlow checkpoint of the original DDPM (hojonathanho/diffusion),
        by its prefix ("folder/model.ckpt-790000") or its folder;
      - a state dict of improved-diffusion or guided-diffusion (`.pt`; reading
        it needs PyTorch), with a card beside it, `<path>.json`, of what tensors
        do not tell: the arguments below by their names;
      - the name of an embedded model: "digits16-ddpm".
    image_size: height and width, for the two formats that do not say; None: the
      card's, or, for DDPM, such that attention is at 16x16.
    num_heads: of a `.pt` network; None: the card's, as for all below.
    num_head_channels: of each head, instead of their number.
    use_new_attention_order: of guided-diffusion, whose networks differ in it
      without a trace in names or shapes.
    diffusion_steps: T.
    noise_schedule: "linear" or "cosine".
    rescale_timesteps: whether the network was fed with t * 1000 / T. The
      denoiser's own times are training steps either way.
    null_label: of a class-conditional network, the label that stands for no
      class; None: it has none, or our own format's card says.
    guidance_scale: see `Denoiser`; needs a null label.

  Returns:
    The denoiser, frozen.

  Raises:
    UserError: nothing there, not a format we read, an architecture switch we do
      not implement, a truncated or mismatched file, an argument that the file
      itself answers; in one line.
  """
  given = {
      "image_size": image_size, "num_heads": num_heads,
      "num_head_channels": num_head_channels,
      "use_new_attention_order": use_new_attention_order,
      "diffusion_steps": diffusion_steps, "noise_schedule": noise_schedule,
      "rescale_timesteps": rescale_timesteps,
  }
  denoiser = _load(path, given)
  if null_label is None and guidance_scale is None:
    return denoiser
  try:
    return Denoiser(
        denoiser.model, denoiser.schedule, denoiser.prediction, denoiser.name,
        denoiser.num_classes,
        denoiser.guidance_scale if guidance_scale is None else guidance_scale,
        denoiser.null_label if null_label is None else null_label)
  except ValueError as error:
    raise UserError(f"load_denoiser: {error}") from error


def _load(path: str, given: dict) -> Denoiser:
  """Finds out what a path is, and reads it; see `load_denoiser`."""
  if path.endswith(openai_format.SUFFIX) and os.path.isfile(path):
    return _load_openai(path, given)
  if path.endswith(diffusers_format.SUFFIXES) and os.path.isfile(path):
    _refuse_given(path, given, ())
    return _load_diffusers(path)
  folder = path
  if not os.path.exists(folder) and os.sep not in path:
    folder = os.path.join(_ASSETS, path)
  own = os.path.exists(os.path.join(folder, _CARD))
  if own or os.path.exists(os.path.join(folder, diffusers_format.CONFIG)):
    _refuse_given(path, given, ())
    return _load_own(folder) if own else _load_diffusers(folder)
  prefix = ddpm_format.find_prefix(path)
  if prefix is not None:
    _refuse_given(path, given, ("image_size",))
    return _load_ddpm(prefix, given["image_size"])
  if not os.path.isdir(folder):
    raise UserError(
        "denoiser path must be a folder, a checkpoint prefix, a .pt, "
        ".safetensors or .bin file or "
        f"the name of an embedded model ({', '.join(embedded_denoisers())}). "
        f"Received: {path!r}")
  raise UserError(
      f"denoiser folder must hold {_CARD} (ours), {diffusers_format.CONFIG} "
      "(diffusers) or a TensorFlow checkpoint (*.index). "
      f"Received: {folder!r} with {sorted(os.listdir(folder))}")


def _refuse_given(path, given, allowed):
  """Refuses arguments that the file answers itself."""
  for key, value in given.items():
    if value is not None and key not in allowed:
      raise UserError(f"{key} must not be given for {path!r}, which has its "
                      f"own. Received: {key}={value!r}")


def embedded_denoisers() -> list[str]:
  """Names of the models that come with the package."""
  return sorted(name for name in os.listdir(_ASSETS)
                if os.path.exists(os.path.join(_ASSETS, name, _CARD)))


def _load_own(folder: str) -> Denoiser:
  """Reads what `Denoiser.save` wrote, and checks the weights' hash."""
  card_path = os.path.join(folder, _CARD)
  try:
    with open(card_path) as f:
      card = json.load(f)
    name, prediction = card["name"], card["prediction"]
    betas, sha256 = card["betas"], card["sha256"]
    num_classes = card.get("num_classes")  # Older cards have none.
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"{card_path} is damaged: {error!r}") from error
  network_path = os.path.join(folder, _NETWORK)
  if not os.path.exists(network_path):
    raise UserError(f"{folder} has {_CARD} but no {_NETWORK}")
  try:
    with frozen_variables():
      model = keras.saving.load_model(
          network_path, compile=False, safe_mode=True)
  except Exception as error:  # Keras raises many kinds for a damaged file.
    raise UserError(
        f"{network_path} is not a complete and safe Keras file: "
        f"{' '.join(str(error).split())[:200]}") from error
  model.trainable = False
  try:
    denoiser = Denoiser(
        model, NoiseSchedule(betas), prediction, name, num_classes,
        card.get("guidance_scale"), card.get("null_label"))
  except ValueError as error:
    raise UserError(f"{card_path} is damaged: {error}") from error
  if denoiser.sha256 != sha256:
    raise UserError(
        f"weights in {network_path} must have the SHA-256 {sha256} of their "
        f"{_CARD}. Received: {denoiser.sha256}")
  return denoiser


def _load_diffusers(path: str) -> Denoiser:
  """Reads a diffusers folder, or a weights file in it, into our U-Net."""
  config, betas, prediction = diffusers_format.read_config(path)
  weights = diffusers_format.read_weights(path)
  model = checkpoints.build_frozen(
      path, config,
      lambda variables: diffusers_format.to_keras(weights, variables))
  name = os.path.basename(os.path.normpath(path))
  for suffix in diffusers_format.SUFFIXES:
    name = name.removesuffix(suffix)
  return Denoiser(
      model, NoiseSchedule(betas), prediction, name, config.num_classes)


def _load_ddpm(prefix: str, image_size: int | None) -> Denoiser:
  """Reads a checkpoint of the original DDPM; all use one process."""
  model = ddpm_format.convert(
      prefix, ddpm_format.read_weights(prefix), image_size)
  return Denoiser(model, NoiseSchedule.linear(), name=os.path.basename(prefix))


def _load_openai(path: str, given: dict) -> Denoiser:
  """Reads a state dict of improved-diffusion or guided-diffusion."""
  # The card first: its faults are cheaper to find.
  card = openai_format.read_card(path, given)
  betas = openai_format.betas(card)
  weights = checkpoints.read_state_dict(path)
  model = openai_format.convert(path, weights, card)
  name = os.path.basename(path).removesuffix(openai_format.SUFFIX)
  return Denoiser(model, NoiseSchedule(betas),
                  "x0" if card["predict_xstart"] else "eps", name,
                  openai_format.num_classes(weights))
