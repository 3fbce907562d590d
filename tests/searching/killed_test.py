"""A search that is killed at random moments ends as if it never had been."""

import glob
import json
import os
import subprocess
import sys

import pytest

from ddss_tf.runs import run_dir as run_dir_lib
from ddss_tf.samplers import card
from small_searches import events
import tensorflow as tf
from project import SUPPORT

FOLDER = SUPPORT


def scalars(run):
  """(step, tag, value) of the evaluation's events."""
  found = []
  for path in glob.glob(os.path.join(run, "tensorboard", "evaluate", "*")):
    for event in tf.compat.v1.train.summary_iterator(path):
      found += [(event.step, value.tag, value.tensor.SerializeToString())
                for value in event.summary.value]
  return sorted(found)


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
  done = subprocess.run(
      [sys.executable, os.path.join(FOLDER, "killed_search.py"), str(tmp_path),
       "30"], capture_output=True, text=True, check=False,
      env=dict(os.environ, PYTHONPATH=os.pathsep.join(
          [os.path.dirname(FOLDER), os.environ.get("PYTHONPATH", "")])))
  assert done.returncode == 0, done.stderr[-4000:]
  # Or it would not have been a search that was killed.
  assert int(done.stdout) == 30
  whole, killed = (str(tmp_path / name) for name in ("whole", "killed"))
  one, other = (card.read(os.path.join(run, "sampler.json"))
                for run in (whole, killed))
  assert one.coefficients.to_dict() == other.coefficients.to_dict()
  assert one.search["best_step"] == other.search["best_step"]
  assert len(events(whole)) > 80 * 3
  assert events(killed) == events(whole)
  assert len(events(whole, "pictures/*")) == 3
  assert events(killed, "pictures/*") == events(whole, "pictures/*")
  assert scalars(killed) == scalars(whole) and len(scalars(whole)) == 9
  records = []
  for run in (whole, killed):
    with open(os.path.join(run, run_dir_lib.METRICS)) as f:
      records.append(json.load(f))
  assert records[0] == records[1] and len(records[0]) == 3
