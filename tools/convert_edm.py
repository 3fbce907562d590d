"""Takes the weights out of a pickle of EDM (https://github.com/NVlabs/edm).

  pip install torch
  git clone https://github.com/NVlabs/edm
  PYTHONPATH=edm python tools/convert_edm.py \
    edm-cifar10-32x32-uncond-vp.pkl edm-cifar10.npz

Unpickling RUNS CODE THAT IS IN THE FILE: do it on a machine where that code can
do no harm, not where you search. The tensors of `ema` are written to
`edm-cifar10.npz`, and how the network was built to `edm-cifar10.npz.json`.
`ddss_tf.load_denoiser` reads both, and runs no code of theirs. They keep the
licence of the pickle.
"""

import json
import pickle
import sys

import numpy as np


def card(network) -> dict:
  """How a network was built.

  Args:
    network: a preconditioned network of EDM.

  Raises:
    ValueError: it was built with positional arguments.
  """
  words = json.loads(json.dumps(dict(network.init_kwargs)))
  if network.init_args:
    raise ValueError("the network must have been built with keywords only. "
                     f"Received: {network.init_args}")
  return {"class_name": type(network).__name__, "init_kwargs": words}


def tensors(network) -> dict[str, np.ndarray]:
  """Parameters and buffers by name, float32."""
  return {name: value.detach().cpu().float().numpy()
          for name, value in network.state_dict().items()}


def main(source: str, destination: str) -> None:
  if not destination.endswith(".npz"):
    sys.exit(f"the destination must end with .npz. Received: {destination!r}")
  with open(source, "rb") as f:
    network = pickle.load(f)["ema"]
  np.savez(destination, **tensors(network))
  with open(destination + ".json", "w") as f:
    json.dump(card(network), f, indent=1)
  print(f"{destination}: {card(network)}")


if __name__ == "__main__":
  if len(sys.argv) != 3:
    sys.exit("expected SOURCE.pkl and DESTINATION.npz")
  main(*sys.argv[1:])
