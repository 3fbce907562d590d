"""A long search of the digits at K = 10: does it grow, does it slow down?

  python -m benchmarks.soak [--hours=2]

Runs the search of the full demo in a process of its own and ends it by SIGTERM,
as a cluster's scheduler would. Its resident memory is read every 10 s, its
TensorBoard events every minute, by TensorBoard's own reader. The first 10
minutes after its first step are warm-up. Of the time that remains, the first
quarter is compared with the last; of two hours, each is half an hour.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks import records

PARAMS = ["NUM_STEPS = 10", "search.num_search_steps = 1000000"]
WARM_UP = 600.0
_READ_MEMORY, _READ_EVENTS = 10.0, 60.0


def resident_gib(pid: int) -> float:
  """Resident memory of a process, GiB."""
  with open(f"/proc/{pid}/statm", encoding="utf-8") as f:
    return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30


def step_seconds(folder: str) -> list[tuple[float, float]]:
  """The steps as TensorBoard shows them: (Unix time, seconds a step) each."""
  # pylint: disable=g-import-not-at-top
  from tensorboard.backend.event_processing import event_accumulator
  from tensorboard.util import tensor_util
  if not os.path.isdir(folder):
    return []  # The search has not begun.
  events = event_accumulator.EventAccumulator(
      folder, size_guidance={event_accumulator.TENSORS: 0})
  events.Reload()
  tag = "search/seconds_per_step"
  if tag not in events.Tags()["tensors"]:
    return []
  return [(event.wall_time, float(tensor_util.make_ndarray(event.tensor_proto)))
          for event in events.Tensors(tag)]


def quarters(series: list[tuple[float, float]], begin: float,
             end: float) -> tuple[list[float], list[float]]:
  """Values of the first and of the last quarter of a period of time."""
  quarter = (end - begin) / 4
  return ([value for at, value in series if begin <= at < begin + quarter],
          [value for at, value in series if end - quarter <= at <= end])


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--hours", type=float, default=2.0)
  hours = parser.parse_args().hours
  root = os.path.dirname(os.path.dirname(records.RESULTS))
  memory, steps, unreadable, first_step = [], [], 0, None
  # If this process is ended from outside, the search ends with it.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
  with tempfile.TemporaryDirectory() as folder:
    log = os.path.join(folder, "log")
    with open(log, "w", encoding="utf-8") as f:
      process = subprocess.Popen(
          [sys.executable, "-m", "ddss_tf.main", "--mode=search",
           "--gin_file=gin_configs/demo_full.gin", f"--run_dir={folder}/run",
           *(f"--gin_param={param}" for param in PARAMS)],
          cwd=root, stdout=f, stderr=subprocess.STDOUT)
    try:
      next_events = time.time() + _READ_EVENTS
      while (first_step is None
             or time.time() < first_step + WARM_UP + hours * 3600):
        time.sleep(_READ_MEMORY)
        if process.poll() is not None:
          with open(log, encoding="utf-8") as f:
            raise RuntimeError(f"the search ended: {f.read()[-2000:]}")
        memory.append((time.time(), resident_gib(process.pid)))
        if time.time() < next_events:
          continue
        next_events = time.time() + _READ_EVENTS
        try:
          seen = step_seconds(os.path.join(folder, "run", "tensorboard"))
        except Exception as error:  # The reader may raise anything.
          unreadable += 1
          print("events could not be read:", error, file=sys.stderr)
          continue
        if len(seen) < len(steps):
          unreadable += 1
          print("events were lost", file=sys.stderr)
        steps = seen
        if steps and first_step is None:
          first_step = steps[0][0]
        print(f"{memory[-1][1]:.3f} GiB", steps[-1:], file=sys.stderr,
              flush=True)
      process.send_signal(signal.SIGTERM)
      process.wait(300)
    finally:
      process.kill()
      process.wait()

  end = memory[-1][0]
  early, late = quarters(memory, first_step + WARM_UP, end)
  before, after = quarters(steps, first_step + WARM_UP, end)
  note = (f"digits, K = 10, population of the demo, {hours:g} h after "
          f"{WARM_UP / 60:g} min of warm-up; ")
  records.keep([
      records.record(
          "soak_memory", [statistics.mean(late)], [statistics.mean(early)],
          bound=1.02, of="ratio", unit="GiB",
          note=note + "mean resident memory of the last quarter; yardstick: "
          "of the first"),
      records.record(
          "soak_step", [statistics.median(after)], [statistics.median(before)],
          bound=1.1, of="ratio", unit="s",
          note=note + f"median time of {len(after)} x 5 steps in the last "
          f"quarter; yardstick: of {len(before)} x 5 in the first"),
      records.record(
          "soak_tensorboard", [unreadable], None, bound=0, of="value",
          unit="times", note=note + f"how often TensorBoard's reader could not "
          f"read the events, or missed some; {len(steps)} points in the end")])


if __name__ == "__main__":
  main()
