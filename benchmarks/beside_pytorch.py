"""Calls, search steps and sampling beside PyTorch, on the same weights.

  python -m benchmarks.beside_pytorch --pytorch=PYTHON [--runs=3]
    [--models=digits,cifar10]

PYTHON is a Python with the packages of requirements-pytorch.txt. The two sides
take turns, `--runs` times, each in a process of its own. Within a process the
median of three timings counts.
"""

import argparse
import statistics
import sys
import tempfile

from benchmarks import records

# By network: the batches of a call; (batch, K) of a step; the batches of
# sampling.
CALLS = {"cifar10": (1, 8, 32), "digits": (1, 64)}
STEPS = {"cifar10": (8, 5), "digits": (64, 5)}
SAMPLED = {"cifar10": (1,), "digits": (1, 64)}
NUM_STEPS = 10
REPEATS = 3


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--pytorch", default=sys.executable)
  parser.add_argument("--runs", type=int, default=3)
  parser.add_argument("--models", default="digits,cifar10")
  parser.add_argument("--parts", default="forward,step,sample")
  arguments = parser.parse_args()

  def both(part, folder, **words):
    """[(ours, theirs)] of paired runs."""
    flags = [f"--{key}={value}" for key, value in words.items()]
    flags.append(f"--runs={REPEATS}")
    pairs = []
    for _ in range(arguments.runs):
      pairs.append((
          records.part("benchmarks.tensorflow_side", part, folder, *flags),
          records.script(arguments.pytorch, "pytorch_side.py", part, folder,
                         *flags)))
      print(part, words, pairs[-1], file=sys.stderr)
    return pairs

  def medians(pairs, side, key):
    return [statistics.median(pair[side][key]) for pair in pairs]

  for model in arguments.models.split(","):
    with tempfile.TemporaryDirectory() as folder:
      records.script(arguments.pytorch, "pytorch_side.py", "save", folder,
                     f"--model={model}")
      if "forward" in arguments.parts:
        for batch in CALLS[model]:
          pairs = both("forward", folder, batch_size=batch)
          records.keep([records.record(
              f"{name}_{model}_batch{batch}_{kind}",
              medians(pairs, 0, f"{name}_{kind}"), medians(pairs, 1, name),
              bound=0.85, of="ratio", unit="s",
              note=f"{words} of {model}, batch {batch}, {kind}; yardstick: "
              "diffusers in PyTorch")
                        for name, words in (
                            ("forward", "a call"),
                            ("backward", "a call and its gradient in the "
                             "images (ours: and times)"))
                        for kind in ("xla", "graph")])
      if "step" in arguments.parts:
        batch, steps = STEPS[model]
        pairs = both("step", folder, batch_size=batch, num_steps=steps)
        note = (f"a step of {batch}, {model}, K = {steps}; yardstick: PyTorch "
                "with torch.utils.checkpoint")
        records.keep([
            records.record(
                f"step_{model}", medians(pairs, 0, "step"),
                medians(pairs, 1, "seconds"), bound=0.8, of="ratio", unit="s",
                note=note),
            records.record(
                f"step_memory_{model}",
                [pair[0]["gib"] - pair[0]["before"] for pair in pairs],
                [pair[1]["gib"] - pair[1]["before"] for pair in pairs],
                bound=1.0, of="ratio", unit="GiB",
                note="peak above the process with its network; " + note)])
      if "sample" in arguments.parts:
        for batch in SAMPLED[model]:
          pairs = both("sample", folder, batch_size=batch, num_steps=NUM_STEPS)
          records.keep([
              *(records.record(
                  f"sample_{model}_batch{batch}_{kind}",
                  medians(pairs, 0, key), medians(pairs, 1, "seconds"),
                  bound=0.7, of="ratio", unit="s",
                  note=f"exported DDIM, K = {NUM_STEPS}, {kind}; yardstick: "
                  "diffusers' pipeline")
                for kind, key in (("xla", "exported_xla"),
                                  ("graph", "exported"))),
              records.record(
                  f"sample_{model}_batch{batch}_loop",
                  medians(pairs, 0, "exported"), medians(pairs, 0, "python"),
                  bound=1.0, of="ratio", unit="s",
                  note="exported DDIM; yardstick: our chain, eagerly")])


if __name__ == "__main__":
  main()
