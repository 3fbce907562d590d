"""A network of one noise schedule, asked on another.

What matters to a network is the noise level of its input. The index of the
training step only tells it that level. So a network that was trained on one
variance-preserving process serves every other one, if it is told the step of
its own process that has the same log-SNR.
"""

import gin
import keras
import numpy as np
import tensorflow as tf

from ddss_tf import bindings
from ddss_tf import schedules
from ddss_tf.networks import frozen
from ddss_tf.runs import fingerprint
from ddss_tf.denoisers.denoiser import Denoiser
from ddss_tf.errors import UserError
from ddss_tf.schedules import NoiseSchedule


@keras.saving.register_keras_serializable(package="ddss_tf")
class Clock(keras.layers.Layer):
  """Tells a network's own time at a step of another schedule.

  Args:
    table: float [T], the network's input at each step; linear in between.
  """

  def __init__(self, table, **kwargs):
    super().__init__(**{**kwargs, "trainable": False})
    self.table = np.asarray(table, np.float64)

  def call(self, t: tf.Tensor) -> tf.Tensor:
    return schedules.interpolated(self.table, t)

  def compute_output_shape(self, input_shape):
    return input_shape

  def get_config(self):
    return {**super().get_config(), "table": self.table.tolist()}


@bindings.register
def on_schedule(denoiser: Denoiser = gin.REQUIRED,
                schedule: NoiseSchedule = gin.REQUIRED) -> Denoiser:
  """The same network behind another schedule, asked at equal log-SNR.

  Noise levels that the network's own schedule does not reach are answered by
  the nearest one that it does: its first or its last step.

  Args:
    denoiser: a denoiser whose network is a Keras model.
    schedule: the schedule to serve, of any number of steps.

  Returns:
    A denoiser with the weights of the given one. Its hash covers both
    schedules.

  Raises:
    UserError: the network is a SavedModel.
  """
  if not isinstance(denoiser.model, keras.Model):
    raise UserError(
        f"denoiser {denoiser.name!r} must be a Keras network to be asked on "
        "another schedule. Received: a SavedModel")
  own, convention = denoiser.schedule, denoiser.convention
  model, scale, offset = (
      denoiser.model, convention.time_scale, convention.time_offset)
  if convention.time_input == "step":
    steps = own.time_of_log_snr(
        schedule.log_snr(np.arange(schedule.num_train_steps)))
    names = ("x_t", "t", *(denoiser.conditions or ("labels",)))
    x, t, *labels = (keras.Input(value.shape[1:], dtype=value.dtype, name=name)
                     for value, name in zip(model.inputs, names))
    with frozen.frozen_variables():
      clock = Clock(scale * steps + offset, name="clock")
    model = keras.Model([x, t, *labels], model([x, clock(t), *labels]),
                        name=model.name)
    scale, offset = 1.0, 0.0
  classes = {} if denoiser.conditions else dict(
      num_classes=denoiser.num_classes, null_label=denoiser.null_label,
      label_weights=denoiser.told_weights)
  return Denoiser(
      model, schedule, denoiser.prediction, denoiser.name,
      guidance_scale=denoiser.guidance_scale, **classes,
      conditions=denoiser.conditions, table=denoiser.table,
      image_shape=denoiser.state_shape, decoder=denoiser.decoder,
      sha256=fingerprint.text_sha256(repr(
          [denoiser.sha256, own.card(), schedule.card()])),
      continuous_time=denoiser.continuous_time,
      architecture=denoiser.architecture, process=convention.process,
      time_input=convention.time_input, time_scale=scale, time_offset=offset)
