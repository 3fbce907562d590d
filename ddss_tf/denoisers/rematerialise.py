"""Recomputing a network's activations instead of keeping them."""

from typing import Callable

import tensorflow as tf


def rematerialise(eps_fn: Callable, jit_compile: bool = False) -> Callable:
  """Wraps a network call so that backpropagation recomputes its activations.

  As in the paper (Watson et al. 2022), all K states are kept, which a
  non-Markovian sampler needs anyway, but nothing inside the network survives
  its call. So memory grows by one image per step instead of by one set of
  activations.

  Everything must be passed by position: `tf.recompute_grad` silently gives no
  gradient to tensors it does not see as arguments, and the learned times would
  stand still.

  Args:
    eps_fn: (x_t [B, H, W, C], t [B], ...) -> [B, H, W, C]. A `tf.function`,
      such as `Denoiser.compiled_eps` gives, is traced once and called K times;
      a plain Python function would be traced anew at every step, forwards and
      backwards. Labels and a guidance scale may follow as further arguments; do
      not fill labels in by `with_labels`, whose result is not a `tf.function`.
    jit_compile: compile the recomputation and the gradient with XLA, as one
      function. With `tf.recompute_grad`, XLA would compile the two apart and
      hand every activation over. A search step of the digits would then take
      half as long again.

  Returns:
    A function of the same signature, values and gradients. With `jit_compile`
    it gives no gradients of weights, which are frozen. XLA may undo the
    recomputation if it compiles the chain around it as well.
  """

  def is_float(value):
    return value.dtype.is_floating

  if not jit_compile:

    def plain(*inputs):

      def call(*floats):
        floats = iter(floats)
        return eps_fn(*(next(floats) if is_float(value) else value
                        for value in inputs))

      # `tf.recompute_grad` watches its arguments, and labels need no gradient.
      inputs = [tf.convert_to_tensor(value) for value in inputs]
      return tf.recompute_grad(call)(*filter(is_float, inputs))

    return plain

  # The function that is not compiled: a compiled one inside of a compiled
  # gradient may be compiled again at every call, as if its arguments were
  # constants, because a concatenation's gradient asks for shapes that are not
  # known inside beforehand.
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

    # Without `stop_gradient`, a tape that does not know of this gradient would
    # keep the activations.
    return eps_fn(*map(tf.stop_gradient, inputs)), gradient

  return lambda *inputs: recomputed(*map(tf.convert_to_tensor, inputs))
