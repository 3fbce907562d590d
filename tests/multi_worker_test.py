"""Tests of one job in two worker processes, by the command line."""

import contextlib
import glob
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf

from ddss_tf.runs import run_dir as run_dir_lib
from ddss_tf.samplers import card
from project import ROOT

PARAMS = ("make_strategy.name = 'multi_worker'", "search.num_search_steps = 20")


def _free_addresses(count):
  with contextlib.ExitStack() as stack:
    sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
    for s in sockets:
      s.bind(("localhost", 0))
    return [f"localhost:{s.getsockname()[1]}" for s in sockets]


@contextlib.contextmanager
def job(config, runs, *params, mode="run"):
  """Two workers, the chief first; ended with the block."""
  addresses = _free_addresses(2)
  workers = []
  try:
    for index, run in enumerate(runs):
      environment = dict(os.environ, CUDA_VISIBLE_DEVICES="", TF_CONFIG=(
          json.dumps({"cluster": {"worker": addresses},
                      "task": {"type": "worker", "index": index}})))
      workers.append(subprocess.Popen(
          [sys.executable, "-m", "ddss_tf.main", f"--gin_file={config}",
           f"--run_dir={run}", f"--mode={mode}",
           *(f"--gin_param={param}" for param in (*PARAMS, *params))],
          cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
          stderr=subprocess.PIPE))
    yield workers
  finally:
    for worker in workers:
      worker.kill()
      worker.wait()


def completed(config, runs, *params, mode="run"):
  """What the workers of a job printed that went well."""
  with job(config, runs, *params, mode=mode) as workers:
    outputs = [worker.communicate(timeout=600) for worker in workers]
  for worker, (_, err) in zip(workers, outputs):
    assert worker.returncode == 0, err[-4000:]
  return [out for out, _ in outputs]


@pytest.fixture(scope="module")
def alone(main_in_process, gaussian_config, tmp_path_factory):
  """The run directory of the same search in one process."""
  run = str(tmp_path_factory.mktemp("alone") / "run")
  main_in_process([f"--gin_file={gaussian_config}", f"--run_dir={run}",
                   f"--gin_param={PARAMS[1]}", "--mode=search"])
  return run


def same_coefficients(run, alone):
  """The best ones, and, whichever step they are of, the last variables."""
  one, other = (card.read(os.path.join(folder, run_dir_lib.SAMPLER)).coefficients
                for folder in (run, alone))
  for name, value in other.arrays().items():
    np.testing.assert_allclose(
        one.arrays()[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
  last = [tf.train.load_checkpoint(
      os.path.join(folder, "checkpoints", "ckpt-20")) for folder in (run, alone)]
  names = [name for name in last[0].get_variable_to_shape_map()
           if name.startswith("variables/")]
  assert names
  for name in names:
    a, b = (values.get_tensor(name) for values in last)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_two_workers_find_what_one_process_does(
    gaussian_config, alone, tmp_path):
  # The other worker has a folder of its own, so that its writing would show.
  runs = [str(tmp_path / name) for name in ("chief", "other")]
  outputs = completed(gaussian_config, runs, mode="search")
  same_coefficients(runs[0], alone)
  assert len(glob.glob(os.path.join(runs[0], "tensorboard", "*.search"))) == 1
  assert os.path.exists(os.path.join(runs[0], "checkpoints", "ckpt-20.index"))
  assert not os.path.exists(runs[1])
  assert "sampler.json" in outputs[0] and not outputs[1]


@pytest.mark.slow
def test_all_stages(main_in_process, gaussian_config, alone, tmp_path):
  main_in_process([f"--gin_file={gaussian_config}", f"--run_dir={alone}",
                   f"--gin_param={PARAMS[1]}", "--mode=evaluate"])
  run = str(tmp_path / "run")
  completed(gaussian_config, [run, run])
  completed(gaussian_config, [run, run], mode="sample")
  same_coefficients(run, alone)
  found = []
  for folder in (run, alone):
    with open(os.path.join(folder, "metrics.json")) as f:
      found.append(json.load(f))
  assert len(found[0]) == len(found[1]) == 2
  for one, other in zip(*found):
    for name in ("fid", "kid", "inception_score"):
      np.testing.assert_allclose(one[name], other[name], rtol=1e-3, atol=1e-3)
  with np.load(os.path.join(run, "generated.npz")) as images:
    assert images["images"].shape == (5, 4, 4, 1)
  assert os.path.exists(os.path.join(run, "export", "saved_model.pb"))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_that_dies_ends_the_others(
    gaussian_config, alone, tmp_path, victim):
  run = str(tmp_path / "run")
  with job(gaussian_config, [run, run], mode="search") as workers:
    while not os.path.exists(os.path.join(run, "checkpoints", "ckpt-8.index")):
      assert all(worker.poll() is None for worker in workers)
      time.sleep(0.01)
    workers[victim].send_signal(signal.SIGKILL)
    died = time.monotonic()
    survivor = workers[1 - victim]
    _, err = survivor.communicate(timeout=120)
    assert time.monotonic() - died < 60
  lines = [line for line in err.splitlines() if line.startswith("error: ")]
  assert survivor.returncode == 1 and len(lines) == 1, err[-4000:]
  assert "another worker" in lines[0] and "Traceback" not in err
  assert not os.path.exists(os.path.join(run, "sampler.json"))
  completed(gaussian_config, [run, run], mode="search")
  same_coefficients(run, alone)
