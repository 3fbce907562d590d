"""Networks that were not made by this library."""

import keras
import tensorflow as tf


SHAPE = (4, 4, 1)


def write(folder, network, shape=(None, *SHAPE), time=((None,), tf.float32),
          names=("x", "t"), as_call=True):
  """Writes `network(x, t)` as a SavedModel; gives its path.

  The network is its `__call__`, or with `as_call` False the signature
  "denoise".
  """
  specs = [tf.TensorSpec(shape, tf.float32, names[0]),
           tf.TensorSpec(*time, names[1])]

  class Module(tf.Module):

    @tf.function(input_signature=specs)
    def __call__(self, x, t):
      return network(x, t) * self.gain

  class Named(tf.Module):
    pass

  module = Module() if as_call else Named()
  module.gain = tf.Variable(1.0)
  signatures = None if as_call else {"denoise": tf.function(
      lambda **k: {"eps": network(k[names[0]], k[names[1]]) * module.gain}
      ).get_concrete_function(**dict(zip(names, specs)))}
  tf.saved_model.save(module, str(folder), signatures=signatures)
  return str(folder)


def small_network(activation="silu"):
  """A convolutional network [x, t] -> eps that depends on t."""
  keras.backend.clear_session()  # So that layers get the same names each time.
  x, t = keras.Input((8, 8, 1)), keras.Input(())
  shift = keras.layers.Dense(4)(keras.layers.Reshape((1,))(t))
  h = keras.layers.Conv2D(4, 3, padding="same", activation=activation)(x)
  h = keras.layers.Add()([h, keras.layers.Reshape((1, 1, 4))(shift)])
  h = keras.layers.Conv2D(4, 3, padding="same", activation=activation)(h)
  return keras.Model([x, t], keras.layers.Conv2D(1, 3, padding="same")(h))
