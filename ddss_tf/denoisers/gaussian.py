"""The exact denoiser of Gaussian images, for tests and first steps."""

import keras

from ddss_tf import bindings
from ddss_tf.denoisers.denoiser import Denoiser
from ddss_tf.schedules import FlowSchedule, NoiseSchedule


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


@keras.saving.register_keras_serializable(package="ddss_tf")
class _GaussianFlow(keras.layers.Layer):
  """u of the exact denoiser of N(mean, std^2 I) data, of z and s of a flow."""

  def __init__(self, mean, std, **kwargs):
    super().__init__(**{**kwargs, "trainable": False})
    self.mean = mean
    self.std = std

  def call(self, z, s):
    s = s[:, None, None, None]
    own_variance = (1 - s) * self.std**2
    variance = (1 - s) * own_variance + s**2
    return (s - own_variance) * (z - (1 - s) * self.mean) / variance - self.mean

  def get_config(self):
    return {**super().get_config(), "mean": self.mean, "std": self.std}


@bindings.register
def gaussian_denoiser(image_shape: tuple[int, int, int] = (8, 8, 1),
                      mean: float = 0.0, std: float = 0.5,
                      schedule: NoiseSchedule | None = None) -> Denoiser:
  """The exact denoiser of a Gaussian data set: what tests measure against.

  For x_0 ~ N(mean, std^2 I),
  eps(x_t, t) = sigma_t (x_t - alpha_t mean) / (alpha_t^2 std^2 + sigma_t^2),
  and every sampler's output distribution is known in closed form. On a
  `FlowSchedule` the network is that of a flow: fed with z and s, it predicts

    u(z, s) = E[eps - x_0 | z]
            = (s - (1 - s) std^2) (z - (1 - s) mean) / ((1 - s)^2 std^2 + s^2)
              - mean,

  whose flow dz / ds = u ends, from eps, at mean + std eps.

  Args:
    image_shape: (H, W, C).
    mean: the mean of every pixel.
    std: the standard deviation of every pixel.
    schedule: forward process; linear betas, T = 1000, if None.

  Returns:
    A `Denoiser` without weights.
  """
  schedule = schedule or NoiseSchedule.linear()
  x_t = keras.Input(image_shape, name="x_t")
  t = keras.Input((), name="t")
  if isinstance(schedule, FlowSchedule):
    u = _GaussianFlow(mean, std, name="u")(x_t, t)
    return Denoiser(keras.Model([x_t, t], u), schedule, "flow", "gaussian",
                    process="flow", time_input="flow")
  eps = _GaussianEps(schedule.betas.tolist(), mean, std, name="eps")(x_t, t)
  return Denoiser(keras.Model([x_t, t], eps), schedule, name="gaussian")
