"""The configuration: gin files, their includes, and what a command calls.

gin opens no file itself. Given a file, gin would import the modules that it
names, which runs code, and would look for includes only in the folders of the
command line. So this module reads each file and each include once, checks the
statements, and hands their text to gin.

Importing this module imports every function that gin may bind.
"""

import inspect
import io
import os
import re
import tokenize
from typing import Any, Callable, Sequence

import gin
from gin import config_parser

from ddss_tf import bindings as bindings_lib
from ddss_tf import storage
from ddss_tf import zoo
from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.evaluation import baselines
from ddss_tf.evaluation import compare
from ddss_tf.evaluation import evaluate
from ddss_tf.exporting import export
from ddss_tf.exporting import sample
from ddss_tf.features import clip as clip_lib
from ddss_tf.features import network as network_lib
from ddss_tf.reporting import inspection
from ddss_tf.reporting import report
from ddss_tf.searching import options as options_lib
from ddss_tf.searching import search
from ddss_tf.datasets.load import label_counts, load_dataset
from ddss_tf.denoisers.clocks import on_schedule
from ddss_tf.denoisers.gaussian import gaussian_denoiser
from ddss_tf.distribution import make_strategy
from ddss_tf.errors import UserError
from ddss_tf.features.clip import load_clip
from ddss_tf.features.load import load_features
from ddss_tf.formats.load import load_denoiser
from ddss_tf.reporting.published import load_published
from ddss_tf.samplers.families import make_sampler
from ddss_tf.schedules import make_schedule

# What gin may bind: the parts, and a root for each stage.
PARTS = (gaussian_denoiser, label_counts, load_clip, load_dataset, load_denoiser,
         load_features, load_published, make_sampler, make_schedule,
         make_strategy, on_schedule)
_STAGES = {
    "run": [search.search, evaluate.evaluate, export.export, report.report],
    "compare": [compare.compare, report.report],
    "search": [search.search], "evaluate": [evaluate.evaluate],
    "sample": [sample.sample], "export": [export.export],
    "inspect": [inspection.inspect], "report": [report.report]}
_CHECKS = {
    "compare": compare.check_compare, "evaluate": evaluate.check_evaluate,
    "sample": sample.check_sample, "search": options_lib.check_search}
_PACKAGE = os.path.dirname(os.path.abspath(__file__))
_COMMAND_LINE = "the command line"
# The most includes inside of each other, and the most files in all. A
# configuration with more has a mistake in it.
_DEEPEST, _MOST = 100, 10_000
# The mark of UTF-32 begins with that of UTF-16, so it is tried first.
_OTHER_ENCODINGS = (
    (b"\xff\xfe\x00\x00", "UTF-32"), (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"))


def stages(mode: str) -> list[Callable]:
  """The functions that a mode of the command line calls, in order."""
  return _STAGES[mode]


def build(functions: Sequence[Callable]) -> None:
  """Builds the arguments of stages and checks that they fit together.

  So a fault in an argument of the last stage is found before the first stage
  runs for hours. Large parts are `gin.singleton`s, built here for the stages.

  Args:
    functions: the stages, see `stages`.

  Raises:
    UserError: a required argument is not bound, an option is out of range, or
      the parts do not fit together.
  """
  num_steps = None  # K of the searched sampler, once a stage tells it.
  for function in functions:
    name = function.__name__
    arguments = _bound_arguments(function)
    if name in _CHECKS:
      _CHECKS[name](arguments)
    if name == "compare":
      _check_searches_of(arguments)
    if arguments.get("dataset") is not None:
      networks = network_lib.as_networks(
          f"{name}.features", arguments["features"],
          several=name in ("search", "inspect"), optional=name == "inspect")
      networks += network_lib.as_networks(
          f"{name}.heldout_features", arguments.get("heldout_features"),
          optional=True)
      dataset = dataset_lib.as_dataset(arguments["dataset"])
      network_lib.check_shapes(arguments["denoiser"], dataset, *networks)
    if arguments.get("clip") is not None:
      clip_lib.check(arguments["clip"], arguments["denoiser"])
    if name == "search":
      sampler = arguments["sampler"](arguments["denoiser"].schedule)
      num_steps = sampler.num_steps
    elif arguments.get("sampler") is not None:
      num_steps = zoo.load(arguments["sampler"]).coefficients.num_steps
    if name == "evaluate":
      _build_baselines(arguments, num_steps)


def _check_searches_of(arguments: dict[str, Any]) -> None:
  """Checks the searches of a comparison, which supplies their parts itself."""
  if not arguments["families"]:
    return
  options = _bound_arguments(search.search, **dict.fromkeys(
      ("denoiser", "sampler", "features", "dataset")))
  objectives = arguments["objectives"] or {"": options["objective"]}
  for objective in objectives.values():
    options_lib.check_search({**options, "objective": objective})


def _build_baselines(arguments: dict[str, Any], num_steps: int | None) -> None:
  """Makes the baselines of an evaluation.

  A baseline that is given by name needs K. If K is not known yet, `evaluate`
  makes the baseline, once it has read the sampler in the run directory.
  """
  if arguments["num_steps"] is not None:
    num_steps = arguments["num_steps"]
  if arguments["baselines"] is baselines.DEFAULT:
    return  # Those of it that cannot be made are left out.
  for baseline in arguments["baselines"]:
    if not isinstance(baseline, str) or (
        num_steps is not None and baselines.is_solver(baseline)):
      baselines.make_baseline(
          baseline, arguments["denoiser"].schedule, num_steps)


def _bound_arguments(function: Callable, **given) -> dict[str, Any]:
  """The arguments of a stage: defaults and bindings, without the run_dir.

  Args:
    function: the stage.
    **given: arguments that take the place of bindings.

  Raises:
    UserError: a required argument is not bound.
  """
  name = function.__name__
  parameters = inspect.signature(function).parameters.values()
  defaults = {p.name: p.default for p in parameters if p.name != "run_dir"}
  arguments = {**defaults, **gin.get_bindings(name), **given}
  for key, value in arguments.items():
    if value is gin.REQUIRED:
      raise UserError(f"gin: {name}.{key} must be bound")
  return arguments


def parse(files: list[str], params: list[str]) -> None:
  """Gives gin all bindings and locks them. A later binding wins.

  A binding loses its effect if a later one replaces its only use. Such bindings
  are left out, so that `gin.config_str` can be parsed again.

  Args:
    files: paths of gin files. An include is looked for beside the file that has
      it, then in the working folder, in the package (`gin_configs/demo.gin`),
      and beside `files`.
    params: bindings, read after the files.

  Raises:
    UserError: a file or an include is missing or not UTF-8; files include each
      other in a circle; a statement imports or is faulty; a macro or a scope is
      used by no text, and so is misspelt; or a binding comes last and loses to
      an earlier one in a scope.
  """
  try:
    reader = _Reader(files)
    for file in reader.files:
      reader.take_file(file, chain=())
    reader.take("\n".join(params), None, chain=())
    for piece in reader.pieces:
      gin.parse_config(piece, skip_unknown=False)
    bindings = [bindings_lib.Binding.of(each) for each in reader.bindings]
    bindings_lib.check_effects(bindings)
    bindings_lib.check_winning(bindings, bindings_lib.leave_out_dead())
    gin.finalize()
  except UserError:
    raise
  except (ValueError, SyntaxError, TypeError, OSError, RuntimeError,
          AttributeError, ImportError, NameError,
          tokenize.TokenError) as error:
    # If a macro is unset, gin's message quotes the whole configuration.
    unset = re.match(r"No bindings specified for '(.+)/gin\.macro'", str(error))
    raise UserError(f"gin: the macro {unset[1]!r} must be bound, because a "
                    "binding uses it" if unset else f"gin: {error}") from error


def _read_text(path: str) -> str:
  """Text of a file, its lines ended by "\\n".

  Raises:
    ValueError: the file is not UTF-8.
  """
  with storage.open(path, "rb") as f:
    content = f.read()
  encoding = next((name for mark, name in _OTHER_ENCODINGS
                   if content.startswith(mark)), None)
  if encoding is None and b"\0" in content:
    encoding = "NUL bytes, of UTF-16 or of no text"
  try:
    # Editors on Windows put a byte order mark at the beginning.
    text = content.decode("utf-8-sig") if encoding is None else ""
  except UnicodeDecodeError as error:
    line = content[:error.start].count(b"\n") + 1
    encoding = (f"the byte {content[error.start]:#04x} in line {line}, perhaps "
                "of Latin-1 or Windows-1252")
  if encoding is not None:
    raise ValueError(f"{path} must be UTF-8 text: save it anew in this "
                     f"encoding. Received: {encoding}")
  return text.replace("\r\n", "\n").replace("\r", "\n")


class _Named(io.StringIO):
  """Text with the name of its file, which gin puts into messages."""

  def __init__(self, text: str, name: str | None):
    super().__init__(text)
    self.name = name


class _Reader:
  """Reads files and what they include, in the order in which bindings count.

  Args:
    files: paths from the command line.

  Attributes:
    files: the paths where the files are.
    pieces: texts without includes, for gin.
    bindings: gin's `BindingStatement`s, with `bindings.Reference`s in their values.

  Raises:
    UserError: one of the files is missing.
  """

  def __init__(self, files: list[str]):
    self.files = list(map(storage.found, files))
    for file in self.files:
      if not storage.isfile(file):
        raise UserError(f"gin file must exist. Received: {file!r}")
    self.pieces, self.bindings = [], []
    self._count = 0

  def take_file(self, path: str, chain: tuple[str, ...]) -> None:
    """Reads a file.

    Args:
      path: the file.
      chain: the files that led here, each of which includes the next.

    Raises:
      ValueError: a circle, too many files, or a fault of `take`.
    """
    known = list(map(os.path.realpath, chain))
    if os.path.realpath(path) in known:
      circle = [*chain[known.index(os.path.realpath(path)):], path]
      raise ValueError("files must not include each other in a circle. "
                       f"Received: {' -> '.join(circle)}")
    self._count += 1
    if len(chain) >= _DEEPEST or self._count > _MOST:
      raise ValueError(
          f"at most {_DEEPEST} files may be inside of each other, and {_MOST} "
          f"included in all. Received: more, at {path}")
    self.take(_read_text(path), path, chain)

  def take(self, text: str, path: str | None, chain: tuple[str, ...]) -> None:
    """Reads the text of a file, or of the command line if the path is None.

    Raises:
      ValueError: the text imports, or an include is missing.
    """
    statements = list(config_parser.ConfigParser(
        _Named(text, path), bindings_lib.Unread()))
    lines = text.split("\n")
    first_lines = [each.location.line_num - 1 for each in statements]
    begin = 0
    for statement, first, after in zip(
        statements, first_lines, [*first_lines[1:], len(lines)]):
      if isinstance(statement, config_parser.ImportStatement):
        raise ValueError(
            "a configuration binds what ddss_tf registers and must not import. "
            f"Received: {statement.format()!r}")
      if isinstance(statement, config_parser.BindingStatement):
        self.bindings.append(statement)
      if isinstance(statement, config_parser.IncludeStatement):
        self._give(lines, begin, first, path)
        begin = after
        self.take_file(self._included(statement.filename, path),
                       chain if path is None else (*chain, path))
    self._give(lines, begin, len(lines), path)

  def _give(self, lines, begin, end, path):
    """Keeps lines for gin. Empty lines before them keep gin's line numbers."""
    self.pieces.append(_Named("\n" * begin + "\n".join(lines[begin:end]), path))

  def _included(self, name: str, path: str | None) -> str:
    """Path of the file that `path` includes by a name.

    Raises:
      ValueError: there is no such file.
    """
    beside = [] if path is None else [path, os.path.realpath(path)]
    folders = [
        *(os.path.dirname(os.path.abspath(file)) for file in beside), "",
        _PACKAGE, *(os.path.dirname(os.path.abspath(file))
                    for file in self.files)]
    expanded = storage.expanded(name)
    for folder in folders:
      if storage.isfile(os.path.join(folder, expanded)):
        return os.path.join(folder, expanded)
    raise ValueError("an included file must be there. Received: "
                     f"{name!r}, which {path or _COMMAND_LINE} includes")
