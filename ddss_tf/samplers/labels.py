"""What samplers are called in tables, and into which group they fall."""

import re

from ddss_tf.samplers import solvers
from ddss_tf.samplers.strides import FLOW_STRIDES, STRIDES

LABELS = {
    "ddpm": "DDPM", "ddim": "DDIM", "dpm++2m": "DPM-Solver++(2M)",
    "dpm++3m": "DPM-Solver++(3M)", "dpm++3m-exact": "DPM-Solver++(3M, exact)",
    "deis2": "DEIS-2", "deis3": "DEIS-3", "ab2": "AB-2", "ab3": "AB-3",
    "ipndm": "iPNDM", "pndm": "PNDM", "unipc2-bh1": "UniPC-2 (bh1)",
    "unipc2-bh2": "UniPC-2 (bh2)", "unipc3-bh1": "UniPC-3 (bh1)",
    "unipc3-bh2": "UniPC-3 (bh2)", "heun": "Heun", "ddim-learned": "learned DDIM",
    "vars": "VARS", "rddim": "RDDIM", "ggdm": "GGDM",
}
GIVEN_TIMES = "given times"
VARIANCES = {"fixed_large": "fixed-large variance",
             "learned": "learned variance"}
_MANY_STEPS = re.compile(r"DDPM \((full chain|\d+ of \d+ steps)[,)]")
REAL_IMAGES = "real images"
# What tables and pictures compare with each other.
BASELINES = "DDPM and DDIM"
TRAINING_FREE = "training-free solvers"
SEARCHED = "searched"


def full_chain(num_steps: int, total: int, variance: str) -> str:
  """The label of DDPM at many steps, see `sampler.full_chain`."""
  steps = "full chain" if num_steps == total else (
      f"{num_steps} of {total} steps")
  told = f", {VARIANCES[variance]}" if variance in VARIANCES else ""
  return f"DDPM ({steps}{told})"


def is_full_chain(label: str) -> bool:
  """Whether a label is one that `full_chain` gives."""
  return bool(_MANY_STEPS.match(label))


def without_stride(label: str) -> str:
  """A label without its stride: what one solver is called at every K."""
  for stride in (*STRIDES, *FLOW_STRIDES, GIVEN_TIMES):
    if label.endswith(f" {stride}"):
      return label.removesuffix(f" {stride}")
  return label


def group(label: str) -> str:
  """Which of the three groups a label belongs to.

  Any label that is neither DDPM, DDIM nor a training-free solver belongs to a
  searched sampler. Records and cards hold labels only, so the group must be
  read from the label; this is the only place that does so.
  """
  name = without_stride(label)
  if (name in (LABELS["ddpm"], LABELS["ddim"]) or is_full_chain(name)
      or name.startswith("DDIM(eta=") or any(
          name == f"{LABELS['ddpm']} ({told})" for told in VARIANCES.values())):
    return BASELINES
  if name in (LABELS[solver] for solver in solvers.ALL_SOLVERS):
    return TRAINING_FREE
  return SEARCHED
