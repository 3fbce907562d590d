"""Which bindings of a configuration have an effect, and what they are called.

gin accepts a binding that nothing uses, and lets one in a scope win over one
without, whichever comes first. Here the first is refused. A later binding wins
in every file, so one that comes later and does not win is refused, too.
"""

import collections
import dataclasses
import difflib
import itertools
import re
from typing import Any, Callable, Iterable, Iterator, TypeVar

import gin
from gin import config_parser

MACRO = "gin.macro"
_Function = TypeVar("_Function", bound=Callable[..., Any])


def configurable(denylist: list[str] | None = None
                 ) -> Callable[[_Function], _Function]:
  """`gin.configurable`, which leaves a function its type.

  Type checkers take what gin's own decorator gives for `Any`, so a misspelt
  argument would pass.

  Args:
    denylist: arguments that must not be bound.
  """
  return gin.configurable(denylist=denylist)


def register(function: _Function) -> _Function:
  """`gin.register`, which leaves a function its type."""
  return gin.register(function)


@dataclasses.dataclass(frozen=True)
class Reference:
  """`@scope/selector`. `%scope` is one with the selector `gin.macro`."""
  scope: str
  selector: str


class Unread(config_parser.ParserDelegate):
  """Makes a `Reference` of every name in a value, whatever it stands for."""

  def configurable_reference(self, scoped_configurable_name, evaluate):
    scope, _, selector = scoped_configurable_name.rpartition("/")
    return Reference(scope, selector)

  def macro(self, macro_name):
    return Reference(macro_name, MACRO)


def _references(value) -> Iterator[Reference]:
  """All references in a value."""
  if isinstance(value, Reference):
    yield value
  elif isinstance(value, dict):
    for item in value.items():
      yield from _references(item)
  elif isinstance(value, (list, tuple)):
    for item in value:
      yield from _references(item)


@dataclasses.dataclass(frozen=True)
class Binding:
  """A binding. A macro is a binding of `gin.macro.value` in a scope.

  Attributes:
    scope: the scope, which for a macro is its name.
    selector: the function's name, as the text has it.
    argument: the parameter's name.
    references: all references in the value.
  """
  scope: str
  selector: str
  argument: str
  references: tuple[Reference, ...]

  @classmethod
  def of(cls, statement: config_parser.BindingStatement) -> "Binding":
    scope, selector, argument = statement[:3]
    if not argument:
      scope = f"{scope}/{selector}" if scope else selector
      selector, argument = MACRO, "value"
    return cls(scope, selector, argument, tuple(_references(statement.value)))

  @property
  def name(self) -> str:
    """The binding as a text has it, without its value."""
    scope = f"{self.scope}/" if self.scope else ""
    return f"{scope}{self.selector}.{self.argument}"

  @property
  def function(self):
    """The function that is bound, whichever of its names the text has."""
    return gin.get_configurable(self.selector)


def _holds(scope: str, called: str) -> bool:
  """Whether a binding in `scope` counts for a call in the scope `called`."""
  return not scope or f"{called}/".startswith(f"{scope}/")


def calls(bindings: Iterable[Binding]) -> dict:
  """The scopes in which gin may call each function, by the function.

  gin calls a reference with a scope in that scope, and one without in the scope
  of the function whose argument it is.
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


def _counts(binding: Binding, called: dict) -> bool:
  """Whether gin may ever use a binding. One without a scope always counts."""
  return not binding.scope or any(
      _holds(binding.scope, scope) for scope in called[binding.function])


def check_effects(bindings: list[Binding]) -> None:
  """Refuses bindings without a use: gin takes a misspelt name for a new one.

  Args:
    bindings: all bindings of the files and the command line, replaced ones too.
      So a binding whose last use was replaced is accepted.

  Raises:
    ValueError: nothing uses a macro, or nothing is called in a scope.
  """
  called = calls(bindings)
  for binding in bindings:
    if _counts(binding, called):
      continue
    known = sorted(called[binding.function])
    near = difflib.get_close_matches(binding.scope, known, 1)
    if binding.function is gin.get_configurable(MACRO):
      raise ValueError(
          f"macro {binding.scope!r} is not used by any binding; is it misspelt?"
          + (f" The nearest that is used: {near[0]!r}" if near else ""))
    works = [f"{scope}/{binding.selector}.{binding.argument}"
             for scope in near or known]
    if not works:
      works = [f"{binding.selector}.{binding.argument}"]
    raise ValueError(
        f"binding {binding.name} has no "
        f"effect, because nothing refers to @{binding.scope}/{binding.selector}; "
        f"is it misspelt? With an effect: {', '.join(works)}")


def check_winning(bindings: list[Binding], final: list[Binding]) -> None:
  """Refuses a binding that comes last and loses to an earlier, narrower one.

  If `searched/make_sampler.family` is bound, gin ignores `make_sampler.family`
  in the scope "searched". Who binds that afterwards expects that it wins.

  Args:
    bindings: all bindings of the files and the command line, in their order.
    final: those that are left of them, see `leave_out_dead`.

  Raises:
    ValueError: there is such a binding. The message names what has an effect.
  """
  by_argument = collections.defaultdict(list)
  for binding in bindings:
    if binding.selector != MACRO:
      by_argument[binding.function, binding.argument].append(binding)
  called = calls(final)
  lost = collections.defaultdict(list)  # The scopes that win, by binding.
  for (function, _), ordered in by_argument.items():
    for scope in sorted(called[function]):
      holding = [each for each in ordered if _holds(each.scope, scope)]
      if holding:
        winner = max(holding, key=lambda each: len(each.scope))
        if winner.scope != holding[-1].scope:
          lost[holding[-1]].append(winner)
  for binding, winners in lost.items():
    names, references = (", ".join(dict.fromkeys(found)) for found in (
        (each.name for each in winners),
        (f"@{each.scope}/{each.selector}" for each in winners)))
    raise ValueError(
        f"binding {binding.name} has no effect on {references}, because a "
        f"binding in the scope comes before one without. With an effect: {names}")


def _present() -> list[Binding]:
  """The bindings that gin has now."""
  return list(map(Binding.of, (
      statement for statement in config_parser.ConfigParser(
          gin.config_str(max_line_length=10**6), Unread())
      if isinstance(statement, config_parser.BindingStatement))))


def leave_out_dead() -> list[Binding]:
  """Takes back the bindings whose every use a later binding has replaced.

  Returns:
    The bindings that are left.

  Raises:
    ValueError: macros are made of each other.
  """
  bindings = _present()
  _check_macros(bindings)
  while True:
    called = calls(bindings)
    dead = [each for each in bindings if not _counts(each, called)]
    if not dead:
      return bindings
    bindings = [each for each in bindings if each not in dead]
    for each in dead:
      key = gin.config.ParsedBindingKey.parse(
          (each.scope, each.selector, each.argument)).config_key
      # gin has no function that takes a binding back.
      gin.config._CONFIG.pop(key, None)  # pylint: disable=protected-access


def _check_macros(bindings: list[Binding]) -> None:
  """Refuses macros that are made of each other: gin would expand them for ever.

  Raises:
    ValueError: names the macros.
  """
  inside = {binding.scope: [reference.scope for reference in binding.references
                            if reference.selector == MACRO]
            for binding in bindings if binding.selector == MACRO}

  def follow(name, chain):
    if name in chain:
      raise ValueError("macros must not be made of each other. Received: "
                       f"{' -> '.join([*chain[chain.index(name):], name])}")
    for other in inside.get(name, ()):
      follow(other, [*chain, name])
    inside[name] = ()  # Nothing that follows from here leads back.

  for name in list(inside):
    follow(name, [])


def working(name: str) -> str:
  """The name under which a binding has an effect where gin is now.

  Args:
    name: function and argument, such as "load_features.path".

  Returns:
    The name, with the scope that binds this argument now; if none does, with
    the one that binds others of the function. Without either it stays as it is:
    so it does in Python, where the name tells function and argument.
  """
  return _in_scope(name, gin.current_scope())


def _in_scope(name: str, scope: list[str]) -> str:
  function, _, argument = name.partition(".")
  bound = {}
  for end in range(len(scope), -1, -1):
    with gin.config_scope(None), gin.config_scope(scope[:end] or None):
      bound["/".join([*scope[:end], name])] = gin.get_bindings(
          function, resolve_references=False, inherit_scopes=False)
  return next(itertools.chain(
      (each for each in bound if argument in bound[each]),
      (each for each in bound if bound[each]), [name]))


def missing(error: Exception) -> str | None:
  """One line for gin's error of a required argument that nobody has given.

  Args:
    error: what gin has raised.

  Returns:
    A line such as "searched/make_sampler.num_steps must be bound", which names
    the binding that has an effect; None if it is another error.
  """
  text = str(error)
  found = re.match(
      r"Required bindings for `([\w.]+)` not provided in config: \[(.*?)\]", text)
  if not found:
    return None
  function, arguments = found[1], re.findall(r"'(\w+)'", found[2])
  # gin does not say in which scope it has called the function.
  scopes = [scope for scope in sorted(calls(_present())[
      gin.get_configurable(function)]) if not _bound(function, scope.split("/"))
            >= set(arguments)] or [""]
  names = [[_in_scope(f"{function}.{argument}", scope.split("/") if scope else [])
            for scope in scopes] for argument in arguments]
  return f"{', '.join(' or '.join(each) for each in names)} must be bound"


def _bound(function: str, scope: list[str]) -> set[str]:
  """The arguments of a function that are bound in a scope or around it."""
  with gin.config_scope(None), gin.config_scope(scope):
    return set(gin.get_bindings(function, resolve_references=False))
