"""A search that is killed again and again; run by `killed_test.py`.

Usage: killed_search.py FOLDER KILLS

Leaves two run directories. FOLDER/whole has a search and an evaluation that
nobody disturbed. FOLDER/killed has one that SIGKILL ended KILLS times at random
moments between its first step and its last, five times before its first step,
and five times when the search was over. Prints how many of the KILLS came
during the search.
"""

import functools
import os
import random
import signal
import statistics
import sys
import time

# These modules are imported once. Every attempt is forked from this process, in
# which TensorFlow has not started yet.
import ddss_tf
from ddss_tf.samplers import families
from ddss_tf.searching import loop
from ddss_tf.evaluation import evaluate as evaluate_lib  # pylint: disable=unused-import
from ddss_tf.exporting import export as export_lib  # pylint: disable=unused-import
from ddss_tf.reporting import comparison  # pylint: disable=unused-import
import gaussian_parts
import numpy as np


def work(run):
  """A search of many small steps, and an evaluation."""
  parts = gaussian_parts.make()
  ddss_tf.search(
      run_dir=run, **parts, num_search_steps=80, batch_size=16, pool_samples=80,
      validation_samples=64, validate_every=4, checkpoint_every=3, log_every=1,
      jit_compile=False, sampler=functools.partial(
          families.make_sampler, family="ggdm+pred+time", num_steps=2,
          init="ddpm"))
  ddss_tf.evaluate(
      run, **parts, num_samples=40, jit_compile=False, baselines=[
          functools.partial(families.make_sampler, family=name, num_steps=2)
          for name in ("ddim", "ddpm")])


def fork(run):
  """Starts `work` in a process of its own.

  Returns:
    Its number, and a pipe that gives a byte when a step begins.
  """
  steps, told = os.pipe()
  child = os.fork()
  if child:
    os.close(told)
    return child, steps
  advance = loop.Search.advance

  def noted(self):
    os.write(told, b".")
    return advance(self)

  loop.Search.advance = noted
  try:
    work(run)
    os._exit(0)
  except BaseException as error:  # pylint: disable=broad-except
    print(repr(error), file=sys.stderr, flush=True)
    os._exit(1)


def ended(child, *statuses):
  _, status = os.waitpid(child, 0)
  assert status in statuses, status


def main(folder, kills):
  whole, killed = (os.path.join(folder, name) for name in ("whole", "killed"))
  moments = [time.monotonic()]
  child, steps = fork(whole)
  while os.read(steps, 1):
    moments.append(time.monotonic())
  ended(child, 0)
  moments.append(time.monotonic())
  # Seconds before the first step, of that step with its compilation, of each
  # other step, and after the last.
  start, first, *others, end = np.diff(moments)
  rng = random.Random(0)

  def kill(steps_begun, longest):
    """Kills an attempt up to `longest` seconds after its n-th step began.

    Returns:
      Whether it had begun so many steps, and its search was not over.
    """
    child, steps = fork(killed)
    begun = all(os.read(steps, 1) for _ in range(steps_begun))
    time.sleep(rng.uniform(0, longest))
    over = os.path.exists(os.path.join(killed, "sampler.json"))
    os.kill(child, signal.SIGKILL)
    ended(child, 0, signal.SIGKILL)
    os.close(steps)
    return begun and not over

  for _ in range(5):
    assert kill(0, start)
  # An attempt makes at most 5 steps, and every third is a checkpoint: so steps
  # are left for all attempts.
  inside = 0
  for _ in range(int(kills)):
    count = rng.randint(1, 5)
    inside += kill(count, first if count == 1 else statistics.median(others))
  after = 0
  while after < 5:
    after += not kill(0, start + end)
  ended(fork(killed)[0], 0)
  print(inside)


if __name__ == "__main__":
  main(*sys.argv[1:])
