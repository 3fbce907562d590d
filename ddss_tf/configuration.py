"""The configuration: gin files, what they may bind, and that all has an effect.

The roots, one for each mode, are `search`, `evaluate`, `compare`, `sample`,
`export`, `inspect` and `report`. `make_strategy` is bound for all of them.

gin reads no file itself. All are read here, once, whatever they include with
them, and what was looked at is what gin is then given, statement by statement:
gin would import the modules that a configuration names while it reads it, which
runs code, and would look for includes in the folders of the command line only.
"""

import collections
import dataclasses
import difflib
import importlib
import inspect
import io
import os
import re
import sys
import tokenize
from typing import Callable, Iterable, Iterator, Mapping

import gin
from gin import config_parser

from ddss_tf import storage
from ddss_tf.errors import UserError

_PACKAGE = os.path.dirname(os.path.abspath(__file__))
_COMMAND_LINE = "the command line"
_MACRO = "gin.macro"
# Of includes inside of includes, and of files in all: more is a slip.
_DEEPEST, _MOST = 100, 10_000
# The longer ones first, which begin like others.
_OTHER_ENCODINGS = (
    (b"\xff\xfe\x00\x00", "UTF-32"), (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"))


# The functions that a mode runs, and the modules of these and of the factories.
_STAGES = {"run": ("search", "evaluate", "export", "report"),
           "compare": ("compare", "report")}
_ROOTS = {"search": "searching.search", "evaluate": "evaluation.evaluate",
          "compare": "evaluation.compare", "sample": "exporting.sample",
          "export": "exporting.export", "inspect": "reporting.inspection",
          "report": "reporting.report"}
_FACTORIES = (
    "datasets.load", "denoisers.clocks", "denoisers.gaussian", "distribution",
    "features.load", "formats.load", "samplers.families", "schedules")


def register() -> dict[str, Callable]:
  """Imports all that gin may bind; gives the roots by name."""
  for module in _FACTORIES:
    importlib.import_module(f"ddss_tf.{module}")
  return {name: getattr(importlib.import_module(f"ddss_tf.{module}"), name)
          for name, module in _ROOTS.items()}


def load_plugins(names: list[str]) -> None:
  """Imports modules of the user, which register what gin may bind.

  Args:
    names: of modules that can be imported from here, the working folder among
      other places.

  Raises:
    UserError: there is no such module, or it fails.
  """
  if names and "" not in sys.path and os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())
  for name in names:
    try:
      importlib.import_module(name)
    except Exception as error:  # A plugin may raise anything.
      raise UserError(
          f"--plugin must name a module that can be imported. Received: "
          f"{name!r}, {type(error).__name__}: {error}") from error


def stages(mode: str) -> list[Callable]:
  """The functions of a mode, in order."""
  roots = register()
  return [roots[name] for name in _STAGES.get(mode, (mode,))]


def build(functions: list[Callable]) -> None:
  """Builds what stages will be given, and checks that it fits together.

  A fault in what the last stage alone needs shows here, before the first has run
  for hours. Large parts are `gin.singleton`s, and so they are built once.

  Args:
    functions: the stages.

  Raises:
    UserError: a required binding is missing, or parts do not fit.
  """
  # pylint: disable=g-import-not-at-top
  from ddss_tf import zoo
  from ddss_tf.datasets import dataset as dataset_lib
  from ddss_tf.evaluation import evaluate as evaluate_lib
  from ddss_tf.features import network as network_lib
  # pylint: enable=g-import-not-at-top
  num_steps = None  # K of the searched sampler, once it is known.
  for function in functions:
    name, arguments = function.__name__, _bound_arguments(function)
    _check_numbers(name, arguments)
    denoiser = arguments.get("denoiser")
    if "dataset" in arguments:
      networks = network_lib.as_networks(
          f"{name}.features", arguments["features"], several=name == "search")
      networks += network_lib.as_networks(
          f"{name}.heldout_features", arguments.get("heldout_features"),
          optional=True)
      network_lib.check_shapes(
          denoiser, dataset_lib.as_dataset(arguments["dataset"]), *networks)
    if name == "search":
      num_steps = arguments["sampler"](denoiser.schedule).num_steps
    elif arguments.get("sampler") is not None:
      num_steps = zoo.load(arguments["sampler"]).coefficients.num_steps
    if name == "evaluate":
      evaluate_lib.check_baselines(
          arguments["baselines"], denoiser.schedule,
          arguments["num_steps"] or num_steps)


def _check_numbers(name: str, arguments: Mapping[str, object]) -> None:
  """Checks what can be said of a stage's arguments before anything is built."""
  # pylint: disable=g-import-not-at-top
  from ddss_tf.evaluation import compare as compare_lib
  from ddss_tf.evaluation import evaluate as evaluate_lib
  from ddss_tf.exporting import sample as sample_lib
  from ddss_tf.searching import options as options_lib
  # pylint: enable=g-import-not-at-top
  checks = {"compare": compare_lib.check_compare,
            "evaluate": evaluate_lib.check_evaluate,
            "sample": sample_lib.check_sample,
            "search": options_lib.check_search}
  if name in checks:
    checks[name](arguments)
  if name == "compare" and arguments["families"]:  # Then it searches.
    # It gives the parts itself.
    search = _bound_arguments(register()["search"], **dict.fromkeys(
        ("denoiser", "sampler", "features", "dataset")))
    for objective in (arguments["objectives"] or {
        "": search["objective"]}).values():
      options_lib.check_search({**search, "objective": objective})


def _bound_arguments(function: Callable, **given) -> dict:
  """What a stage will be called with, defaults too, except the run_dir."""
  name = function.__name__
  parameters = inspect.signature(function).parameters.values()
  defaults = {p.name: p.default for p in parameters if p.name != "run_dir"}
  arguments = {**defaults, **gin.get_bindings(name), **given}
  for key, value in arguments.items():
    if value is gin.REQUIRED:
      raise UserError(f"gin: {name}.{key} must be bound")
  return arguments


def parse(files: list[str], params: list[str]) -> None:
  """Gives gin all bindings, and locks it; later ones win.

  What has no effect because another binding took the place of its last use is
  left out: `gin.config_str` can be parsed again.

  Args:
    files: paths of gin files. An include is looked for beside the file that has
      it, then in the working folder, in the package (`gin_configs/demo.gin`),
      and beside `files`.
    params: bindings, read after them.

  Raises:
    UserError: a file or an include that is not there or no UTF-8, includes in a
      circle, an import, a fault in a binding, or a macro or a scope that
      nothing uses in the text of any file, and so is misspelt.
  """
  try:
    reader = _Reader(files)
    for file in reader.files:
      reader.take_file(file, chain=())
    reader.take("\n".join(params), None, chain=())
    for piece in reader.pieces:
      gin.parse_config(piece, skip_unknown=False)
    _check_effects([_Binding.of(each) for each in reader.bindings])
    _leave_out_dead()
    gin.finalize()
  except UserError:
    raise
  except (ValueError, SyntaxError, TypeError, OSError, RuntimeError,
          AttributeError, ImportError, NameError,
          tokenize.TokenError) as error:
    # gin quotes the whole configuration where a macro is used that is not set.
    unset = re.match(r"No bindings specified for '(.+)/gin\.macro'", str(error))
    raise UserError(f"gin: the macro {unset[1]!r} must be bound, for a binding "
                    "uses it" if unset else f"gin: {error}") from error


def found(file: str) -> str:
  """Path of a gin file: where an installed package has it, if not here."""
  file = storage.expanded(file)
  installed = os.path.join(_PACKAGE, file)
  return installed if (
      not os.path.isfile(file) and os.path.isfile(installed)) else file


def _read_text(path: str) -> str:
  """Text of a file, its lines ended by "\\n".

  Raises:
    ValueError: it is in another encoding than UTF-8.
  """
  with open(path, "rb") as f:
    content = f.read()
  encoding = next((encoding for mark, encoding in _OTHER_ENCODINGS
                   if content.startswith(mark)), None)
  if encoding is None and b"\0" in content:
    encoding = "NUL bytes, of UTF-16 or of no text"
  try:
    # Editors of Windows begin it with a byte order mark.
    text = content.decode("utf-8-sig") if encoding is None else ""
  except UnicodeDecodeError as error:
    line = content[:error.start].count(b"\n") + 1
    encoding = (f"the byte {content[error.start]:#04x} in line {line}, perhaps "
                "of Latin-1 or Windows-1252")
  if encoding is not None:
    raise ValueError(f"{path} must be UTF-8 text: save it anew in this "
                     f"encoding. Received: {encoding}")
  return text.replace("\r\n", "\n").replace("\r", "\n")


@dataclasses.dataclass(frozen=True)
class _Reference:
  """`@scope/selector` or, of the selector `gin.macro`, `%scope`."""
  scope: str
  selector: str


class _Unread(config_parser.ParserDelegate):
  """Leaves the names in values as they are."""

  def configurable_reference(self, scoped_configurable_name, evaluate):
    scope, _, selector = scoped_configurable_name.rpartition("/")
    return _Reference(scope, selector)

  def macro(self, macro_name):
    return _Reference(macro_name, _MACRO)


class _Named(io.StringIO):
  """Text with the name of its file, which gin tells in messages."""

  def __init__(self, text: str, name: str | None):
    super().__init__(text)
    self.name = name


class _Reader:
  """Reads files and what they include, in the order in which it counts.

  Args:
    files: of the command line.

  Attributes:
    files: where they are.
    pieces: texts without includes, for gin.
    bindings: gin's `BindingStatement`s in them, with `_Reference`s in values.

  Raises:
    UserError: one of the files is not there.
  """

  def __init__(self, files: list[str]):
    self.files = list(map(found, files))
    for file in self.files:
      if not os.path.isfile(file):
        raise UserError(f"gin file must exist. Received: {file!r}")
    self.pieces, self.bindings = [], []
    self._count = 0

  def take_file(self, path: str, chain: tuple[str, ...]) -> None:
    """Takes a file.

    Args:
      path: of the file.
      chain: the files that include each other and this one.
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
    """Takes a text, of a file or of the command line."""
    statements = list(config_parser.ConfigParser(
        _Named(text, path), _Unread()))
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
    """Keeps some lines for gin, at their numbers in the file."""
    self.pieces.append(_Named("\n" * begin + "\n".join(lines[begin:end]), path))

  def _included(self, name: str, path: str | None) -> str:
    """Where a file is that `path` includes."""
    beside = [] if path is None else [path, os.path.realpath(path)]
    folders = [
        *(os.path.dirname(os.path.abspath(file)) for file in beside), "",
        _PACKAGE, *(os.path.dirname(os.path.abspath(file))
                    for file in self.files)]
    expanded = storage.expanded(name)
    for folder in folders:
      if os.path.isfile(os.path.join(folder, expanded)):
        return os.path.join(folder, expanded)
    raise ValueError("an included file must be there. Received: "
                     f"{name!r}, which {path or _COMMAND_LINE} includes")


def _references(value) -> Iterator[_Reference]:
  """All references in a value."""
  if isinstance(value, _Reference):
    yield value
  elif isinstance(value, dict):
    for item in value.items():
      yield from _references(item)
  elif isinstance(value, (list, tuple)):
    for item in value:
      yield from _references(item)


@dataclasses.dataclass(frozen=True)
class _Binding:
  """A binding, a macro's as that of `gin.macro.value`.

  Attributes:
    scope: its scope, of a macro its name.
    selector: as it is written.
    argument: the parameter's name.
    references: all in its value.
  """
  scope: str
  selector: str
  argument: str
  references: tuple[_Reference, ...]

  @classmethod
  def of(cls, statement: config_parser.BindingStatement) -> "_Binding":
    scope, selector, argument = statement[:3]
    if not argument:
      scope = f"{scope}/{selector}" if scope else selector
      selector, argument = _MACRO, "value"
    return cls(scope, selector, argument, tuple(_references(statement.value)))

  @property
  def function(self):
    """What is bound: the same for all names that it has."""
    return gin.get_configurable(self.selector)


def _holds(scope: str, called: str) -> bool:
  """Whether a binding in `scope` counts where gin calls in the scope `called`."""
  return not scope or f"{called}/".startswith(f"{scope}/")


def _calls(bindings: Iterable[_Binding]) -> dict:
  """The scopes in which gin may call each function, by the function.

  A reference with a scope is called in it. One without is called in that of the
  function whose argument it is.
  """
  scopes = collections.defaultdict(set)
  by_function = collections.defaultdict(list)
  for binding in bindings:
    by_function[binding.function].append(binding)
  todo = [(reference.scope, gin.get_configurable(reference.selector))
          for binding in bindings for reference in binding.references
          if reference.scope]
  while todo:
    scope, function = todo.pop()
    if scope in scopes[function]:
      continue
    scopes[function].add(scope)
    todo += [(scope, gin.get_configurable(reference.selector))
             for binding in by_function[function]
             if _holds(binding.scope, scope)
             for reference in binding.references if not reference.scope]
  return scopes


def _counts(binding: _Binding, calls: dict) -> bool:
  """Whether gin may ever look at a binding. Those without a scope always."""
  return not binding.scope or any(
      _holds(binding.scope, scope) for scope in calls[binding.function])


def _check_effects(bindings: list[_Binding]) -> None:
  """Refuses what no text uses: gin takes a misspelt name for a new one.

  Args:
    bindings: of all files and the command line, also those that later ones
      replace. So what lost its last use to an override is fine.

  Raises:
    ValueError: a macro without a use, or a scope in which nothing is called.
  """
  calls = _calls(bindings)
  for binding in bindings:
    if _counts(binding, calls):
      continue
    known = sorted(calls[binding.function])
    near = difflib.get_close_matches(binding.scope, known, 1)
    if binding.function is gin.get_configurable(_MACRO):
      raise ValueError(
          f"macro {binding.scope!r} is not used by any binding; is it misspelt?"
          + (f" The nearest that is used: {near[0]!r}" if near else ""))
    called = [f"{scope}/{binding.selector}.{binding.argument}"
              for scope in near or known]
    if not called:
      called = [f"{binding.selector}.{binding.argument}"]
    raise ValueError(
        f"binding {binding.scope}/{binding.selector}.{binding.argument} has no "
        f"effect, for nothing refers to @{binding.scope}/{binding.selector}; "
        f"is it misspelt? With an effect: {', '.join(called)}")


def _leave_out_dead() -> None:
  """Takes back the bindings that overrides have left without an effect.

  Raises:
    ValueError: macros that are made of each other.
  """
  bindings = list(map(_Binding.of, (
      statement for statement in config_parser.ConfigParser(
          gin.config_str(max_line_length=10**6), _Unread())
      if isinstance(statement, config_parser.BindingStatement))))
  _check_macros(bindings)
  while True:
    calls = _calls(bindings)
    dead = [each for each in bindings if not _counts(each, calls)]
    if not dead:
      break
    bindings = [each for each in bindings if each not in dead]
    for each in dead:
      key = gin.config.ParsedBindingKey.parse(
          (each.scope, each.selector, each.argument)).config_key
      # gin has no way to take a binding back.
      gin.config._CONFIG.pop(key, None)  # pylint: disable=protected-access


def _check_macros(bindings: list[_Binding]) -> None:
  """Refuses macros that are made of each other: gin would not come to an end.

  Raises:
    ValueError: with their names.
  """
  inside = {binding.scope: [reference.scope for reference in binding.references
                            if reference.selector == _MACRO]
            for binding in bindings if binding.selector == _MACRO}

  def follow(name, chain):
    if name in chain:
      raise ValueError("macros must not be made of each other. Received: "
                       f"{' -> '.join([*chain[chain.index(name):], name])}")
    for other in inside.get(name, ()):
      follow(other, [*chain, name])
    inside[name] = ()  # All is well from here.

  for name in list(inside):
    follow(name, [])
