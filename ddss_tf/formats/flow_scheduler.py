"""Reads the `scheduler_config.json` of a flow model in diffusers' layout.

A scheduler's file tells both the process, which belongs to the network, and how
to sample. Only the first is read, because our samplers bring the second.
`FlowMatchEulerDiscreteScheduler` is our ddim on the stride "flow-euler" or, with
dynamic shifting, "flow-dynamic"; `FlowMatchHeunDiscreteScheduler` is our heun.
Every key is honoured, known to concern sampling alone, or refused by name.
"""

from absl import logging

from ddss_tf import errors
from ddss_tf.formats import cards
from ddss_tf.formats import diffusers
from ddss_tf.samplers import flow
from ddss_tf.errors import UserError
from ddss_tf.schedules import FlowSchedule

# Keys of both kinds that say how to sample: which noise levels are visited, in
# which order of accuracy, with which noise.
_SAMPLING = {"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"}
_MATCHING = {
    "FlowMatchEulerDiscreteScheduler": {
        *_SAMPLING, "base_image_seq_len", "base_shift", "invert_sigmas",
        "max_image_seq_len", "max_shift", "shift_terminal",
        "stochastic_sampling", "time_shift_type", "use_dynamic_shifting"},
    "FlowMatchHeunDiscreteScheduler": set(),
}
# Solvers for processes with betas that take a flow as well. Their keys about
# betas then mean nothing.
_MULTISTEP = {
    *_SAMPLING, "algorithm_type", "beta_end", "beta_schedule", "beta_start",
    "corrector_order", "disable_corrector", "dynamic_thresholding_ratio",
    "euler_at_final", "final_sigmas_type", "flow_shift", "lambda_min_clipped",
    "lower_order_final", "predict_x0", "prediction_type", "predictor_order",
    "rescale_betas_zero_snr", "sample_max_value", "shift_terminal", "sigma_max",
    "sigma_min", "solver_order", "solver_p", "solver_type", "steps_offset",
    "tau_func", "thresholding", "time_shift_type", "timestep_spacing",
    "trained_betas", "use_dynamic_shifting", "use_flow_sigmas",
    "use_lu_lambdas", "variance_type"}
_SOLVERS = (
    "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "SASolverScheduler",
    "UniPCMultistepScheduler")
_STEPS = "num_train_timesteps"


def convention(num_train_steps: int) -> dict:
  """How the networks of these schedulers are called, and answer.

  They are fed with z = (1 - s) x0 + s eps and T s, and predict eps - x0.

  Args:
    num_train_steps: T.

  Returns:
    The arguments of `conventions.Convention`, by name.
  """
  return {"prediction": "flow", "process": "flow", "time_input": "flow",
          "time_scale": float(num_train_steps)}


def is_flow(path: str) -> bool:
  """Whether the scheduler of a network is of a flow.

  Args:
    path: see `diffusers.config_files`.

  Raises:
    UserError: the file is missing or damaged.
  """
  _, source = diffusers.config_files(path)
  return _is_flow(diffusers.read_json(source))


def _is_flow(config: dict) -> bool:
  name = config.get("_class_name")
  # list(): the value may have no hash.
  return name in list(_MATCHING) or (
      name in _SOLVERS and bool(config.get("use_flow_sigmas")))


def read(path: str, state_shape: tuple[int, int, int],
         patch_size: int = 1) -> tuple[FlowSchedule, dict]:
  """Reads `scheduler_config.json`.

  With `use_dynamic_shifting` the shift depends on the number of tokens, and so
  on the size of the latents; a message of the log then says which it is. The
  other size of an image is another schedule.

  Args:
    path: see `diffusers.config_files`.
    state_shape: (H, W, C) of what the network takes.
    patch_size: height and width of the square that is one token. With
      `state_shape`, it is only used for dynamic shifting.

  Returns:
    The process, and `convention` of it.

  Raises:
    UserError: the file is missing or damaged; the scheduler is not of a flow; a
      key is not known, or has a value that is not implemented.
  """
  _, source = diffusers.config_files(path)
  config = diffusers.read_json(source)
  name = config.get("_class_name")
  if not _is_flow(config):
    raise UserError(
        f"{source}: _class_name must be one of {', '.join(_MATCHING)}, or, "
        f"with use_flow_sigmas, of {', '.join(_SOLVERS)}. Received: {name!r}")
  matching = name in _MATCHING
  shift_key = "shift" if matching else "flow_shift"
  known = (_MATCHING[name] if matching else _MULTISTEP) | {_STEPS, shift_key}
  cards.check_keys(source, config, known)
  if config.get("invert_sigmas"):
    raise UserError(
        f"{source}: invert_sigmas must be False: such a network's time runs "
        f"from noise to images. Received: {config['invert_sigmas']!r}")
  kind = config.get("prediction_type", "epsilon")
  if not matching and kind != "flow_prediction":
    raise UserError(f"{source}: prediction_type must be 'flow_prediction' with "
                    f"use_flow_sigmas. Received: {kind!r}")
  steps = config.get(_STEPS, 1000)
  errors.check_whole(f"{source}: {_STEPS}", steps, 1)
  if config.get("use_dynamic_shifting"):
    shift = _dynamic_shift(source, config, state_shape, patch_size)
  else:
    shift = config.get(shift_key, 1.0)
    errors.check_positive(f"{source}: {shift_key}", shift)
  try:
    return FlowSchedule(steps, shift), convention(steps)
  except ValueError as error:
    raise UserError(f"{source}: {errors.one_line(error)}") from error


def _dynamic_shift(source, config, state_shape, patch_size) -> float:
  """The shift of latents of this shape, as diffusers' pipelines take it."""
  matching = config["_class_name"] in _MATCHING
  kinds = flow.SHIFTS if matching else flow.SHIFTS[:1]
  kind = config.get("time_shift_type", "exponential")
  if kind not in kinds:
    raise UserError(f"{source}: time_shift_type must be "
                    f"{' or '.join(map(repr, kinds))}. Received: {kind!r}")
  # The solvers have no such keys; pipelines then take these values.
  few, many = (config.get(key, default) for key, default in (
      ("base_image_seq_len", 256), ("max_image_seq_len", 4096)))
  low, high = (config.get(key, default) for key, default in (
      ("base_shift", 0.5), ("max_shift", 1.15)))
  for key, value in (("base_image_seq_len", few), ("max_image_seq_len", many)):
    errors.check_whole(f"{source}: {key}", value, 1)
  for key, value in (("base_shift", low), ("max_shift", high)):
    errors.check_number(f"{source}: {key}", value)
  height, width, _ = state_shape
  tokens = (height // patch_size) * (width // patch_size)
  try:
    shift = flow.dynamic_shift(tokens, kind, (few, many), (low, high))
  except (ValueError, OverflowError) as error:
    raise UserError(f"{source}: {errors.one_line(error)}") from error
  logging.info("%s: the shift is %.6g, for %d tokens", source, shift, tokens)
  return shift
