"""Recomputing a network's activations instead of keeping them."""

from typing import Callable

import tensorflow as tf


def rematerialise(eps_fn: Callable, jit_compile: bool = False) -> Callable:
  """Wraps a network call so that backpropagation recomputes its activations.

  Section 3.2 of the paper: all K states are kept (a non-Markovian sampler needs
  them anyway), but of the network nothing survives its call, so memory grows by
  one image per step instead of by one set of activations.

  Everything must be passed by position: `tf.recompute_grad` silently gives no
  gradient to tensors it does not see as arguments, and the learned times would
  stand still.

  Args:
    eps_fn: (x_t [B, H, W, C], t [B], ...) -> [B, H, W, C]; a `tf.function`,
      such as `Denoiser.compiled_eps` gives, is traced once and called K times,
      while a bare Python call would be traced anew at every step, forwards and
      backwards. Labels and a guidance scale may follow, as arguments of it:
      what `with_labels` returns is no `tf.function`.
    jit_compile: compile the recomputation and the gradient with XLA, as one
      function. `tf.recompute_grad` of a function that XLA compiles has the two
      compiled apart, with every activation handed over: a search step of the
      digits then takes half as long again.

  Returns:
    A function of the same signature, values and gradients; with `jit_compile`
    without those of weights, which are frozen. XLA may undo it all where it
    compiles the chain around it as well.
  """

  def is_float(value):
    return value.dtype.is_floating

  if not jit_compile:

    def plain(*inputs):

      def call(*floats):
        floats = iter(floats)
        return eps_fn(*(next(floats) if is_float(value) else value
                        for value in inputs))

      # Labels need no gradient: `tf.recompute_grad` would watch them.
      inputs = [tf.convert_to_tensor(value) for value in inputs]
      return tf.recompute_grad(call)(*filter(is_float, inputs))

    return plain

  # A compiled function inside of a compiled gradient may be compiled again at
  # every call, as if its arguments were constants: a concatenation's gradient
  # asks for shapes, which inside are not known beforehand.
  bare = getattr(eps_fn, "python_function", eps_fn)

  @tf.function(jit_compile=True, autograph=False)
  def pull_back(inputs, cotangent):
    floats = [value for value in inputs if is_float(value)]
    with tf.GradientTape() as tape:
      tape.watch(floats)
      eps = bare(*inputs)
    return tape.gradient(
        eps, floats, cotangent, unconnected_gradients="zero")

  @tf.custom_gradient
  def recomputed(*inputs):
    def gradient(cotangent, variables=()):
      pulled = iter(pull_back(inputs, cotangent))
      pulled = [next(pulled) if is_float(x) else None for x in inputs]
      # A SavedModel's weights may count as trainable; no gradient reaches them.
      return (pulled, [None] * len(variables)) if variables else pulled

    # Or a tape that does not know of this gradient would keep the activations.
    return eps_fn(*map(tf.stop_gradient, inputs)), gradient

  return lambda *inputs: recomputed(*map(tf.convert_to_tensor, inputs))
