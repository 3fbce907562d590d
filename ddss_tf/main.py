"""Searches, evaluates, samples and exports a few-step diffusion sampler.

  python -m ddss_tf.main --gin_file=gin_configs/demo.gin --run_dir=runs/demo

Without --mode it runs search, evaluate and export in turn, and writes a report
of them; each stage goes on where an earlier command stopped. Bindings are
overridden with --gin_param='search.batch_size = 128'. The report of a folder is
written anew, without a configuration, by

  python -m ddss_tf.main --mode=report --run_dir=runs/demo
"""

import sys

from ddss_tf import configuration
from ddss_tf import console
from ddss_tf import storage
from ddss_tf.runs import signals
from ddss_tf.errors import Terminated, UserError, WorkerLost

if __name__ == "__main__":
  signals.end_at_once()  # Before anything is imported that takes its time.

# pylint: disable=g-import-not-at-top,wrong-import-position
import inspect
import os
import signal

from absl import app
from absl import flags
from absl import logging

# pylint: enable=g-import-not-at-top,wrong-import-position

# TensorFlow and gin are imported only once the flags are fine: `--help` and a
# misspelt flag answer at once.

MODES = ("run", "search", "evaluate", "compare", "sample", "export",
         "inspect", "report", "zoo")
_OF_A_CARD = ("evaluate", "sample", "export")

_GIN_FILE = flags.DEFINE_multi_string(
    "gin_file", [], "Configuration file; repeatable, later ones win.")
_GIN_PARAM = flags.DEFINE_multi_string(
    "gin_param", [], "One binding, such as 'search.seed = 3'; repeatable.")
_RUN_DIR = flags.DEFINE_string(
    "run_dir", None, "Folder for all that the run leaves; made if need be.")
_MODE = flags.DEFINE_string(
    "mode", "run", f"Stage to run, one of {', '.join(MODES)}; 'run' is search, "
    "evaluate, export and report; 'compare' ends with a report, too; 'zoo' lists "
    "the samplers that come with the package, or the cards in --run_dir.")
_SAMPLER = flags.DEFINE_string(
    "sampler", None, "Card of a sampler, or its name in the zoo, instead of the "
    f"one in the run directory; of the modes {', '.join(_OF_A_CARD)}.")
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Parse and build everything, print the configuration, "
    "and stop. Writes nothing.")


def _stages(mode: str):
  """The functions of a mode, in order."""
  from ddss_tf import registry  # pylint: disable=g-import-not-at-top
  if mode == "run":
    return [registry.search, registry.evaluate, registry.export,
            registry.report]
  if mode == "compare":
    return [registry.compare, registry.report]
  return [getattr(registry, mode)]


def _build(stages) -> None:
  """Builds what the stages will be given, and checks that it fits together.

  So a fault in what only the last stage needs shows before the first has run
  for hours. What is large is a `gin.singleton`, and so built once.
  """
  # pylint: disable=g-import-not-at-top
  from ddss_tf.evaluation import compare as comparing
  from ddss_tf.evaluation import evaluate as evaluation
  from ddss_tf.exporting import sample as sampling
  from ddss_tf.features import network as network_lib
  from ddss_tf import registry
  from ddss_tf.searching import search as searching
  from ddss_tf import zoo
  # pylint: enable=g-import-not-at-top
  checks = {
      "compare": comparing.check_compare, "evaluate": evaluation.check_evaluate,
      "sample": sampling.check_sample, "search": searching.check_search}
  num_steps = None  # K of the searched sampler, once it is known.
  for stage in stages:
    name = stage.__name__
    arguments = _bound_arguments(stage)
    if name in checks:
      checks[name](arguments)
    if name == "compare" and arguments["families"]:  # Then it searches.
      # It gives the parts itself.
      search = _bound_arguments(registry.search, **dict.fromkeys(
          ("denoiser", "sampler", "features", "dataset")))
      for objective in (arguments["objectives"] or {
          "": search["objective"]}).values():
        searching.check_search({**search, "objective": objective})
    denoiser = arguments.get("denoiser")
    if "dataset" in arguments:
      networks = network_lib.as_networks(
          f"{name}.features", arguments["features"], several=name == "search")
      networks += network_lib.as_networks(
          f"{name}.heldout_features", arguments.get("heldout_features"),
          optional=True)
      network_lib.check_shapes(denoiser, arguments["dataset"], *networks)
    if name == "search":
      num_steps = arguments["sampler"](denoiser.schedule).num_steps
    elif arguments.get("sampler") is not None:
      num_steps = zoo.load(arguments["sampler"]).coefficients.num_steps
    if name == "evaluate":
      if arguments["num_steps"] is not None:
        num_steps = arguments["num_steps"]
      for baseline in arguments["baselines"]:
        # Without K, the name has been checked, and `evaluate` does the rest.
        if num_steps is not None or not isinstance(baseline, str):
          evaluation.make_baseline(baseline, denoiser.schedule, num_steps)


def _bound_arguments(stage, **given) -> dict:
  """What a stage will be called with, defaults too, but for the run_dir."""
  import gin  # pylint: disable=g-import-not-at-top
  name = stage.__name__
  parameters = inspect.signature(stage).parameters.values()
  defaults = {p.name: p.default for p in parameters if p.name != "run_dir"}
  arguments = {**defaults, **gin.get_bindings(name), **given}
  for key, value in arguments.items():
    if value is gin.REQUIRED:
      raise UserError(f"gin: {name}.{key} must be bound")
  return arguments


def main(argv):
  with console.guarded(), signals.ending():
    _main(argv)


def _main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  if not flags.FLAGS["verbosity"].present:
    # Libraries' news is for --verbosity=0; ours is the bar and TensorBoard.
    logging.set_verbosity(logging.WARNING)
  try:
    _run()
  except KeyboardInterrupt as error:
    signum = getattr(error, "signum", signal.SIGINT)
    _fail(str(error) or f"ended by {signals.name(signum)}", 128 + signum)
  except WorkerLost as error:
    _fail(error, 1)
  except Terminated as error:
    _fail(error, 143)
  except (UserError, OSError) as error:
    _fail(error)
  except RuntimeError as error:
    if "Required bindings" not in str(error):
      raise
    _fail(f"gin: {error}")


def _fail(error, status=2):
  # One line, without the call chain that gin appends.
  message = str(error).split("\n  In call to configurable")[0]
  if "ddss_tf.runs.progress" in sys.modules:
    sys.modules["ddss_tf.runs.progress"].close_all()
  print(f"error: {' '.join(message.split())}", file=sys.stderr)
  if os.environ.get("TF_CONFIG"):
    # TensorFlow would wait for workers that are gone, or that wait for us.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  sys.exit(status)


def _run():
  if _MODE.value not in MODES:
    raise UserError(f"--mode must be one of {', '.join(MODES)}. "
                    f"Received: {_MODE.value!r}")
  folder = storage.expanded(_RUN_DIR.value)
  if _MODE.value == "zoo":
    with signals.at_once():
      from ddss_tf import zoo  # pylint: disable=g-import-not-at-top
    print(zoo.table(folder))
    return
  reporting = _MODE.value == "report"
  if reporting and not os.path.isdir(folder or ""):
    raise UserError("--run_dir must name the folder of a run. "
                    f"Received: {_RUN_DIR.value!r}")
  params = list(_GIN_PARAM.value)
  if _SAMPLER.value is not None:
    if _MODE.value not in _OF_A_CARD:
      raise UserError(f"--sampler is for --mode={'|'.join(_OF_A_CARD)}. "
                      f"Received: --mode={_MODE.value}")
    params.append(f"{_MODE.value}.sampler = {_SAMPLER.value!r}")
  if not reporting and not _GIN_FILE.value and not _GIN_PARAM.value:
    raise UserError("--gin_file must name a configuration, such as "
                    "gin_configs/demo.gin")
  inspecting = _MODE.value == "inspect"
  if not folder and not _DRY_RUN.value and not inspecting:
    raise UserError("--run_dir must name a folder")
  with signals.at_once():
    # pylint: disable=g-import-not-at-top
    import gin
    import tensorflow as tf
    from ddss_tf import distribution
    from ddss_tf import registry  # pylint: disable=unused-import
    from ddss_tf.runs import records as records_lib
    # pylint: enable=g-import-not-at-top
  configuration.parse(_GIN_FILE.value, params)
  tf.get_logger().setLevel("ERROR")  # TF-GAN calls deprecated functions.
  stages = _stages(_MODE.value)
  with distribution.make_strategy().scope():
    if _DRY_RUN.value:
      _build(stages)
      print(gin.config_str())
      return
    if inspecting:
      print(stages[0]())
      return
    run, results = _work(stages, folder)
    if not distribution.is_chief():
      return
  records = results.get("evaluate") or results.get("compare")
  if records:
    print(f"\n{records_lib.table(records)}\n")
    print(f"{records[0]['num_samples']} samples a row against "
          f"{records[0]['num_real']} real images of {records[0]['dataset']}, "
          f"seed {records[0]['seed']}; features "
          f"{records[0]['features']['name']}, held-out {_heldout(records[0])}.")
  if "sample" in results:
    print(f"images: {results['sample']}")
  print(_where(run))


def _work(stages, folder):
  """Runs stages in a run directory, which is left as it was if none begins.

  Returns:
    The `RunDir`, and what the stages return, by their names.
  """
  from ddss_tf import distribution  # pylint: disable=g-import-not-at-top
  from ddss_tf.runs import run_dir as run_dir_lib  # pylint: disable=g-import-not-at-top
  run, results = None, {}
  try:
    with signals.deferred():  # It is made as a whole, so that it can be undone.
      run = run_dir_lib.RunDir(folder)
      run.lock()
    with distribution.watched():
      _build(stages)
      for stage in stages:
        results[stage.__name__] = stage(run_dir=run.root)
      # The chief may have more to do, and none may end before the others.
      distribution.everyones(0)
  except BaseException:
    if run is not None:
      run.withdraw()
    raise
  finally:
    if run is not None:
      run.release()
  return run, results


def _heldout(record) -> str:
  """Names of a record's held-out networks."""
  networks = record["features_heldout"]
  networks = networks if isinstance(networks, list) else [networks or {}]
  return ", ".join(str(network.get("name")) for network in networks)


def _where(run) -> str:
  """Where to look: the files that are there."""
  notes = {
      "report.html": "everything on one page, for a browser",
      "table.csv": "the comparison",
      "samples.png": "best baseline beside the searched sampler, same noise",
      "coefficients.png": "the searched sampler, drawn",
      "sampler.json": "the searched sampler, portable",
      "metrics.json": "all figures",
      "export": "SavedModel",
      "diffusers_scheduler": "the sampler as a scheduler of diffusers",
      "sampler.onnx": "sampler and network for ONNX Runtime",
      "sampler.tflite": "sampler and network for TensorFlow Lite",
      "tensorboard": f"tensorboard --logdir={run.path('tensorboard')}",
  }
  return "\n".join(f"{run.path(name):<40} {note}" for name, note
                   in notes.items() if os.path.exists(run.path(name)))


def cli() -> None:
  """Entry point of the console command."""
  signals.end_at_once()
  # absl's --help is of the main module, which is pip's script there.
  sys.modules["__main__"].__doc__ = __doc__
  for flag in flags.FLAGS.get_flags_for_module(__name__):
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
  app.run(main)


if __name__ == "__main__":
  cli()
