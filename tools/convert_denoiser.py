"""Converts a checkpoint to our own format and proves that nothing changed.

  python tools/convert_denoiser.py SOURCE DESTINATION [--golden=golden.npz]

SOURCE is a path that `ddss_tf.load_denoiser` reads. The golden file holds `x`
[N, H, W, C], `t` [N] and `eps` [N, H, W, C], the outputs of the original
library. The tool exits with status 1 if the outputs of the converted network
differ from them by more than --tolerance.
"""

import os
import sys

from absl import app
from absl import flags
import numpy as np

import ddss_tf

_GOLDEN = flags.DEFINE_string(
    "golden", None, "npz of inputs and outputs; SOURCE/golden.npz if there.")
_TOLERANCE = flags.DEFINE_float("tolerance", 1e-4, "Largest difference.")


def main(argv):
  if len(argv) != 3:
    raise app.UsageError("expected SOURCE and DESTINATION")
  _, source, destination = argv
  ddss_tf.load_denoiser(source).save(destination)
  denoiser = ddss_tf.load_denoiser(destination)
  print(f"{denoiser.name}: {denoiser.model.count_params()} parameters, "
        f"SHA-256 {denoiser.sha256}")
  golden = _GOLDEN.value or os.path.join(source, "golden.npz")
  if not os.path.exists(golden):
    print("no golden outputs to compare with")
    return
  with np.load(golden) as arrays:
    outputs = denoiser.network(arrays["x"], arrays["t"]).numpy()
    difference = float(np.abs(outputs - arrays["eps"]).max())
  print(f"largest difference to {golden}: {difference:.3g}")
  if not difference <= _TOLERANCE.value:
    sys.exit(1)


if __name__ == "__main__":
  app.run(main)
