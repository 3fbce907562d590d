"""A feature network: images to features and logits."""

import json

import keras
import numpy as np
import tensorflow as tf

from ddss_tf.features import hub
from ddss_tf.features import keras_models
from ddss_tf.runs import fingerprint
from ddss_tf.datasets.dataset import ImageDataset
from ddss_tf.denoisers.denoiser import Denoiser
from ddss_tf.errors import UserError, shape_text
from ddss_tf.features.preprocessing import Preprocessing

KEYS = ("pool", "logits")
# This is 22 images of Inception's size at a time, or 488 of 64x64.
_PIXELS_AT_A_TIME = 2_000_000


class FeatureNetwork:
  """A frozen classifier that gives features and logits, from two layers.

  Args:
    model: with one input, images [B, H, W, C]: a Keras model, or a
      `saved_models.SavedModelFeatures`.
    name: what results call it.
    pool_layer: the layer, or a SavedModel's output, whose values [B, D] are the
      features.
    logits_layer: the layer or output whose values [B, classes] are the logits; None:
      it has none, and there is no Inception score.
    preprocessing: from images in [-1, 1] to what the model takes.
    source: the protocol's first words.

  Attributes:
    model: what computes the pair of outputs.
    num_features: D.
    image_shape: (H, W, C) of the images it takes, None for any.
    protocol: in words, what happens to images before the network.
    batch_size: images at a time, so that a few GiB of memory suffice.
    key: hash of the weights, the architecture, the choice of layers and the
      preprocessing: equal keys give equal features.
    sha256: hash of the weights, which results record beside the protocol.
    embedded: whether it is one of those that come with the package.

  Raises:
    UserError: there is no such layer, its output has another rank, or the
      preprocessing does not fit the model.
  """

  def __init__(self, model, name: str = "features", pool_layer: str = "pool",
               logits_layer: str | None = "logits",
               preprocessing: Preprocessing = Preprocessing(),
               source: str = "keras model"):
    if isinstance(model, keras.Model):
      model = keras_models.KerasNetwork(model, name)
    self.name = name
    self.protocol = (
        f"{source}: images clipped to [-1, 1], {preprocessing}; features "
        f"{pool_layer}, {f'logits {logits_layer}' if logits_layer else 'no logits'}")
    self._preprocessing = preprocessing
    self._input_shape = model.input_shape
    if preprocessing.size is not None and not _fits(
        preprocessing.size, self._input_shape[:2]):
      raise UserError(
          f"features {name!r} must have images resized to "
          f"{self._input_shape[:2]}. Received: {preprocessing.size}")
    if not preprocessing.takes_channels(self._input_shape[2]):
      raise UserError(
          f"value_range {preprocessing.value_range!r} of features {name!r} must "
          "be of a network of 3 channels. Received: one of "
          f"{self._input_shape[2]}")
    self.image_shape = self._input_shape
    if preprocessing.size is not None:
      self.image_shape = (None, None, self._input_shape[2])
    self._function, self.model, self.num_features = model.select(
        pool_layer, logits_layer, preprocessing.size)
    height, width = preprocessing.size or (
        n or hub.INCEPTION_SIZE for n in self._input_shape[:2])
    self.batch_size = int(np.clip(
        _PIXELS_AT_A_TIME // (height * width), 1, 500))
    # The weights alone would not tell a network from the same one with
    # another activation, or from another layer of it.
    parts = [model.weights_sha256, pool_layer, logits_layer, model.graph]
    if preprocessing != Preprocessing():
      parts.append(str(preprocessing))
    self.key = fingerprint.text_sha256(json.dumps(parts))
    self.sha256 = model.weights_sha256
    self.embedded = False

  @property
  def identity(self) -> dict[str, str]:
    """How results name it: name, "sha256", "protocol".

    Networks from outside also have their `key`, because weights do not tell an
    activation. Those of the package are known by their weights.
    """
    told = {"name": self.name, "sha256": self.sha256, "protocol": self.protocol}
    return told if self.embedded else {**told, "key": self.key}

  def accepts(self, image_shape) -> bool:
    """Whether it takes images (H, W, C); None in it stands for any."""
    return _fits(
        self._preprocessing.output_shape(image_shape), self._input_shape
        ) and self._preprocessing.takes_channels(image_shape[2])

  def __repr__(self):
    return f"FeatureNetwork({self.name!r}, {self.protocol!r})"

  def __call__(self, images) -> dict[str, tf.Tensor]:
    """Features of a batch; differentiable with respect to the images.

    Args:
      images: float [B, H, W, C], meant in [-1, 1]. They are clipped to that
        range, as samplers overshoot it and image files cannot.

    Returns:
      {"pool": float32 [B, num_features], "logits": float32 [B, classes]}; "pool"
      alone without logits.

    Raises:
      UserError: images of another shape.
    """
    images = tf.cast(tf.convert_to_tensor(images), tf.float32)
    if images.shape.rank != 4 or not self.accepts(images.shape[1:]):
      raise UserError(
          f"images for the features {self.name!r} must have the shape "
          f"{shape_text((None, *self.image_shape))}. "
          f"Received: {shape_text(images.shape)}")
    images = self._preprocessing(tf.clip_by_value(images, -1.0, 1.0))
    return {key: tf.cast(value, tf.float32)
            for key, value in zip(KEYS, self._function(images))}


def as_networks(what: str, value, several: bool = True,
                optional: bool = False) -> list[FeatureNetwork]:
  """The feature networks of an argument that takes one or a list of them.

  Args:
    what: the argument's name, for the message.
    value: a network; a list or tuple of them; None.
    several: whether a list is allowed.
    optional: whether None, or an empty list, is allowed.

  Returns:
    The networks, in order.

  Raises:
    UserError: the argument is something else.
  """
  if optional and value is None:
    return []
  networks = [value]
  if several and isinstance(value, (list, tuple)):
    networks = list(value)
  strangers = [each for each in networks
               if not isinstance(each, FeatureNetwork)]
  if strangers or not (networks or optional):
    raise UserError(
        f"{what} must be {'a' if several else 'one'} feature network, as "
        f"load_features gives{', or a list of them' if several else ''}. "
        f"Received: {_described(strangers[0] if strangers else value)}")
  return networks


def _described(value) -> str:
  """An argument in a few words, for messages."""
  if isinstance(value, (list, tuple)) and value:
    return f"a {type(value).__name__} of {len(value)}"
  return repr(value)[:80]


def _fits(sizes, expected) -> bool:
  return tf.TensorShape(sizes).is_compatible_with(expected)


def check_shapes(denoiser: Denoiser, dataset: ImageDataset, *networks) -> None:
  """Checks that all parts speak of images of one shape.

  Raises:
    UserError: names the part that differs.
  """
  shape = denoiser.image_shape
  images = tuple(dataset.images.shape[1:])
  if images != shape == (*images[2:], *images[:2]):
    raise UserError(
        f"denoiser {denoiser.name!r} must take images [B, H, W, C], {images} of "
        f"the data set {dataset.name!r}. Received: {shape}, which seems to be "
        "[C, H, W]: put it between two layers keras.layers.Permute, (3, 1, 2) "
        "before it and (2, 3, 1) after it")
  others = [("data set", dataset.name, dataset.images.shape[1:])]
  others += [("feature network", network.name, network.image_shape)
             for network in networks if not network.accepts(shape)]
  for kind, name, other in others:
    if tuple(other) != shape:
      raise UserError(f"{kind} {name!r} must have the image shape {shape} of "
                      f"the denoiser {denoiser.name!r}. Received: {other}")


def check_features(features: FeatureNetwork, dataset: ImageDataset,
                   pool: np.ndarray) -> None:
  """Checks that a search can measure by the features of the data set.

  Args:
    features: the network.
    dataset: the images.
    pool: float32 [R, D], their features.

  Raises:
    UserError: features that are not finite, or the same for all images: their
      deviation is the unit of the search.
  """
  if not np.all(np.isfinite(pool)):
    raise UserError(f"features {features.name!r} of {dataset.name!r} must be "
                    "finite. Received: NaN or infinity")
  spread = np.sum(np.var(pool, axis=0, dtype=np.float64))
  size = np.sum(np.mean(pool, axis=0, dtype=np.float64) ** 2)
  # The last bits of an image's features depend on the size of its batch.
  if spread <= (4 * np.finfo(np.float32).eps) ** 2 * size:
    raise UserError(
        f"features {features.name!r} of {dataset.name!r} must differ: a search "
        f"measures by their deviation. Received: {len(pool)} images with the "
        "same features")
