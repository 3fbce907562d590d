"""Work spread over devices: every replica makes a share of the samples.

Everything that makes or looks at images goes through `replicated` or `row_wise`
and so through the strategy in force (`tf.distribute.get_strategy()`).
TensorFlow's default strategy has one replica, whose work is that of a plain
`tf.function`.

An image depends on its seed and its index only. So a share is a range of
indices, and the images are the same whatever the number of replicas. A distance
between sets of images is not a mean over replicas. Instead, all rows are
gathered, and each replica computes the value of the whole and pulls the
gradient of its own rows back. The sum over replicas is the gradient. (A mean
would be too small by their number; reducing the gradients of local values would
be biased.)

With several worker processes, each runs the same program on a share of the
replicas. What they read from disk, and what one of them alone is told, must be
the same for all of them or be agreed on (`everyones`). Otherwise they would
wait for each other for ever. Only the chief writes (`is_chief`).
"""

import concurrent.futures
import contextlib
import functools
import json
import os
from typing import Callable, Iterator, Sequence

from absl import logging
import gin
import tensorflow as tf

from ddss_tf.errors import UserError, WorkerLost

STRATEGIES = ("none", "mirrored", "multi_worker", "tpu")


@gin.configurable
def make_strategy(name: str = "none", devices: Sequence[str] | None = None,
                  tpu: str = "") -> tf.distribute.Strategy:
  """The strategy of a run, chosen by one line of gin.

  Args:
    name: "none", one device; "mirrored", `tf.distribute.MirroredStrategy` over
      the devices of this machine; "multi_worker",
      `tf.distribute.MultiWorkerMirroredStrategy` over the processes that the
      environment variable TF_CONFIG names, each of which is given the same
      command and a run_dir that all can read; "tpu",
      `tf.distribute.TPUStrategy`.
    devices: the devices of "mirrored", such as ["GPU:0", "GPU:1"]; all GPUs if
      None.
    tpu: address of the TPU; "" is the local one.

  Returns:
    A `tf.distribute.Strategy`. Networks must be loaded, and functions called,
    in its `scope()`.

  Raises:
    UserError: the name is unknown, a device or the TPU is not there, or
      TF_CONFIG is missing or cannot be right.
  """
  if name == "none":
    return tf.distribute.get_strategy()
  if name == "mirrored":
    known = [device.name.removeprefix("/device:") for device
             in tf.config.list_logical_devices()]
    for device in devices or ():
      if device not in known:
        raise UserError(f"make_strategy.devices must be among "
                        f"{', '.join(known)}. Received: {device!r}")
    return tf.distribute.MirroredStrategy(devices)
  if name == "multi_worker":
    return _multi_worker()
  if name == "tpu":
    try:
      resolver = tf.distribute.cluster_resolver.TPUClusterResolver.connect(tpu)
    except (ValueError, tf.errors.OpError) as error:
      raise UserError(f"make_strategy.tpu must be the address of a TPU. "
                      f"Received: {tpu!r} ({str(error).splitlines()[0]})"
                      ) from error
    return tf.distribute.TPUStrategy(resolver)
  raise UserError(f"make_strategy.name must be one of {', '.join(STRATEGIES)}. "
                  f"Received: {name!r}")


def _multi_worker():
  """The strategy of the workers of TF_CONFIG, once all of them are there."""
  text = os.environ.get("TF_CONFIG", "")
  try:
    config = json.loads(text)
    task = config["task"]
    addresses = config["cluster"][task["type"]]
    if task["type"] not in ("chief", "worker"):
      raise ValueError(f"no task may be {task['type']!r}")
    if not 0 <= int(task["index"]) < len(addresses):
      raise ValueError(f"no index {task['index']} among {addresses}")
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(
        'TF_CONFIG must be as {"cluster": {"worker": ["host:port", ...]}, '
        f'"task": {{"type": "worker", "index": 0}}}}. Received: {text!r} '
        f"({error!r})") from error
  try:
    return tf.distribute.MultiWorkerMirroredStrategy()
  except (RuntimeError, ValueError, tf.errors.OpError) as error:
    raise UserError(
        f"the workers of TF_CONFIG cannot be reached: "
        f"{' '.join(str(error).split())[:200]}. Received: {text!r}") from error


def _cluster():
  """The resolver of the workers; None if there is only one process."""
  strategy = tf.distribute.get_strategy()
  if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
    return strategy.cluster_resolver
  return None


def is_chief() -> bool:
  """Whether this process is the one that writes."""
  cluster = _cluster()
  if cluster is None or cluster.task_type == "chief":
    return True
  return cluster.task_id == 0 and "chief" not in cluster.cluster_spec().jobs


def everyones(value: float) -> list[float]:
  """The values of all workers, the chief's first; they wait for each other.

  The value of a worker with several replicas is in the list once for each.
  """
  if _cluster() is None:
    return [value]
  gather = _gather(tf.distribute.get_strategy())
  return gather(tf.constant([float(value)], tf.float64)).numpy().tolist()


@functools.lru_cache(maxsize=None)
def _gather(strategy):
  del strategy  # It is the one in force; the cache keeps a trace for each.
  # Collectives take the device from the operation that made their input.
  return replicated(lambda value: all_rows(tf.identity(value)))


@contextlib.contextmanager
def watched() -> Iterator[None]:
  """Turns TensorFlow's errors into one that says that another worker has ended.

  Raises:
    WorkerLost: another worker has ended while this one waited for it.
  """
  try:
    yield
  except (tf.errors.UnavailableError, tf.errors.AbortedError,
          tf.errors.CancelledError, tf.errors.DeadlineExceededError,
          tf.errors.InternalError) as error:
    if _cluster() is None:
      raise
    logging.info("%s", error)
    raise WorkerLost(
        "another worker of TF_CONFIG has ended; started again, all of them, "
        "the job goes on from its last checkpoint") from error


def outside(fn: Callable):
  """Calls a function where no strategy is in force, and gives its result."""
  # A scope is in force in its own thread only.
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    return pool.submit(fn).result()


def num_replicas() -> int:
  """The number of replicas of the strategy in force."""
  return tf.distribute.get_strategy().num_replicas_in_sync


def device_name() -> str:
  """What the replicas run on, such as "NVIDIA H200" or "2 CPU cores"."""
  gpus = tf.config.get_visible_devices("GPU")
  if not gpus:
    try:
      cores = len(os.sched_getaffinity(0))  # Those that the process may use.
    except (AttributeError, OSError):  # macOS and Windows do not tell.
      cores = os.cpu_count() or 1
    return f"{cores} CPU core{'s' if cores > 1 else ''}"
  name = tf.config.experimental.get_device_details(gpus[0]).get(
      "device_name", "GPU")
  return name if num_replicas() == 1 else f"{num_replicas()} x {name}"


def filled(count: int) -> int:
  """The least multiple of the number of replicas that is at least `count`."""
  return -(-count // num_replicas()) * num_replicas()


def replicated(fn: Callable) -> Callable:
  """Compiles a function that all replicas call with the same arguments.

  Inside, `own_rows`, `all_rows` and `total` tell what is the replica's own and
  what is everybody's. All replicas must return the same values. AutoGraph is
  off, because its translation of every function on the way is a good part of
  the time to trace. So control flow that depends on tensors must be
  TensorFlow's.

  Args:
    fn: a function of tensors, to tensors in any nest.

  Returns:
    A `tf.function`.
  """
  strategy = tf.distribute.get_strategy()

  @tf.function(autograph=False)
  def call(*args):
    result = strategy.run(fn, args)
    return tf.nest.map_structure(
        lambda value: strategy.experimental_local_results(value)[0], result)

  if strategy.num_replicas_in_sync == 1:
    return tf.function(fn, autograph=False)
  return call


def summed(fn: Callable) -> Callable:
  """Compiles a function to be called several times for the sum of its results.

  Every replica adds up its own results, and these sums are reduced once.

  Args:
    fn: as in `replicated`, but of the replica's own rows, and to one tensor.

  Returns:
    A function of a list of arguments, a tuple for each call.
  """
  strategy = tf.distribute.get_strategy()

  @tf.function(autograph=False)
  def own(*args):
    return strategy.run(fn, args)

  @tf.function(autograph=False)
  def reduced(*results):
    result = strategy.run(lambda *own: total(tf.add_n(own)), results)
    return strategy.experimental_local_results(result)[0]

  if strategy.num_replicas_in_sync == 1:
    own = tf.function(fn, autograph=False)
    return lambda calls: tf.add_n([own(*args) for args in calls])
  return lambda calls: reduced(*[own(*args) for args in calls])


def row_wise(fn: Callable) -> Callable:
  """Compiles a function of rows, such as a network; replicas share the rows.

  Args:
    fn: from tensors [B, ...] to tensors [B, ...] in any nest, each row by
      itself.

  Returns:
    A function of the same values, for any B.
  """
  if num_replicas() == 1:
    return tf.function(fn, autograph=False)
  shared = replicated(lambda *rows: tf.nest.map_structure(
      all_rows, fn(*map(own_rows, rows))))

  def filled_up(rows):
    rows = tf.convert_to_tensor(rows)
    missing = filled(rows.shape[0]) - rows.shape[0]
    return rows if not missing else tf.concat(
        [rows, tf.repeat(rows[-1:], missing, axis=0)], axis=0)

  def call(*rows):
    return tf.nest.map_structure(
        lambda values: values[:len(rows[0])], shared(*map(filled_up, rows)))

  return call


def own_rows(rows: tf.Tensor) -> tf.Tensor:
  """The share [B / replicas, ...] of this replica of rows [B, ...]."""
  context = tf.distribute.get_replica_context()
  if context.num_replicas_in_sync == 1:
    return rows
  share = rows.shape[0] // context.num_replicas_in_sync
  begin = tf.one_hot(0, rows.shape.rank, share, 0, dtype=tf.int32)
  return tf.slice(rows, begin * context.replica_id_in_sync_group,
                  [share, *rows.shape[1:]])


def all_rows(rows: tf.Tensor) -> tf.Tensor:
  """The rows of all replicas, [B, ...], from the [B / replicas, ...] of each."""
  context = tf.distribute.get_replica_context()
  if context.num_replicas_in_sync == 1:
    return rows
  count = rows.shape[0] * context.num_replicas_in_sync
  return tf.ensure_shape(
      context.all_gather(rows, axis=0), [count, *rows.shape[1:]])


def total(values: tf.Tensor) -> tf.Tensor:
  """The sum over replicas."""
  context = tf.distribute.get_replica_context()
  if context.num_replicas_in_sync == 1:
    return values
  return context.all_reduce(tf.distribute.ReduceOp.SUM, values)
