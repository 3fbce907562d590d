"""How long the command line takes to answer.

  python -m benchmarks.start_up [--runs=3]

`--help` needs no TensorFlow; the demo's `--dry_run` builds everything. Their
yardsticks are a bare Python, and one that imports TensorFlow.
"""

import argparse
import os
import subprocess
import sys
import time

from benchmarks import records

COMMANDS = {
    "help": ["-m", "ddss_tf.main", "--help"],
    "dry_run": ["-m", "ddss_tf.main", "--dry_run",
                "--gin_file=gin_configs/demo.gin"],
    "python": ["-c", "pass"],
    "tensorflow": ["-c", "import tensorflow"],
}


def seconds(arguments: list[str]) -> float:
  start = time.perf_counter()
  subprocess.run(
      [sys.executable, *arguments], check=False, capture_output=True,
      cwd=os.path.dirname(os.path.dirname(records.RESULTS)))
  return time.perf_counter() - start


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--runs", type=int, default=3)
  runs = parser.parse_args().runs
  for arguments in COMMANDS.values():  # Fills caches of files and bytecode.
    seconds(arguments)
  taken = {name: [] for name in COMMANDS}
  for _ in range(runs):
    for name, arguments in COMMANDS.items():
      taken[name].append(seconds(arguments))
  records.keep([
      records.record("start_help", taken["help"], taken["python"], bound=1.0,
                     of="value", unit="s",
                     note="--help; yardstick: a bare Python"),
      records.record("start_dry_run", taken["dry_run"], taken["tensorflow"],
                     bound=15.0, of="value", unit="s",
                     note="--dry_run of the demo; yardstick: import "
                     "tensorflow")])


if __name__ == "__main__":
  main()
