"""Pre-trained networks from disk, of any format that we read.

Each format has a module. The table here says how each is recognised and read. A
checkpoint holds weights, and the network that they are converted to is kept in
a cache (`load_denoiser.cache_dir`). SavedModels and Keras files are programs,
which are used as they are.
"""

import os
from typing import Callable, NamedTuple

import gin

from ddss_tf import bindings
from ddss_tf import storage
from ddss_tf.denoisers import denoiser as denoiser_lib
from ddss_tf.formats import cache as cache_lib
from ddss_tf.formats import cards
from ddss_tf.formats import converted
from ddss_tf.formats import ddpm
from ddss_tf.formats import diffusers
from ddss_tf.formats import edm
from ddss_tf.formats import keras_hub
from ddss_tf.formats import keras_weights
from ddss_tf.formats import openai
from ddss_tf.formats import own
from ddss_tf.formats import pipelines
from ddss_tf.formats import saved_model
from ddss_tf.formats import tensors
from ddss_tf.networks import files as network_files
from ddss_tf.runs import fingerprint
from ddss_tf.denoisers.decoder import Standardised
from ddss_tf.denoisers.denoiser import Denoiser
from ddss_tf.denoisers.table import ConditionTable
from ddss_tf.errors import UserError
from ddss_tf.schedules import NoiseSchedule

_ASSETS = os.path.join(os.path.dirname(__file__), "assets")
_OPENAI_KEYS = ("image_size", "num_heads", "num_head_channels",
                "use_new_attention_order", "diffusion_steps", "noise_schedule",
                "rescale_timesteps", "learned_variance")


@bindings.register
def load_denoiser(
    path: str = gin.REQUIRED,
    image_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
    num_head_channels: int | None = None,
    use_new_attention_order: bool | None = None,
    diffusion_steps: int | None = None,
    noise_schedule: str | None = None,
    rescale_timesteps: bool | None = None,
    null_label: int | None = None,
    guidance_scale: float | None = None,
    prediction: str | None = None,
    schedule: NoiseSchedule | dict | None = None,
    image_shape: tuple[int, int, int] | None = None,
    process: str | None = None,
    time_input: str | None = None,
    time_scale: float | None = None,
    time_offset: float | None = None,
    signature: str | None = None,
    num_classes: int | None = None,
    image_mean: float | list[float] | None = None,
    image_std: float | list[float] | None = None,
    conditions: str | None = None,
    prompts: list[str] | None = None,
    negative_prompt: str | None = None,
    label_weights: list[float] | str | None = None,
    preset: str | None = None,
    learned_variance: bool | None = None,
    dtype_policy: str | None = None,
    cache_dir: str | None = None,
) -> Denoiser:
  """Loads a frozen, pre-trained denoiser.

  Args:
    path: one of the following, with `~` for the home folder:
      - a folder in our own format (`denoiser.json`, see `Denoiser.save`);
      - a folder in the diffusers layout: `config.json` of a `UNet2DModel`,
        `scheduler_config.json`, `diffusion_pytorch_model.safetensors` or
        `.bin` (which needs PyTorch); or such a file of any name, with the two
        others beside it; or the folder of a `DiTTransformer2DModel`,
        `UNet2DConditionModel` or `SD3Transformer2DModel` (which needs KerasHub);
      - a latent pipeline of diffusers, a folder with `model_index.json`:
        LDMPipeline, DiTPipeline, StableDiffusionPipeline,
        StableDiffusionXLPipeline or StableDiffusion3Pipeline. Its decoder comes
        with it, its text encoders do not: see `conditions`;
      - a preset of KerasHub's Stable Diffusion 3, the folder that
        `save_to_preset` writes, or a Keras file of such a model; see
        `of_keras_hub`. Either needs KerasHub;
      - a TensorFlow checkpoint of the original DDPM (hojonathanho/diffusion),
        by its prefix ("folder/model.ckpt-790000") or its folder;
      - a state dict of improved-diffusion or guided-diffusion (`.pt`; reading
        it needs PyTorch). What its tensors do not tell is given as arguments,
        or by the same names in a card beside it, `<path>.json`;
      - weights of EDM (`.npz` or `.safetensors`) with their card, as
        tools/convert_edm.py makes them (see `edm`);
      - a folder with a TensorFlow SavedModel, or a Keras file (`.keras`), from
        images and times to a prediction (see `Denoiser`). What it does not
        tell, `prediction` and `schedule` at least, is given as arguments, or by
        the same names in a card beside it, `<path>.json`;
      - weights of one of our networks as Keras saves them (`.weights.h5`), with
        `preset` and, unless that is one of EDM's, `prediction` and `schedule`,
        as arguments or in such a card;
      - the name of an embedded model: "digits16-ddpm", or "digits28-latent",
        a latent flow model with classes.
    image_size: a number, or (height, width), for the files that do not say:
      `.pt`, DDPM's, and diffusers' if `sample_size` is null. Networks of texts
      take other sizes as well, in pixels of the latents: 64 for images of 512.
      None: the card's
      or, for DDPM, such that attention is at 16x16.
    num_heads: the number of heads of a `.pt` network; None: the card's, as for
      the next five arguments.
    num_head_channels: the channels of each head, instead of their number.
    use_new_attention_order: the order of attention's channels in a network of
      guided-diffusion, which names and shapes do not tell.
    diffusion_steps: T.
    noise_schedule: "linear" or "cosine".
    rescale_timesteps: whether the network was fed with t * 1000 / T. The
      denoiser's own times are training steps either way.
    null_label: the null label of a class-conditional network, the label that
      stands for no class; None: the one that the card or file tells, if any.
    guidance_scale: see `Denoiser`; needs a null label.
    prediction: what a SavedModel, a Keras file or weights with a preset
      predict: "eps", "x0", "v" or "score". The arguments from here to
      `num_classes` are for these only. `conventions.Convention` explains this
      one, and those from `process` to `time_offset`.
    schedule: the process that the network was trained for: a schedule, or the
      arguments of `make_schedule` by name. EDM's weights take it as well, for
      other sigmas than their own: "geometric" or "sigmas".
    image_shape: (H, W, C), needed if the inputs of a SavedModel or a Keras file
      do not tell.
    process: "vp" or "ve".
    time_input: "step", "sigma" or "log_sigma".
    time_scale: a factor of the times that the network is fed with.
    time_offset: it is added to those times.
    signature: the signature of a SavedModel, if there is a choice.
    num_classes: the number of classes of a SavedModel or a Keras file that
      takes labels too.
    image_mean: the mean of the images that a SavedModel or a Keras file was
      trained on, which were standardised; see `decoder.Standardised`. A number
      or one for each channel, of images in [-1, 1]; None: 0, or no change.
    image_std: their deviation; None: 1, or no change.
    conditions: the path of a table of conditions, `.npz`, for a network of texts
      (`table.ConditionTable.load`). A Keras file must then map [x_t, t,
      *conditions], with conditions in the table's order.
    prompts: texts that the model itself encodes to such a table, if it is one of
      KerasHub with its tokenizers. A text that is there twice is drawn twice as
      often.
    negative_prompt: the text of guidance, the table's last row; None: "".
    label_weights: how often each class is drawn: numbers, "uniform", or None: as
      the data set has them; see `Denoiser`.
    preset: the architecture of a `.weights.h5` file: a name of
      `presets.PRESETS`, such as "ddpm-cifar10-32", or the path of a JSON file,
      which has the fields of `unet.UNetConfig` or is a card of EDM.
    learned_variance: whether a `.pt` or a diffusers file whose network predicts a
      variance keeps it, for DDPM at many steps (`solvers.VARIANCES`). Few-step
      samplers bring their own noise scales. The weights' hash differs.
    dtype_policy: what the network computes in, one of `precision.POLICIES`;
      None: as it was saved, which is float32 for all that we convert.
    cache_dir: the folder that keeps converted checkpoints in our own format,
      each by the hash of its files, so that PyTorch, for example, is needed
      only once; None: see `cache.default_cache_dir`; "": they are not kept.

  Returns:
    The denoiser, frozen.

  Raises:
    UserError: nothing is at the path, or not a format that we read; the
      architecture has a switch that we do not implement; a file is truncated or
      mismatched; the file itself answers an argument. In one line.
  """
  arguments = {
      "image_size": image_size, "num_heads": num_heads,
      "num_head_channels": num_head_channels,
      "use_new_attention_order": use_new_attention_order,
      "diffusion_steps": diffusion_steps, "noise_schedule": noise_schedule,
      "rescale_timesteps": rescale_timesteps,
      "prediction": prediction, "schedule": schedule,
      "image_shape": image_shape, "process": process, "time_input": time_input,
      "time_scale": time_scale, "time_offset": time_offset,
      "signature": signature, "num_classes": num_classes, "preset": preset,
      "image_mean": image_mean, "image_std": image_std,
      "learned_variance": learned_variance or None,
      "prompts": prompts, "negative_prompt": negative_prompt,
  }
  if prompts is not None and conditions is not None:
    raise UserError("conditions must not be given with prompts, which make such "
                    f"a table. Received: {conditions!r}")
  if image_size is not None:
    arguments["image_size"] = diffusers.side_or_sides(image_size)
    if arguments["image_size"] is None:
      raise UserError("image_size must be a whole number, or (height, width). "
                      f"Received: {image_size!r}")
  table = None if conditions is None else ConditionTable.load(conditions)
  denoiser = _load(
      storage.expanded(path), {key: value for key, value in arguments.items()
             if value is not None},
      cache_lib.default_cache_dir() if cache_dir is None else storage.expanded(cache_dir),
      table)
  if dtype_policy is not None:
    denoiser = denoiser.with_policy(dtype_policy)
  try:
    if table is not None:
      denoiser = denoiser.with_table(table)
    if label_weights is not None:
      denoiser = denoiser.with_label_weights(label_weights)
    if null_label is None and guidance_scale is None:
      return denoiser
    return denoiser.guided(guidance_scale, null_label)
  except ValueError as error:
    raise UserError(f"load_denoiser: {error}") from error


class Format(NamedTuple):
  """A format of denoisers.

  Attributes:
    name: what messages call it.
    recognises: whether a path is of this format.
    read: a function of a path, and of those `arguments` that were given, to a
      `Denoiser`.
    arguments: names of the arguments of `load_denoiser` that it takes.
    kept: whether what was read is kept in the cache of converted models.
  """
  name: str
  recognises: Callable[[str], bool]
  read: Callable[[str, dict], Denoiser]
  arguments: tuple[str, ...] = ()
  kept: bool = False


def register_format(name: str, recognises: Callable[[str], bool],
                    arguments: tuple[str, ...] = ()) -> Callable:
  """Adds a format of denoisers, which `load_denoiser` asks before its own.

    @ddss_tf.register_format("mine", lambda path: path.endswith(".mine"))
    def read_mine(path, given):
      return ddss_tf.Denoiser(model, schedule)

  Args:
    name: what messages call it.
    recognises: whether a path is of this format.
    arguments: names of the arguments of `load_denoiser` that it takes. All
      others are refused.

  Returns:
    A decorator of the function that reads a path. That function takes the path
    and a dict of those arguments that were given, and returns a `Denoiser`.

  Raises:
    ValueError: the name is taken.
  """
  def register(read):
    known = _registered.get(name)
    if name in (each.name for each in _FORMATS) or known is not None and (
        fingerprint.definition(known.read) != fingerprint.definition(read)):
      raise ValueError(f"a format's name must be new. Received: {name!r}")
    _registered[name] = Format(name, recognises, read, tuple(arguments))
    return read

  return register


def find_format(path: str) -> Format | None:
  """The format of a path; None if it is of no format that is known."""
  return next((known for known in (*_registered.values(), *_FORMATS)
               if known.recognises(path)), None)


def _load(path: str, given: dict, cache_dir: str,
          table: ConditionTable | None) -> Denoiser:
  """Finds out what a path is, and reads it; see `load_denoiser`."""
  found = find_format(path)
  if found is None:
    raise _unknown(path)
  _check_given(path, given, found.arguments)
  if found.read is _load_foreign and table is not None:
    # Such a network does not tell that its inputs are conditions.
    return _load_foreign(path, given, table.names)
  if not found.kept:
    return found.read(path, given)
  if keras_weights.is_weights(path):
    # The key of the cache must cover what a preset's name or file stands for.
    given = keras_weights.read_card(path, given)
  name = os.path.basename(os.path.normpath(path))
  for suffix in (openai.SUFFIX, keras_weights.SUFFIX,
                 *diffusers.SUFFIXES, *edm.SUFFIXES):
    name = name.removesuffix(suffix)
  denoiser = cache_lib.cached(cache_dir, path, given, found.read)
  denoiser.name = name
  return denoiser


def _unknown(path: str) -> UserError:
  """The error for a path that is of no known format."""
  if not storage.isdir(path):
    return UserError(
        "denoiser path must be a folder, a checkpoint prefix, a .pt, "
        ".safetensors or .bin file, a .keras file, weights of Keras "
        "(.weights.h5 with a preset), weights of EDM (.npz or .safetensors "
        "with a card) or "
        f"the name of an embedded model ({', '.join(embedded_denoisers())}). "
        f"Received: {path!r}")
  return UserError(
      f"denoiser folder must hold {own.CARD} (ours), "
      f"{diffusers.CONFIG} (diffusers, KerasHub), saved_model.pb or a TensorFlow "
      f"checkpoint (*.index). Received: {path!r} with "
      f"{sorted(storage.listdir(path))}")


def _check_given(path, given, allowed):
  """Refuses arguments that the file itself answers."""
  for key, value in given.items():
    if key in keras_hub.PROMPTS and key not in allowed:
      raise UserError(
          f"{key} must be given only for a model of KerasHub, which can encode "
          "it. tools/encode_prompts.py makes a table of prompts for "
          f"load_denoiser.conditions. Received: {key}={value!r} for {path!r}")
  cards.check_given(path, given, allowed)


def embedded_denoisers() -> list[str]:
  """Names of the models that come with the package."""
  return sorted(
      name for name in storage.listdir(_ASSETS)
      if storage.exists(os.path.join(_ASSETS, name, own.CARD)))


def _own_folder(path: str) -> str:
  """The folder of a model in our own format, an embedded one by its name."""
  if not storage.exists(path) and os.sep not in path:
    return os.path.join(_ASSETS, path)
  return path


def _is_own(path: str) -> bool:
  return storage.exists(os.path.join(_own_folder(path), own.CARD))


def _load_own(path: str, given: dict) -> Denoiser:
  del given
  return Denoiser.load(_own_folder(path))


def _is_foreign(path: str) -> bool:
  return saved_model.is_keras_file(path) or saved_model.is_saved_model(path)


def _is_openai(path: str) -> bool:
  return path.endswith(openai.SUFFIX) and storage.isfile(path)


def _is_ddpm(path: str) -> bool:
  return ddpm.find_prefix(path) is not None


def _convert_ddpm(path: str, given: dict) -> Denoiser:
  """Reads a checkpoint of the original DDPM; all have the same schedule."""
  prefix = ddpm.find_prefix(path)
  weights = ddpm.read_weights(prefix)
  image_size = given.get("image_size")
  model = ddpm.convert(prefix, weights, image_size)
  return converted.converted(
      "DDPM", model, ddpm.infer_config(weights, image_size),
      NoiseSchedule.linear())


def _convert_openai(path: str, given: dict) -> Denoiser:
  """Reads a state dict of improved-diffusion or guided-diffusion."""
  # The card first: its faults are cheaper to find.
  given = dict(given)
  keep_variance = given.pop("learned_variance", False)
  card = openai.read_card(path, given)
  betas = openai.betas(card)
  weights = tensors.read_state_dict(path)
  model = openai.convert(path, weights, card, keep_variance)
  # The weights are in our order of attention's channels by now, so their hash
  # covers use_new_attention_order.
  return converted.converted(
      "improved- or guided-diffusion", model,
      openai.infer_config(weights, card, keep_variance), NoiseSchedule(betas),
      "x0" if card["predict_xstart"] else "eps")


def _convert_edm(path: str, given: dict) -> Denoiser:
  """Reads weights of EDM, whose network is of a variance-exploding process."""
  config, schedule = edm.read_card(path)
  if "schedule" in given:
    schedule = edm.read_schedule(path, given["schedule"])
  model = edm.convert(path, edm.read_weights(path), config)
  return converted.converted("EDM", model, config, schedule)


def _convert_weights(path: str, card: dict) -> Denoiser:
  """Reads weights of Keras; see `keras_weights.read_card` for the card."""
  model = keras_weights.convert(path, card["config"])
  try:
    return converted.converted(
        "weights of Keras", model, card["config"], card["schedule"],
        card["prediction"], card["null_label"], **card["convention"])
  except ValueError as error:
    raise UserError(f"{path}: {error}") from error


def _load_foreign(path: str, given: dict,
                  conditions: tuple[str, ...] | None = None) -> Denoiser:
  """Reads a SavedModel or a Keras file, and tries it."""
  card = cards.read_card(path, given)
  name = os.path.basename(os.path.normpath(path))
  told = dict(card["convention"])
  if saved_model.is_keras_file(path):
    name = name.removesuffix(saved_model.KERAS_SUFFIX)
    if card["signature"] is not None:
      raise UserError("signature must not be given for a Keras file. Received: "
                      f"{card['signature']!r}")
    model = network_files.load_keras(path)
    sha256 = denoiser_lib.weights_sha256(model)
    # This hash is of weights only. That of a SavedModel covers its graph.
    told["architecture"] = fingerprint.text_sha256(
        network_files.graph_text(model))
  else:
    if conditions:
      raise UserError(f"conditions must not be given for {path!r}, a SavedModel: "
                      "save its network as a Keras file. "
                      f"Received: {', '.join(conditions)}")
    model = saved_model.SavedModelNetwork(
        path, card["signature"], card["image_shape"], card["num_classes"])
    sha256 = model.sha256
  sha256 = converted.told_sha256(
      sha256, card["prediction"], card["schedule"], told, card["num_classes"])
  try:
    denoiser = Denoiser(
        model, card["schedule"], card["prediction"], name,
        card["num_classes"], null_label=card["null_label"],
        image_shape=card["image_shape"], sha256=sha256, conditions=conditions,
        **card["convention"])
  except ValueError as error:
    raise UserError(f"{path}: {error}") from error
  if not saved_model.check(denoiser, path):
    denoiser.continuous_time = False
  standard = {name: card[f"image_{name}"] for name in ("mean", "std")
              if card[f"image_{name}"] is not None}
  if not standard:
    return denoiser
  return denoiser.with_decoder(
      Standardised(denoiser.state_shape, **standard))


# Our formats, in the order in which they are tried on a path.
_FORMATS = (
    Format("own", _is_own, _load_own),
    Format("keras hub", keras_hub.is_keras_hub, keras_hub.convert,
           keras_hub.ARGUMENTS),
    Format("saved model or keras file", _is_foreign, _load_foreign,
           cards.CARD_KEYS),
    Format("edm", edm.is_edm, _convert_edm, ("schedule",), kept=True),
    Format("keras weights", keras_weights.is_weights, _convert_weights,
           keras_weights.CARD_KEYS, kept=True),
    Format("openai", _is_openai, _convert_openai, _OPENAI_KEYS, kept=True),
    Format("latent pipeline", pipelines.is_latent, pipelines.convert,
           ("image_size", "learned_variance"), kept=True),
    *(Format(*network, kept=True) for network in pipelines.NETWORKS),
    Format("diffusers", diffusers.is_diffusers, pipelines.convert_unet,
           ("image_size", "learned_variance"), kept=True),
    Format("ddpm", _is_ddpm, _convert_ddpm, ("image_size",), kept=True),
)
_registered = {}  # Formats from outside, by name.
