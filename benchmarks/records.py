"""Measured figures beside their yardsticks, kept in `results.json`."""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys

from ddss_tf import storage

RESULTS = os.path.join(os.path.dirname(os.path.abspath(__file__)),
                       "results.json")


def peak_gib() -> float:
  """Largest resident memory of this process so far, GiB."""
  # Linux counts in KiB.
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def part(module: str, *arguments) -> dict:
  """Runs a part of a benchmark in a process of its own.

  So each part has its own memory peak, and no part gains from what another one
  compiled or cached.

  Args:
    module: a module that prints a JSON object as its last line.
    *arguments: the arguments of its command line.

  Returns:
    The object.

  Raises:
    RuntimeError: the part failed.
  """
  return _json_of([sys.executable, "-m", module, *map(str, arguments)])


def of_batch_sizes(module: str, about: str, measure, sizes) -> list[dict] | None:
  """Measures several batch sizes, each in a process of its own.

  Args:
    module: the benchmark that calls this, by its name.
    about: what its `--help` says.
    measure: function from a batch size to what was measured.
    sizes: the batch sizes.

  Returns:
    What was measured, in the order of `sizes`; None in such a process, which
    prints it.
  """
  parser = argparse.ArgumentParser(description=about)
  parser.add_argument("--batch_size", type=int)
  arguments = parser.parse_args()
  if arguments.batch_size:
    print(json.dumps(measure(arguments.batch_size)))
    return None
  measured = [part(module, f"--batch_size={size}") for size in sizes]
  print(*measured, file=sys.stderr)
  return measured


def script(python: str, name: str, *arguments) -> dict:
  """Does what `part` does, for a script of this folder and another Python."""
  return _json_of([python, os.path.join(os.path.dirname(RESULTS), name),
                   *map(str, arguments)])


def _json_of(command: list[str]) -> dict:
  done = subprocess.run(
      command, cwd=os.path.dirname(os.path.dirname(RESULTS)), text=True,
      check=False,
      env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "DDSS_TF_CACHE": ""},
      stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  if done.returncode:
    raise RuntimeError(f"{command}: {done.stderr[-2000:]}")
  return json.loads(done.stdout.strip().splitlines()[-1])


def record(name: str, values, yardsticks, *, bound: float | None, of: str, unit: str,
           note: str = "") -> dict:
  """A figure beside its yardstick, both medians of paired runs.

  Args:
    name: the name of the figure.
    values: the measured values, one per run.
    yardsticks: the values it is compared with, one per run; None: there are
      none, and a bound must be on the value.
    bound: the largest number that is accepted; None: any, as the figure is for
      information.
    of: "ratio" or "value": which of them the bound is on.
    unit: the unit of value and yardstick.
    note: what was measured, and what the yardstick is.

  Returns:
    A record of `results.json`.
  """
  value = statistics.median(values)
  yardstick = statistics.median(yardsticks) if yardsticks else None
  ratio = value / yardstick if yardstick else None
  return {
      "name": name, "value": value, "yardstick": yardstick, "ratio": ratio,
      "bound": bound, "bound_of": of,
      "holds": (None if bound is None else
                (ratio if of == "ratio" else value) <= bound),
      "unit": unit,
      "threads": len(os.sched_getaffinity(0)), "runs": len(values),
      "note": note, "machine": _machine()}


def _machine() -> str:
  """The processor's name, or its architecture where the name is not known."""
  try:
    with open("/proc/cpuinfo", encoding="utf-8") as f:
      found = [line.split(":", 1)[1].strip() for line in f
               if line.startswith("model name")]
  except OSError:
    found = []
  return found[0] if found else platform.machine()


def keep(records: list[dict]) -> None:
  """Puts records into `results.json`, in place of those of the same names."""
  known = []
  if os.path.exists(RESULTS):
    with open(RESULTS, encoding="utf-8") as f:
      known = json.load(f)
  names = {new["name"] for new in records}
  known = [old for old in known if old["name"] not in names] + records
  storage.write_json(RESULTS, sorted(known, key=lambda each: each["name"]))
  for new in records:
    print(json.dumps(new))
