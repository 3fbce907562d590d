"""Searches, evaluates, samples and exports a few-step diffusion sampler.

  python -m ddss_tf.main --gin_file=gin_configs/demo.gin --run_dir=runs/demo

Without --mode it runs search, evaluate and export in turn and writes a report.
Each stage goes on where an earlier command stopped. --gin_param overrides a
binding: --gin_param='search.batch_size = 128'. --plugin=my_module first imports
a module of yours, and gin may bind what it registers. This command writes the
report of a folder anew, without a configuration:

  python -m ddss_tf.main --mode=report --run_dir=runs/demo
"""

import sys

from ddss_tf import console
from ddss_tf.runs import signals
from ddss_tf.errors import Terminated, UserError, WorkerLost

if __name__ == "__main__":
  signals.end_at_once()  # First, because the imports below take their time.

# pylint: disable=g-import-not-at-top,wrong-import-position
import importlib
import os
import signal
import traceback

from absl import app
from absl import flags
from absl import logging

# TensorFlow and gin are imported inside of functions, after the flags have been
# parsed. So `--help` and a misspelt flag are answered at once.

MODES = ("run", "search", "evaluate", "compare", "sample", "export",
         "inspect", "report", "zoo")
_OF_A_CARD = ("evaluate", "sample", "export")

_GIN_FILE = flags.DEFINE_multi_string(
    "gin_file", [], "Configuration file; repeatable, later ones win.")
_GIN_PARAM = flags.DEFINE_multi_string(
    "gin_param", [], "One binding, such as 'search.seed = 3'; repeatable.")
_PLUGIN = flags.DEFINE_multi_string(
    "plugin", [], "Module to import first, such as 'my_module', from the "
    "working folder or the installed packages; repeatable. It is a program: "
    "name only modules that you trust.")
_RUN_DIR = flags.DEFINE_string(
    "run_dir", None, "Folder for all that the run leaves; made if need be.")
_MODE = flags.DEFINE_string(
    "mode", "run", f"Stage to run, one of {', '.join(MODES)}; 'run' is search, "
    "evaluate, export and report; 'compare' ends with a report, too; 'zoo' "
    "lists the samplers that come with the package, or the cards in --run_dir.")
_SAMPLER = flags.DEFINE_string(
    "sampler", None, "Card of a sampler, or its name in the zoo, instead of "
    f"the one in the run directory; of the modes {', '.join(_OF_A_CARD)}.")
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Parse and build everything, print the configuration, "
    "and stop. Writes nothing.")


def main(argv):
  with console.guarded(), signals.ending():
    _main(argv)


def _main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  if not flags.FLAGS["verbosity"].present:
    # --verbosity=0 shows what libraries log.
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
    from ddss_tf import bindings
    missing = bindings.missing(error)
    if missing is None:
      raise
    _fail(f"gin: {missing}")


def _fail(error, status=2):
  """Ends the process with one line, without the call chain that gin appends."""
  message = str(error).split("\n  In call to configurable")[0]
  if "ddss_tf.runs.progress" in sys.modules:
    sys.modules["ddss_tf.runs.progress"].close_all()
  print(f"error: {' '.join(message.split())}", file=sys.stderr)
  if os.environ.get("TF_CONFIG"):
    # At a normal exit TensorFlow would wait for workers that have ended or that
    # wait for this one.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  sys.exit(status)


def _run():
  """Runs the mode that the flags ask for."""
  _check_flags()
  with signals.at_once():
    from ddss_tf import storage
    from ddss_tf import zoo
    folder = storage.expanded(_RUN_DIR.value)
    if _MODE.value != "zoo":
      import gin
      import tensorflow as tf
      from ddss_tf import configuration
      from ddss_tf import distribution
      tf.get_logger().setLevel("ERROR")  # TF-GAN calls deprecated functions.
    for name in _PLUGIN.value:
      _import_plugin(name)
  if _MODE.value == "zoo":
    print(zoo.table(folder))
    return
  if _MODE.value == "report" and not storage.isdir(folder):
    raise UserError("--run_dir must name the folder of a run. "
                    f"Received: {_RUN_DIR.value!r}")
  params = list(_GIN_PARAM.value)
  if _SAMPLER.value is not None:
    params.append(f"{_MODE.value}.sampler = {_SAMPLER.value!r}")
  configuration.parse(_GIN_FILE.value, params)
  stages = configuration.stages(_MODE.value)
  with distribution.make_strategy().scope():
    if _DRY_RUN.value:
      configuration.build(stages)
      print(gin.config_str())
      return
    if _MODE.value == "inspect":
      print(stages[0]())
      return
    run, results = _work(stages, folder)
    if not distribution.is_chief():
      return
  _print_results(run, results)


def _check_flags() -> None:
  """Checks the flags, as far as that needs no slow import.

  Raises:
    UserError: a flag has a value that its mode does not allow.
  """
  mode = _MODE.value
  if mode not in MODES:
    raise UserError(f"--mode must be one of {', '.join(MODES)}. "
                    f"Received: {mode!r}")
  if mode == "zoo":
    return
  if mode == "report" and not _RUN_DIR.value:
    raise UserError("--run_dir must name the folder of a run. "
                    f"Received: {_RUN_DIR.value!r}")
  if _SAMPLER.value is not None and mode not in _OF_A_CARD:
    raise UserError(f"--sampler is for --mode={'|'.join(_OF_A_CARD)}. "
                    f"Received: --mode={mode}")
  if mode != "report" and not _GIN_FILE.value and not _GIN_PARAM.value:
    raise UserError("--gin_file must name a configuration, such as "
                    "gin_configs/demo.gin")
  if not _RUN_DIR.value and not _DRY_RUN.value and mode != "inspect":
    raise UserError("--run_dir must name a folder")


def _import_plugin(name: str) -> None:
  """Imports a module that the user has named.

  The working folder comes first on the path, as `python -m` has it.

  Raises:
    UserError: the name is not a module's, or the import fails.
  """
  if not all(part.isidentifier() for part in name.split(".")):
    raise UserError("--plugin must be the name of a module, such as my_module "
                    "for my_module.py in the working folder. "
                    f"Received: {name!r}")
  if not {"", os.getcwd()} & set(sys.path):
    sys.path.insert(0, os.getcwd())
  try:
    importlib.import_module(name)
  except (Exception, SystemExit) as error:  # pylint: disable=broad-except
    # The line at the top level of a module where the import failed.
    places = [f"{frame.filename}:{frame.lineno}" for frame
              in traceback.extract_tb(error.__traceback__)
              if frame.name == "<module>"]
    where = f" (at {places[-1]})" if places else ""
    raise UserError(f"--plugin={name} cannot be imported{where}: "
                    f"{type(error).__name__}: {error}") from error


def _work(stages, folder):
  """Runs stages in a run directory.

  If none begins, the disk is left as it was.

  Returns:
    The `RunDir`, and the results of the stages by their names.
  """
  from ddss_tf import configuration
  from ddss_tf import distribution
  from ddss_tf.runs import run_dir as run_dir_lib
  run, results = None, {}
  try:
    # A signal waits here. A folder that is half made could not be taken back.
    with signals.deferred():
      run = run_dir_lib.RunDir(folder)
      run.lock()
    with distribution.watched():
      configuration.build(stages)
      for stage in stages:
        results[stage.__name__] = stage(run_dir=run.root)
      # The chief may have more to do, and no process may end before the others.
      distribution.everyones(0)
  except BaseException:
    if run is not None:
      run.withdraw()
    raise
  finally:
    if run is not None:
      run.release()
  return run, results


def _print_results(run, results) -> None:
  """Prints the figures of a run and the paths of its files."""
  from ddss_tf.runs import records as records_lib
  records = results.get("evaluate") or results.get("compare")
  if records:
    print(f"\n{records_lib.table(records)}\n")
    print(f"{records[0]['num_samples']} samples a row against "
          f"{records[0]['num_real']} real images of {records[0]['dataset']}, "
          f"seed {records[0]['seed']}; features "
          f"{records[0]['features']['name']}, held-out "
          f"{', '.join(records_lib.heldout_names(records[0]))}.")
  if "sample" in results:
    print(f"images: {results['sample']}")
  print(run.contents())


def cli() -> None:
  """Entry point of the console command."""
  signals.end_at_once()
  # absl's --help describes the main module, which here is the script of pip.
  sys.modules["__main__"].__doc__ = __doc__
  for flag in flags.FLAGS.get_flags_for_module(__name__):
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
  app.run(main)


if __name__ == "__main__":
  cli()
