"""A search step beside its lower bound, and what grows with K.

  python -m benchmarks.search_step [--pytorch=PYTHON] [--runs=5]

A rematerialised step of K calls cannot take less than K (2 F + B). F is the
time of a bare call of the network at the same batch, B that of its bare
gradient in images and times, both with the faster of XLA and the plain graph.
The features, mean pixels, take no time. Memory and set-up are compared between
K = 5 and K = 25, each in a process of its own. `--pytorch` is a Python with the
packages of requirements-pytorch.txt: it writes the random weights.
"""

import argparse
import statistics
import sys
import tempfile

from benchmarks import records

BATCH, STEPS = 64, (5, 10, 25)
SIDE = "benchmarks.tensorflow_side"


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--pytorch", default=sys.executable)
  parser.add_argument("--runs", type=int, default=5)
  arguments = parser.parse_args()
  results = []
  with tempfile.TemporaryDirectory() as folder:
    records.script(arguments.pytorch, "pytorch_side.py", "save", folder,
                   "--model=digits")
    parts = {}
    for steps in STEPS:
      parts[steps] = part = records.part(
          SIDE, "step", folder, f"--batch_size={BATCH}",
          f"--num_steps={steps}", f"--runs={arguments.runs}")
      print(steps, part, file=sys.stderr)
      # `gradient` is F + B, so that K (2 F + B) = K (F + gradient).
      forward, gradient = (
          min((part[f"{name}_{kind}"] for kind in ("xla", "graph")),
              key=statistics.median) for name in ("forward", "gradient"))
      results.append(records.record(
          f"search_step_k{steps}", part["step"],
          [steps * (f + g) for f, g in zip(forward, gradient)], bound=1.1,
          of="ratio", unit="s",
          note=f"a step of {BATCH} digits; yardstick: K (2 F + B)"))
    keep = records.part(
        SIDE, "step", folder, f"--batch_size={BATCH}", "--num_steps=25",
        "--runs=1", "--keep")
  few, many = parts[STEPS[0]], parts[STEPS[-1]]
  note = f"K = {STEPS[-1]}; yardstick: K = {STEPS[0]}"

  def grown(part):
    return [part["gib"] - part["before"]]

  def set_up(part):
    return [part["set_up"] - statistics.median(part["step"])]

  results += [
      records.record("search_memory_of_k", grown(many), grown(few), bound=1.25,
                     of="ratio", unit="GiB",
                     note=f"above the idle process, {BATCH} digits, {note}"),
      records.record("search_memory_without_remat", grown(keep), grown(many),
                     bound=None, of="ratio", unit="GiB",
                     note=f"all activations kept, K = {STEPS[-1]}; yardstick: "
                     "rematerialised"),
      records.record("search_set_up_of_k", set_up(many), set_up(few),
                     bound=1.5, of="ratio", unit="s",
                     note=f"first step of {BATCH} digits less a later one, "
                     f"{note}"),
      records.record("search_set_up", set_up(many), None, bound=60.0,
                     of="value", unit="s",
                     note="first step less a later one, digits, K = 25"),
  ]
  records.keep(results)


if __name__ == "__main__":
  main()
