"""A search that is killed again and again; run by `killed_test.py`.

Usage: killed_search.py FOLDER KILLS

Leaves FOLDER/whole, of a search and an evaluation that nobody disturbed, and
FOLDER/killed, of one that SIGKILL ended KILLS times; prints how many of the
kills came before the search had ended.
"""

import functools
import os
import random
import signal
import sys
import time

# Imported once: every attempt is a process forked from this one, in which
# TensorFlow has not started yet.
import ddss_tf
from ddss_tf import evaluation  # pylint: disable=unused-import
from ddss_tf import exporting  # pylint: disable=unused-import
from ddss_tf import families
from ddss_tf import figures  # pylint: disable=unused-import
from ddss_tf import searching  # pylint: disable=unused-import
import gaussian_parts


def work(run):
  """A search of many small steps, and an evaluation."""
  parts = gaussian_parts.make()
  ddss_tf.search(
      run, **parts, num_search_steps=80, batch_size=16, pool_samples=80,
      validation_samples=64, validate_every=4, checkpoint_every=3, log_every=1,
      jit_compile=False, sampler=functools.partial(
          families.make_sampler, family="ggdm+pred+time", num_steps=2,
          init="ddpm"))
  ddss_tf.evaluate(
      run, **parts, num_samples=40, jit_compile=False, baselines=[
          functools.partial(families.make_sampler, family=name, num_steps=2)
          for name in ("ddim", "ddpm")])


def fork(run):
  """Starts `work` in a process of its own; gives its number."""
  child = os.fork()
  if child:
    return child
  try:
    work(run)
    os._exit(0)
  except BaseException as error:  # pylint: disable=broad-except
    print(repr(error), file=sys.stderr, flush=True)
    os._exit(1)


def main(folder, kills):
  whole, killed = (os.path.join(folder, name) for name in ("whole", "killed"))
  began = time.monotonic()
  child = fork(whole)
  while not os.path.isdir(os.path.join(whole, "tensorboard")):
    time.sleep(0.01)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
  start = time.monotonic() - began  # Until the first step.
  assert os.waitpid(child, 0)[1] == 0
  duration = time.monotonic() - began
  # So that an attempt brings the search on by a part of it.
  longest = start + 0.3 * (duration - start)
  rng = random.Random(0)
  inside = 0
  for _ in range(int(kills)):
    child = fork(killed)
    time.sleep(rng.uniform(0, longest))
    inside += not os.path.exists(os.path.join(killed, "sampler.json"))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
  assert os.waitpid(fork(killed), 0)[1] == 0
  print(inside)


if __name__ == "__main__":
  main(*sys.argv[1:])
