"""Estimated times of the paper's searches on 1, 8 and 64 accelerators.

  python -m benchmarks.scaling

Operations of one call of each network, bytes of its activations, the calls of a
step and the bytes sent are counted. The accelerator, and the part of its peak
that such networks reach, are assumed. So times are estimates; how they grow
with K, batch and replicas is not.
"""

import argparse
import dataclasses
import math

import tensorflow as tf

from ddss_tf import schedules
from ddss_tf.denoisers import denoiser as denoiser_lib
from ddss_tf.formats import presets
from ddss_tf.networks import unet
from ddss_tf.reporting import inspection
from ddss_tf.features.load import load_features
from ddss_tf.networks.frozen import frozen_variables

# The population and the steps of the recipes. They are recalled from the paper,
# with low confidence.
BATCH = 512
STEPS = 50_000
_FEATURES = 2048
# The paper's models of smaller images: the preset, and a micro-batch that fits
# into half of 80 GB. Half, because the share of activations that is held was
# measured on a CPU only.
_MODELS = {"CIFAR-10": ("ddpm-cifar10-32", 128),
           "ImageNet-64": ("improved-imagenet64", 64)}
_INCEPTION_SIZE = 299


@dataclasses.dataclass(frozen=True)
class Accelerator:
  """What is assumed of a device, by its maker's data sheet.

  Attributes:
    name: the name of the device.
    flops: peak operations a second, in the format that networks compute in.
    gib: memory, GiB.
    near: bytes a second from one device to the others of its machine.
    far: bytes a second between machines, for each device.
    machine: devices of one machine.
    latency: seconds of one message.
  """
  name: str
  flops: float
  gib: float
  near: float
  far: float
  machine: int
  latency: float


A100 = Accelerator("A100, TF32", 156e12, 80, 300e9, 25e9, 8, 2e-5)


@dataclasses.dataclass(frozen=True)
class Cost:
  """Operations and bytes of activations of a network's call for one image."""
  flops: float
  bytes: float


def flops(function, *specs) -> int:
  """Floating-point operations of a function, as TensorFlow counts them.

  Args:
    function: a function of tensors.
    *specs: specs of its arguments, with all sizes known.

  Returns:
    The number of multiplications and additions; each counts as one.
  """
  graph = tf.function(
      function, autograph=False).get_concrete_function(*specs).graph
  options = tf.compat.v1.profiler.ProfileOptionBuilder.float_operation()
  options["output"] = "none"
  return tf.compat.v1.profiler.profile(graph, options=options).total_float_ops


def network_cost(config: unet.UNetConfig) -> Cost:
  """The cost of a U-Net, built with random weights."""
  with frozen_variables():
    model = unet.build_unet(config)
  denoiser = denoiser_lib.Denoiser(
      model, schedules.NoiseSchedule.linear(),
      image_shape=(config.image_size, config.image_size, config.in_channels))
  return Cost(
      flops(denoiser.eps, tf.TensorSpec((1, *denoiser.image_shape)),
            tf.TensorSpec((1,))),
      inspection.activation_bytes(denoiser))


def inception_cost() -> Cost:
  """The cost of the feature network, taken from Keras's Inception v3."""
  features = load_features("keras:InceptionV3", weights=None)
  shape = (_INCEPTION_SIZE, _INCEPTION_SIZE, 3)
  return Cost(flops(lambda x: features(x)["pool"], tf.TensorSpec((1, *shape))),
              inspection.feature_bytes(features, shape))


@dataclasses.dataclass(frozen=True)
class Step:
  """The estimate of a search step on a number of replicas.

  Attributes:
    chains: images of one chain on each replica, the micro-batch.
    passes: 1; or 2 if the population takes several micro-batches.
    seconds: seconds of computing.
    gib: GiB of activations and states on each replica. Of the activations, the
      larger of two parts counts: all those of the feature network, or what a
      call of the denoiser and its gradient hold. The former are freed before
      the latter are made.
    sent_seconds: seconds of the feature gather and the gradient's reduction.
    sent_bytes: bytes that each replica receives.
  """
  chains: int
  passes: int
  seconds: float
  gib: float
  sent_seconds: float
  sent_bytes: float


def step(network: Cost, inception: Cost, num_steps: int, state_bytes: int,
         micro_batch: int, replicas: int, device: Accelerator,
         utilisation: float) -> Step:
  """Estimates a rematerialised step.

  A chain calls the network K times. Backpropagation repeats each call and takes
  its gradient in the inputs, which costs as many operations as a call, because
  no weight has a gradient. If a replica's share of the population is more than
  a micro-batch, the whole share is first sampled for its features (two passes).

  Args:
    network: the cost of one call.
    inception: the cost of the feature network for one image.
    num_steps: K.
    state_bytes: bytes of one image.
    micro_batch: the most images of one chain.
    replicas: the number of devices.
    device: the kind of device.
    utilisation: the part of its peak that networks reach, in (0, 1].

  Returns:
    The estimate.
  """
  share = BATCH // replicas
  chains = min(share, micro_batch)
  passes = 1 if chains == share else 2
  operations = share * (
      num_steps * network.flops * (3 if passes == 1 else 4)
      + inception.flops * (2 if passes == 1 else 3))
  parameters = num_steps * (num_steps + 1) / 2 + 5 * num_steps
  sent = 4 * (BATCH * _FEATURES + parameters) * (replicas - 1) / replicas
  bandwidth = device.near if replicas <= device.machine else device.far
  messages = 2 * math.ceil(math.log2(replicas)) if replicas > 1 else 0
  return Step(
      chains, passes, operations / (device.flops * utilisation),
      chains * (max(inspection.HELD_SHARE * network.bytes, inception.bytes)
                + 2 * num_steps * state_bytes) / 2**30,
      sent / bandwidth + messages * device.latency, sent)


def table(costs: dict[str, tuple[Cost, int, int]], inception: Cost,
          utilisation: float, device: Accelerator = A100) -> str:
  """A Markdown table of all settings.

  Args:
    costs: (cost of a call, bytes of an image, micro-batch) by model name.
    inception: see `step`.
    utilisation: see `step`.
    device: see `step`.
  """
  lines = ["| model | K | accelerators | images a chain | a step | received a "
           f"step, and its time | memory | {STEPS:,} steps |",
           "|---|---|---|---|---|---|---|---|"]
  for name, (cost, state_bytes, micro_batch) in costs.items():
    for num_steps in (5, 10, 25):
      for replicas in (1, 8, 64):
        found = step(cost, inception, num_steps, state_bytes, micro_batch,
                     replicas, device, utilisation)
        hours = STEPS * (found.seconds + found.sent_seconds) / 3600
        lines.append(
            f"| {name} | {num_steps} | {replicas} | {found.chains}"
            f"{', two passes' if found.passes == 2 else ''} | "
            f"{found.seconds:.3g} s | {found.sent_bytes / 2**20:.1f} MiB, "
            f"{1e3 * found.sent_seconds:.2f} ms | {found.gib:.1f} GiB | "
            f"{hours:,.1f} h |")
  return "\n".join(lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--utilisation", type=float, default=0.3)
  utilisation = parser.parse_args().utilisation
  costs = {}
  for name, (preset, micro_batch) in _MODELS.items():
    config = presets.PRESETS[preset]
    cost = network_cost(config)
    print(f"{name}: {cost.flops / 1e9:.1f} GFLOP and "
          f"{cost.bytes / 2**20:.0f} MiB of activations a call and image")
    costs[name] = (cost, 4 * config.image_size ** 2 * config.in_channels,
                   micro_batch)
  inception = inception_cost()
  print(f"Inception: {inception.flops / 1e9:.1f} GFLOP and "
        f"{inception.bytes / 2**20:.0f} MiB of activations an image")
  print(f"\n{A100.name}, {utilisation:g} of {A100.flops / 1e12:g} TFLOP/s\n")
  print(table(costs, inception, utilisation))


if __name__ == "__main__":
  main()
