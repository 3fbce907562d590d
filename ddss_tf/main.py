"""Searches, evaluates, samples and exports a few-step diffusion sampler.

  python -m ddss_tf.main --gin_file=gin_configs/demo.gin --run_dir=runs/demo

Without --mode it runs search, evaluate and export in turn, and writes a report
of them; each stage goes on where an earlier command stopped. Bindings are
overridden with --gin_param='search.batch_size = 128'. The report of a folder is
written anew, without a configuration, by

  python -m ddss_tf.main --mode=report --run_dir=runs/demo
"""

import inspect
import os
import re
import sys
import tokenize

from absl import app
from absl import flags
from absl import logging

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


def _parse_gin(files: list[str], params: list[str]) -> None:
  """Parses all bindings; any fault in them is a one-line UserError."""
  import gin  # pylint: disable=g-import-not-at-top
  from ddss_tf import registry  # pylint: disable=g-import-not-at-top,unused-import
  from ddss_tf.errors import UserError  # pylint: disable=g-import-not-at-top

  verbosity = logging.get_verbosity()
  # gin logs an error for every folder in which an include is not.
  logging.set_verbosity(logging.FATAL)
  files = [_found(file) for file in files]
  for file in files:
    if not os.path.isfile(file):
      raise UserError(f"gin file must exist. Received: {file!r}")
    # An include is looked for beside the file that has it, too.
    gin.add_config_file_search_path(os.path.dirname(os.path.abspath(file)))
  try:
    _refuse_imports(files, params)
    gin.parse_config_files_and_bindings(files, params, skip_unknown=False)
  except (ValueError, SyntaxError, TypeError, OSError, RuntimeError,
          AttributeError, ImportError, NameError,
          tokenize.TokenError) as error:
    # gin quotes the whole configuration where a macro is used that is not set.
    unset = re.match(r"No bindings specified for '(.+)/gin\.macro'", str(error))
    raise UserError(f"gin: the macro {unset[1]!r} must be bound, for a binding "
                    "uses it" if unset else f"gin: {error}") from error
  finally:
    logging.set_verbosity(verbosity)
  text = gin.config_str(max_line_length=10**6)
  # gin takes a misspelt NAME = value for a new macro and goes on.
  for name in re.findall(r"^(\w+) =", text, re.MULTILINE):
    if not re.search(rf"%{name}\b", text):
      raise UserError(f"gin: macro {name!r} is not used by any binding; is it "
                      "misspelt?")


def _refuse_imports(files: list[str], params: list[str]) -> None:
  """Refuses a configuration that imports, before gin reads it.

  For gin imports while it reads, which runs code, and a configuration with
  imports may name, and so call, any function there is. Includes must be files:
  gin would look for others in packages, and import these.

  Raises:
    ValueError: an import, or an include that is not there.
    SyntaxError, tokenize.TokenError, OSError: as from gin.
  """
  from gin import config_parser  # pylint: disable=g-import-not-at-top

  class Unread(config_parser.ParserDelegate):
    """Leaves the names in values as they are."""

    def configurable_reference(self, scoped_configurable_name, evaluate):
      pass

    def macro(self, macro_name):
      pass

  folders = ["", *(os.path.dirname(os.path.abspath(file)) for file in files)]
  known = list(files)

  def check(lines):
    for statement in config_parser.ConfigParser(lines, Unread()):
      if isinstance(statement, config_parser.ImportStatement):
        raise ValueError(
            "a configuration binds what ddss_tf registers and must not import. "
            f"Received: {statement.format()!r}")
      if isinstance(statement, config_parser.IncludeStatement):
        paths = [os.path.join(folder, statement.filename)
                 for folder in folders]
        path = next(filter(os.path.isfile, paths), None)
        if path is None:
          raise ValueError("an included file must be there. Received: "
                           f"{statement.filename!r}")
        if path not in known:
          known.append(path)

  for path in known:  # Which grows.
    with open(path, encoding="utf-8") as lines:
      check(lines)
  check("\n".join(params))


def _found(file: str) -> str:
  """Path of a gin file: where an installed package has it, if not here."""
  installed = os.path.join(os.path.dirname(os.path.abspath(__file__)), file)
  return installed if (
      not os.path.isfile(file) and os.path.isfile(installed)) else file


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
  from ddss_tf import comparing
  from ddss_tf import evaluation
  from ddss_tf import exporting
  from ddss_tf import features
  from ddss_tf import registry
  from ddss_tf import searching
  from ddss_tf import zoo
  # pylint: enable=g-import-not-at-top
  checks = {
      "compare": comparing.check_compare, "evaluate": evaluation.check_evaluate,
      "sample": exporting.check_sample, "search": searching.check_search}
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
      networks = features.as_networks(
          f"{name}.features", arguments["features"], several=name == "search")
      networks += features.as_networks(
          f"{name}.heldout_features", arguments.get("heldout_features"),
          optional=True)
      searching.check_shapes(denoiser, arguments["dataset"], *networks)
    factories = list(arguments.get("baselines") or [])
    if name == "search":
      factories.append(arguments["sampler"])
    elif arguments.get("sampler") is not None:
      zoo.load(arguments["sampler"])
    for factory in factories:
      factory(denoiser.schedule)


def _bound_arguments(stage, **given) -> dict:
  """What a stage will be called with, defaults too, but for the run_dir."""
  import gin  # pylint: disable=g-import-not-at-top
  from ddss_tf.errors import UserError  # pylint: disable=g-import-not-at-top
  name = stage.__name__
  parameters = inspect.signature(stage).parameters.values()
  defaults = {p.name: p.default for p in parameters if p.name != "run_dir"}
  arguments = {**defaults, **gin.get_bindings(name), **given}
  for key, value in arguments.items():
    if value is gin.REQUIRED:
      raise UserError(f"gin: {name}.{key} must be bound")
  return arguments


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  if not flags.FLAGS["verbosity"].present:
    # Libraries' news is for --verbosity=0; ours is the bar and TensorBoard.
    logging.set_verbosity(logging.WARNING)
  from ddss_tf.errors import Terminated, UserError, WorkerLost  # pylint: disable=g-import-not-at-top
  try:
    _run()
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
  print(f"error: {' '.join(message.split())}", file=sys.stderr)
  if os.environ.get("TF_CONFIG"):
    # TensorFlow would wait for workers that are gone, or that wait for us.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  sys.exit(status)


def _run():
  from ddss_tf.errors import UserError  # pylint: disable=g-import-not-at-top
  if _MODE.value not in MODES:
    raise UserError(f"--mode must be one of {', '.join(MODES)}. "
                    f"Received: {_MODE.value!r}")
  if _MODE.value == "zoo":
    from ddss_tf import zoo  # pylint: disable=g-import-not-at-top
    print(zoo.table(_RUN_DIR.value))
    return
  reporting = _MODE.value == "report"
  if reporting and not os.path.isdir(_RUN_DIR.value or ""):
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
  if not _RUN_DIR.value and not _DRY_RUN.value and not inspecting:
    raise UserError("--run_dir must name a folder")
  _parse_gin(_GIN_FILE.value, params)
  import gin  # pylint: disable=g-import-not-at-top
  import tensorflow as tf  # pylint: disable=g-import-not-at-top
  from ddss_tf import distribution  # pylint: disable=g-import-not-at-top
  from ddss_tf import evaluation  # pylint: disable=g-import-not-at-top
  from ddss_tf import run_dir as run_dir_lib  # pylint: disable=g-import-not-at-top

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
    run = run_dir_lib.RunDir(_RUN_DIR.value)
    run.lock()
    results = {}
    try:
      with distribution.watched():
        _build(stages)
        for stage in stages:
          results[stage.__name__] = stage(run_dir=run.root)
        # The chief may have more to do, and none may end before the others.
        distribution.everyones(0)
    except Exception:
      run.withdraw()
      raise
    finally:
      run.release()
    if not distribution.is_chief():
      return
  records = results.get("evaluate") or results.get("compare")
  if records:
    print(f"\n{evaluation.table(records)}\n")
    print(f"{records[0]['num_samples']} samples a row against "
          f"{records[0]['num_real']} real images of {records[0]['dataset']}, "
          f"seed {records[0]['seed']}; features "
          f"{records[0]['features']['name']}, held-out {_heldout(records[0])}.")
  if "sample" in results:
    print(f"images: {results['sample']}")
  print(_where(run))


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
  # absl's --help is of the main module, which is pip's script there.
  sys.modules["__main__"].__doc__ = __doc__
  for flag in flags.FLAGS.get_flags_for_module(__name__):
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
  app.run(main)


if __name__ == "__main__":
  cli()
