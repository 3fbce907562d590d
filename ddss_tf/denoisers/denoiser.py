"""The frozen, pre-trained network, behind one boundary.

The rest of the package need not know a foreign model's architecture, what it
predicts, or how its times are scaled. It calls `eps(x_t, t)` or, if the network
is class-conditional, `eps(x_t, t, labels)`: NHWC, images in [-1, 1], `t` a
(fractional) index of a training step. What x_t holds are images, or the latents
of a latent diffusion model; `decode` makes images of either.
"""

import json
from typing import Callable, Sequence

import tensorflow as tf

from ddss_tf.denoisers import checks
from ddss_tf.denoisers import compiling
from ddss_tf.denoisers import conditions as conditions_lib
from ddss_tf.denoisers import conventions
from ddss_tf.denoisers import inputs as inputs_lib
from ddss_tf.networks import precision
from ddss_tf.runs import fingerprint
from ddss_tf.denoisers.decoder import Decoder, Standardised
from ddss_tf.denoisers.table import ConditionTable
from ddss_tf.errors import UserError, check_number, check_whole, shape_text
from ddss_tf.schedules import NoiseSchedule

PREDICTIONS = conventions.PREDICTIONS


class Denoiser(checks.Checks, compiling.Compiled, conditions_lib.Conditional):
  """A frozen network with the process it was trained for.

  Args:
    model: maps `[x_t, t]`, float [B, H, W, C] and float [B], to the prediction
      [B, H, W, C]; a class-conditional one `[x_t, t, labels]`, labels int [B].
      A functional Keras model may take them in another order, other shapes or
      as integers (see `inputs.adapted`). If it gives 2 C channels, the last C
      are taken for a learned variance and left out, because samplers bring
      their own. If it was loaded or built under `frozen.frozen_variables()`,
      a search is cheaper by a third.
    schedule: its forward process.
    prediction: "eps", "x0", "v", "score", "flow" or "flow_reversed", see
      `conventions.Convention`.
    name: what results call it.
    num_classes: the number of classes, given exactly if the model is
      class-conditional.
    guidance_scale: the scale of classifier-free guidance (Ho and Salimans 2022,
      https://arxiv.org/abs/2207.12598), s in eps(null) + s (eps(label) -
      eps(null)). 1 is without guidance, 0 unconditional. It takes two network
      calls, made as one of twice the batch. None: no guidance, one call.
    null_label: the label that stands for no class. The network was trained with
      it to be unconditional. It is never drawn.
    image_shape: (H, W, C) of what the model takes, needed if the model has no
      `input_shape`.
    decoder: makes images of what the model takes, which then are latents or
      standardised images; None: the model takes images in [-1, 1].
    sha256: hash, if not that of the weights.
    continuous_time: whether fractional times mean something to the network;
      None: they do unless it takes integers.
    architecture: what is known of the network's architecture, for `inspect`:
      "format" and "kind", then numbers and words by name, as JSON has them.
    conditions: names of the inputs of a network that takes more than a label,
      such as ("context", "pooled"): the model maps [x_t, t, *conditions]. Then
      `num_classes` and `null_label` are those of the table. None: those of the
      table, if there is one.
    table: the rows of these inputs, see `table.ConditionTable`. A label is a
      row. Without it the network can be looked at and saved, but not sampled.
    label_weights: how often each class is drawn, `num_classes` numbers in any
      unit; "uniform": all but the null class as often; None: not told, so as a
      data set has them, see `for_dataset`. A table has its own.
    **convention: the other arguments of `conventions.Convention`, for networks
      of another process or another clock: process, time_input, time_scale,
      time_offset.

  Attributes:
    convention: how the network is called and read.
    state_shape: (H, W, C) of what the network takes and the chain walks in.
    image_shape: (H, W, C) of the images that `decode` gives. Without a decoder
      it is the state's.
    decoder: the `Decoder` or `Standardised`, or None.
    continuous_time: False if times are rounded to integers, or have no
      gradient. They cannot be learned then; all else works.
    sha256: hash of all weights; None if there are none. If `load_denoiser` read
      the network from another format than ours, the hash also covers its
      architecture, prediction and schedule, which weights do not tell.
    dtype_policy: what the network computes in, see `precision`.
    label_weights: how often each class is drawn, float64 [num_classes] of sum 1;
      None: all but the null class as often.
    told_weights: the argument `label_weights`: an array like that, "uniform" or
      None.
    key: `sha256`, or a hash that also covers what else decides the images, if
      any of it is not the default: convention, null label, guidance scale,
      `dtype_policy`, decoder, table and the classes' weights.

  Raises:
    ValueError: the prediction or another word of the convention is unknown; the
      image shape is missing or not the model's; `num_classes` does not fit the
      model; guidance is without a null label, or of an unconditional network; a
      value is not the number that it must be.
  """

  def __init__(self, model, schedule: NoiseSchedule, prediction: str = "eps",
               name: str = "denoiser", num_classes: int | None = None,
               guidance_scale: float | None = None,
               null_label: int | None = None, *,
               image_shape: tuple[int, int, int] | None = None,
               sha256: str | None = None, continuous_time: bool | None = None,
               architecture: dict | None = None,
               decoder: Decoder | Standardised | None = None,
               conditions: Sequence[str] | None = None,
               table: ConditionTable | None = None,
               label_weights: Sequence[float] | str | None = None, **convention):
    self.convention = conventions.Convention(prediction, **convention)
    told_classes = dict(num_classes=num_classes, null_label=null_label)
    self.table = table
    self.conditions = tuple(conditions or (table.names if table else ()))
    if self.conditions:
      model = inputs_lib.conditional(model, self.conditions)
      num_classes, null_label, label_weights = conditions_lib.of_table(
          self.conditions, table, num_classes, null_label, label_weights)
    check_whole("num_classes", num_classes, 1, optional=True)
    check_whole("null_label", null_label, 0, optional=True)
    if guidance_scale is not None:
      check_number("guidance_scale", guidance_scale)
    if not self.conditions:
      model = inputs_lib.adapted(model, num_classes)
    self.model = model
    checks.check_classes(model, num_classes, null_label, guidance_scale,
                         self.conditions)
    self.num_classes = num_classes
    self.guidance_scale = guidance_scale
    self.null_label = null_label
    self.told_weights = (label_weights if self.conditions else
                         conditions_lib.told_weights(label_weights, num_classes, null_label))
    self.label_weights = (
        None if isinstance(self.told_weights, str) else self.told_weights)
    self.schedule = schedule
    self.prediction = prediction
    self.name = name
    self.state_shape = inputs_lib.state_shape(model, image_shape)
    self.decoder = decoder
    if decoder is not None and decoder.state_shape != self.state_shape:
      raise ValueError(
          f"the decoder must take latents {shape_text(self.state_shape)}, as the "
          f"network does. Received: {shape_text(decoder.state_shape)}")
    self.image_shape = (
        self.state_shape if decoder is None else decoder.image_shape)
    if continuous_time is None:
      continuous_time = inputs_lib.is_continuous(model)
    self.continuous_time = continuous_time
    self.architecture = dict(architecture or {})
    self.sha256 = weights_sha256(model) if sha256 is None else sha256
    self.dtype_policy = precision.policy(model)
    self.key = self.sha256
    rest = [self._told()] if self._told() else []
    if self._images():
      rest.append(self._images())
    if rest:
      self.key = fingerprint.text_sha256(
          json.dumps([self.sha256, *rest], sort_keys=True))
    self._compiled = {}
    self._told_rest = dict(
        image_shape=self.state_shape, sha256=self.sha256, decoder=decoder,
        continuous_time=self.continuous_time, architecture=self.architecture,
        conditions=self.conditions or None, table=table,
        label_weights=None if self.conditions else self.told_weights,
        **told_classes, **convention)

  def __repr__(self):
    parts = [repr(self.name), shape_text(self.state_shape),
             f"prediction={self.prediction!r}", repr(self.schedule)]
    if self.num_classes is not None:
      parts.append(f"num_classes={self.num_classes}")
    if self.sha256:
      parts.append(f"sha256={self.sha256[:8]}")
    return f"{type(self).__name__}({', '.join(parts)})"

  def guided(self, guidance_scale: float | None = None,
             null_label: int | None = None) -> "Denoiser":
    """The same network with other guidance.

    Args:
      guidance_scale: see the class; None: as it is.
      null_label: see the class; None: as it is.

    Raises:
      ValueError: see the class.
    """
    changes = {} if null_label is None else {"null_label": null_label}
    return self._again(
        self.model,
        self.guidance_scale if guidance_scale is None else guidance_scale,
        **changes)

  def with_decoder(
      self, decoder: Decoder | Standardised | None) -> "Denoiser":
    """The same network with another decoder, or without one.

    Raises:
      ValueError: the decoder does not take the network's latents.
    """
    return self._again(self.model, self.guidance_scale, decoder=decoder)

  def with_table(self, table: ConditionTable) -> "Denoiser":
    """The same network with another table of conditions.

    Raises:
      ValueError: the network takes no conditions, or not those of the table.
    """
    if not self.conditions:
      raise ValueError(f"{self.name!r} takes no conditions beside a class. "
                       f"Received: a table of {', '.join(table.names)}")
    return self._again(self.model, self.guidance_scale, table=table)

  def with_label_weights(self, weights: Sequence[float] | str | None) -> "Denoiser":
    """The same network, whose classes are drawn as often as told.

    Args:
      weights: see `label_weights` of the class.

    Raises:
      ValueError: see the class.
    """
    return self._again(self.model, self.guidance_scale, label_weights=weights)

  def with_policy(self, dtype_policy: str) -> "Denoiser":
    """The same weights in another number format; this object stays as it is.

    Args:
      dtype_policy: one of `precision.POLICIES`.

    Raises:
      UserError: see `precision.with_policy`.
    """
    return self._again(precision.with_policy(self.model, dtype_policy),
                       self.guidance_scale)

  def _again(self, model, guidance_scale, **changes):
    return Denoiser(
        model, self.schedule, self.prediction, self.name,
        guidance_scale=guidance_scale, **{**self._told_rest, **changes})

  @property
  def identity(self) -> dict:
    """How results name it: "name", "sha256", and what else `key` covers."""
    return {"name": self.name, "sha256": self.sha256, **self._told()}

  @property
  def setting(self) -> dict:
    """`identity`, and what else decides the images.

    That is the decoder, the table and how often classes are drawn. A sampler
    belongs to a network whichever it has, so cards hold the identity alone. Its
    images do not, so records of measurements hold this.
    """
    return {**self.identity, **self._images()}

  def _images(self) -> dict:
    """What decides the images, but not whether a sampler is valid."""
    images = {}
    if self.decoder is not None:
      images["decoder"] = self.decoder.sha256
    if self.table is not None:
      images["conditions"] = self.table.sha256
    elif self.label_weights is not None:
      images["label_weights"] = fingerprint.arrays_sha256([self.label_weights])
    return images

  def _told(self) -> dict:
    """What decides the images beside weights and coefficients."""
    # The null row of a table is the table's own.
    told = {"guidance_scale": self.guidance_scale,
            "null_label": None if self.conditions else self.null_label}
    told = {name: value for name, value in told.items() if value is not None}
    if self.dtype_policy != precision.FLOAT32:
      told["dtype_policy"] = self.dtype_policy
    return {**told, **self.convention.non_default()}

  def network(self, x: tf.Tensor, t: tf.Tensor,
              labels: tf.Tensor | tuple | None = None) -> tf.Tensor:
    """The raw prediction, in the network's own units (`self.convention`).

    Args:
      x: float [B, H, W, C].
      t: float [B], or a scalar for all of them; training steps in [0, T - 1]
        unless the network has another clock.
      labels: int [B], or a scalar for all of them, in [0, num_classes - 1];
        None exactly if the network is unconditional. Labels that are symbolic,
        inside a `tf.function`, are not checked. If the network has `conditions`,
        they may be these themselves, as a tuple of float [B, ...].

    Returns:
      float32 [B, H, W, C].

    Raises:
      UserError: the model gives another shape.
      ValueError: labels are missing, must not be given, are not whole numbers
        or out of range.
    """
    return self._parts(x, t, self.told_to(labels, tf.shape(x)[0]))[0]

  def _parts(self, x, t, told) -> list[tf.Tensor]:
    """The prediction, and what tells of a variance, float32 [B, H, W, C]."""
    x = tf.convert_to_tensor(x, tf.float32)
    t = tf.convert_to_tensor(t, tf.float32)
    if t.shape.rank == 0:
      t = tf.repeat(t[None], tf.shape(x)[0])
    inputs = [x, t, *told]
    # training=False: no dropout, or rematerialisation would redraw its mask.
    output = self.model(inputs, training=False)
    parts = [tf.cast(part, tf.float32) for part in self._taken_apart(output)]
    # A SavedModel may not tell its output's shape.
    return [part if part.shape == x.shape else tf.ensure_shape(part, x.shape)
            for part in parts]

  def _taken_apart(self, output):
    """Splits [B, H, W, 2 C] in two. All else, also untold, gives the first C."""
    *size, channels = self.state_shape
    if not any(output.shape.is_compatible_with((None, *size, c))
               for c in (channels, 2 * channels)):
      raise UserError(
          f"denoiser {self.name!r} must give "
          f"{shape_text((None, *self.state_shape))}, or {2 * channels} "
          "channels with a learned variance. Received: "
          f"{shape_text(output.shape)}")
    parts = [output[..., :channels]]
    if output.shape[-1] == 2 * channels:
      parts.append(output[..., channels:])
    return parts

  def eps(self, x_t: tf.Tensor, t: tf.Tensor, labels: tf.Tensor | None = None,
          guidance: tf.Tensor | None = None) -> tf.Tensor:
    """The predicted noise [B, H, W, C], whatever the network predicts.

    Args:
      x_t: float [B, H, W, C] of the variance-preserving process.
      t: float [B], or a scalar for all of them, in [0, T - 1].
      labels: see `network`.
      guidance: float [B], or a scalar, differentiable: the guidance scale in
        place of `guidance_scale`; it needs a null label.

    Raises:
      ValueError: guidance without a null label.
    """
    x_t = tf.convert_to_tensor(x_t, tf.float32)
    t = tf.convert_to_tensor(t, tf.float32)
    return self.convention.eps(
        self.schedule, x_t, t, self._predicted(x_t, t, labels, guidance))

  def output(self, x_t: tf.Tensor, t: tf.Tensor,
             labels: tf.Tensor | None = None,
             guidance: tf.Tensor | None = None) -> tf.Tensor:
    """What a chain with the coefficients of `for_chain` is fed with.

    It is the prediction itself if the network predicts x0 or v, v if it predicts
    the velocity of a flow, else `eps`. The arguments are those of `eps`.
    """
    x_t = tf.convert_to_tensor(x_t, tf.float32)
    t = tf.convert_to_tensor(t, tf.float32)
    return self.convention.output(
        self.schedule, x_t, t, self._predicted(x_t, t, labels, guidance))

  def output_and_variance(
      self, x_t: tf.Tensor, t: tf.Tensor, labels: tf.Tensor | None = None
  ) -> tuple[tf.Tensor, tf.Tensor]:
    """`output`, and the exponent of the learned variance.

    The exponent v says where the noise scale of a pixel lies between the least,
    0, and the largest, 1 (Nichol and Dhariwal 2021, equation 15); a network
    predicts 2 v - 1. It may leave [0, 1].

    Args:
      x_t, t, labels: see `eps`.

    Returns:
      Two float32 [B, H, W, C].

    Raises:
      UserError: the network predicts no variance, or it has guidance.
    """
    if self.guidance_scale is not None:
      raise UserError("a learned variance must be used without guidance. "
                      f"Received: guidance_scale={self.guidance_scale}")
    x_t = tf.convert_to_tensor(x_t, tf.float32)
    t = tf.convert_to_tensor(t, tf.float32)
    prediction, *rest = self._parts(
        *self.convention.inputs(self.schedule, x_t, t),
        self.told_to(labels, tf.shape(x_t)[0]))
    if not rest:
      raise UserError(
          f"denoiser {self.name!r} must predict a variance. The readers of "
          "checkpoints keep it with load_denoiser.learned_variance = True, where "
          "there is one. Received: a network without")
    prediction = self.convention.output(self.schedule, x_t, t, prediction)
    return prediction, 0.5 * rest[0] + 0.5

  def for_chain(self, coefficients):
    """A sampler's `Coefficients` for a chain of `output` instead of `eps`.

    See `conventions.Convention.of_prediction`.
    """
    return self.convention.of_prediction(self.schedule, coefficients)

  def _predicted(self, x_t, t, labels, guidance):
    """The prediction, with `guidance` or else `guidance_scale`, if either."""
    if guidance is not None and self.null_label is None:
      raise ValueError(f"guidance needs a null_label, which {self.name!r} has "
                       "none of")
    x, time = self.convention.inputs(self.schedule, x_t, t)
    if guidance is None:
      guidance = self.guidance_scale
    return (self.network(x, time, labels) if guidance is None else
            self._guided(x, time, labels, guidance))

  def _guided(self, x_t, t, labels, scale):
    """The prediction with guidance, in the form that is written for eps.

    It is right for every kind of prediction: they are affine in each other.
    """
    batch_size = tf.shape(x_t)[0]
    t = tf.convert_to_tensor(t, tf.float32)
    if t.shape.rank == 0:
      t = tf.repeat(t[None], batch_size)
    told = self.told_to(labels, batch_size)
    null = self.told_to(self.null_labels(labels, batch_size), batch_size)
    given, free = tf.split(self._parts(
        tf.concat([x_t, x_t], axis=0), tf.concat([t, t], axis=0),
        [tf.concat(pair, axis=0) for pair in zip(told, null, strict=True)]
    )[0], 2)
    scale = tf.convert_to_tensor(scale, tf.float32)
    if scale.shape.rank:
      scale = scale[:, None, None, None]
    return free + scale * (given - free)

  def decode(self, states: tf.Tensor) -> tf.Tensor:
    """The images of clean states.

    Args:
      states: float32 [B, *state_shape].

    Returns:
      float32 [B, *image_shape], nominally in [-1, 1]; without a decoder, the
      states.
    """
    return states if self.decoder is None else self.decoder(states)

  @property
  def tracked(self) -> list:
    """What a SavedModel that calls this denoiser must hold."""
    tracked = getattr(self.model, "tracked", None)
    tracked = tracked or [variable.value for variable in self.model.variables]
    return [*tracked,
            *(() if self.decoder is None else self.decoder.variables),
            *(() if self.table is None else self.table.variables)]

  def save(self, path: str) -> None:
    """Writes our own format, see `formats.own.save`."""
    from ddss_tf.formats import own  # pylint: disable=g-import-not-at-top
    own.save(self, path)

  @classmethod
  def load(cls, folder: str) -> "Denoiser":
    """Reads our own format, see `formats.own.load`."""
    from ddss_tf.formats import own  # pylint: disable=g-import-not-at-top
    return own.load(folder)



def weights_sha256(model) -> str | None:
  """SHA-256 of a model's weights, in order; None if it has none."""
  weights = model.get_weights()
  return fingerprint.arrays_sha256(weights) if weights else None


def with_labels(eps_fn: Callable, labels: tf.Tensor | None) -> Callable:
  """A class-conditional network with the samples' classes filled in.

  Args:
    eps_fn: (x_t [B, H, W, C], t [B], labels [B]) -> [B, H, W, C]; it may take
      a guidance scale [B] as well.
    labels: int32 [B]; None leaves an unconditional `eps_fn` as it is.

  Returns:
    (x_t, t) -> [B, H, W, C], or (x_t, t, guidance).
  """
  if labels is None:
    return eps_fn
  return lambda x_t, t, *guidance: eps_fn(x_t, t, labels, *guidance)
