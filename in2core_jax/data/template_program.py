"""A chat template as a program: compiled as transformers compiles it, with a fixed date, limits, and marks of turns.

Nothing but its arguments reaches a template: the date is the one that is given, chance is refused. A loop that does not
end, or a text that grows without end, is stopped and told.

Where a turn begins and ends in the rendering follows from the template's own loop: the program is compiled a second
time with a statement in front of the body of each `for` and behind each `set`, which writes a mark when its variable
holds another message than before. This needs no look at the texts, so no text can move it.
"""

from __future__ import annotations

import datetime
import functools
import re
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.visitor import NodeTransformer
from transformers.utils import chat_template_utils

from in2core_jax.errors import UserError, one_line

DEFAULT_DATE = "2024-07-26"  # what Llama 3.2's template prints where it is given no clock
# Variables by which templates take a date from their caller, and how it is written there.
DATE_VARIABLES = {"date_string": "%d %b %Y", "current_date": "%d %b %Y"}
_SECONDS = 10.0  # of computing in one rendering; the longest conversations take milliseconds
_MOST_STOPPED = 3  # renderings that take so long, before the template itself is refused
_MEMORY = 2**30  # bytes that one rendering may add to the process
_MOST_PARTS = 10**5  # that a filter may cut a text or a list into
_LONGEST = 2**24  # characters, or items, that one operation may make

Message = dict[str, Any]


class TemplateRefusal(ValueError):
  """The template refuses a conversation, or must not be run: the reason, in one line."""


class Program:
  """A compiled chat template.

  Attributes:
    date_used: the template takes the date from a variable, or has asked for it in any rendering so far.
    has_generation: the template marks what the model writes, by `{% generation %}`.
  """

  def __init__(self, source: str, variables: dict[str, str], date: str = DEFAULT_DATE):
    """Compiles a template.

    Args:
      source: Jinja.
      variables: names and texts that the template may use, such as `bos_token`.
      date: what the template is told that today is, as YYYY-MM-DD.

    Raises:
      TemplateRefusal: it is no valid Jinja.
    """
    self._today = datetime.datetime.fromisoformat(date)
    self.date_used = False
    self.has_generation = bool(re.search(r"\{%-?\s*generation\s*-?%\}", source))
    self._deadline, self._memory, self._stopped = 0.0, 0, 0
    self._environment = _environment(self._strftime)

    def compiled() -> None:
      self._variables = variables | self._date_variables(source)
      self._plain = self._environment.from_string(_instrument(self._environment.parse(source), turns=False))
      self._marked = self._environment.from_string(_instrument(self._environment.parse(source), turns=True))

    self._guarded(compiled)

  def _strftime(self, form: str) -> str:
    self.date_used = True
    return self._today.strftime(form)

  def _date_variables(self, source: str) -> dict[str, str]:
    unknown = jinja2.meta.find_undeclared_variables(self._environment.parse(source))
    return {name: self._strftime(form) for name, form in DATE_VARIABLES.items() if name in unknown}

  def render(self, messages: Sequence[Message], tools: Sequence[dict] = (), generation_prompt: bool = False) -> str:
    """Renders a conversation, as `apply_chat_template(..., tokenize=False)` does.

    Args:
      messages: the turns.
      tools: definitions, for the template's `tools`.
      generation_prompt: whether a header is to be written after which the model answers.

    Raises:
      TemplateRefusal: the template raises an exception, or was stopped.
    """
    arguments = self._arguments(messages, tools, generation_prompt)
    return self._guarded(lambda: self._plain.render(arguments))

  def render_generation(
    self, messages: Sequence[Message], tools: Sequence[dict] = ()
  ) -> tuple[str, list[tuple[int, int]]]:
    """(text, [start, end) of what stands between `{% generation %}` marks), by transformers' own tracker."""
    arguments = self._arguments(messages, tools, False)
    track = chat_template_utils._render_with_assistant_indices
    return self._guarded(lambda: track(compiled_template=self._plain, **arguments))

  def render_marked(
    self, messages: Sequence[Message], tools: Sequence[dict], marks: tuple[str, str]
  ) -> tuple[str, list[tuple[int, int]]]:
    """Renders a conversation with its turns' places.

    Args:
      messages: the turns.
      tools: definitions.
      marks: two characters that stand in no text.

    Returns:
      The text, and (place, turn) wherever the template takes up another turn, in the order of places; turn -1: none.
    """
    turns = _Turns(messages, marks, self._tick)
    arguments = self._arguments(messages, tools, False) | {
      "_turn": turns.at,
      "_enter": turns.enter,
      "_leave": turns.leave,
    }
    text = self._guarded(lambda: self._marked.render(arguments))
    pieces = re.split(f"{marks[0]}(-?[0-9]+){marks[1]}", text)
    places, start = [], 0
    for text, turn in zip(pieces[::2], pieces[1::2], strict=False):
      start += len(text)
      places.append((start, int(turn)))
    return "".join(pieces[::2]), places

  def _arguments(self, messages, tools, generation_prompt) -> dict[str, Any]:
    # The names of transformers' render_jinja_template; an answer's reasoning goes by both of its usual names.
    messages = messages if isinstance(messages, list) else list(messages)
    return {
      **self._variables,
      "messages": messages,
      "tools": list(tools) or None,
      "documents": None,
      "add_generation_prompt": generation_prompt,
      "_tick": self._tick,
    }

  def _tick(self) -> str:
    """Stops the template after its time, or when the process has grown: called in every turn of a loop or macro."""
    if time.thread_time() > self._deadline:
      self._stopped += 1
      if self._stopped >= _MOST_STOPPED:  # or each of 50,000 records would take as long
        raise UserError(
          f"the tokenizer's chat template was stopped after {_SECONDS:.0f} seconds, {self._stopped} times: its loops "
          "do not end in any useful time; correct it, or take another model"
        )
      raise TemplateRefusal(f"it was stopped after {_SECONDS:.0f} seconds: its loops do not end in any useful time")
    if _peak_memory() > self._memory:
      raise TemplateRefusal("it was stopped: its text grows without bound")
    return ""

  def _guarded(self, work: Callable[[], Any]) -> Any:
    self._deadline, self._memory = time.thread_time() + _SECONDS, _peak_memory() + _MEMORY
    try:
      return work()
    except (TemplateRefusal, UserError):
      raise
    except (MemoryError, RecursionError, OverflowError) as error:
      raise TemplateRefusal(f"it was stopped: it needs too much memory or depth ({type(error).__name__})") from None
    except Exception as error:  # a template is a foreign program, which can raise whatever Python's operators raise
      raise TemplateRefusal(one_line(error)) from error


class _Turns:
  """Writes a mark when the template takes up another turn of the conversation."""

  def __init__(self, messages: Sequence[Message], marks: tuple[str, str], tick: Callable[[], str]):
    self._numbers = {id(message): k for k, message in enumerate(messages)}
    self._marks, self._tick = marks, tick
    self._now, self._stack = -1, []

  def _mark(self, turn: int) -> str:
    if turn == self._now:
      return ""
    self._now = turn
    return f"{self._marks[0]}{turn}{self._marks[1]}"

  def at(self, value: Any) -> str:
    """A loop's or an assignment's variable holds `value` now."""
    self._tick()
    return self._mark(self._numbers.get(id(value), self._now)) if isinstance(value, dict) else ""

  def enter(self) -> str:
    """A loop begins."""
    self._stack.append(self._now)
    return ""

  def leave(self) -> str:
    """A loop has ended: what follows belongs to the turn from before it."""
    return self._mark(self._stack.pop())


def _peak_memory() -> int:
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024


def _environment(strftime: Callable[[str], str]) -> Any:
  """An environment of our own with the filters and globals of transformers, without clock, chance and huge texts."""
  environment = chat_template_utils._cached_compile_jinja_template("").environment
  environment.intercepted_binops = frozenset(("*", "**", "%", "+"))
  environment.binop_table.update({"*": _multiply, "**": _power, "%": _modulo, "+": _add})
  environment.optimized = False  # else constants are computed when it is compiled
  environment.globals["strftime_now"] = strftime
  environment.globals.pop("lipsum", None)
  environment.filters["random"] = _refuse_chance
  environment.filters["center"] = lambda value, width=80: str(value).center(_sized(width))
  environment.filters["format"] = lambda value, *args, **named: _modulo(str(value), named or args)
  for name in ("slice", "batch", "indent", "wordwrap", "truncate"):
    environment.filters[name] = _with_few(environment.filters[name])
  sandboxed = environment.call

  def call(context: Any, called: Any, *args: Any, **named: Any) -> Any:
    """As the sandbox calls, but for methods that would make a huge text by themselves."""
    text = getattr(getattr(called, "__wrapped__", called), "__self__", None)  # the sandbox wraps str.format
    if isinstance(text, str):
      _sized(max((value for value in (*args, *named.values()) if isinstance(value, int)), default=0))
      _sized(_largest(text) if called.__name__.startswith("format") else 0)
    return sandboxed(context, called, *args, **named)

  environment.call = call
  return environment


def _with_few(function: Callable) -> Callable:
  """A filter whose numbers are widths and counts of parts."""

  @functools.wraps(function)
  def checked(*args: Any, **named: Any) -> Any:
    for value in (*args, *named.values()):
      if isinstance(value, int) and value > _MOST_PARTS:
        raise TemplateRefusal(f"it was stopped: it asks for {value:,} parts, or columns, of a text")
    return function(*args, **named)

  return checked


def _refuse_chance(*_: Any) -> None:
  raise TemplateRefusal("it draws at random, so the same data would not give the same tokens")


def _sized(size: int) -> int:
  if size > _LONGEST:
    raise TemplateRefusal(f"it was stopped: it makes a text or a list of {size:,}")
  return size


def _size(value: Any) -> int:
  return len(value) if isinstance(value, (str, list, tuple)) else 0


def _multiply(left: Any, right: Any) -> Any:
  for value, times in ((left, right), (right, left)):
    if isinstance(times, int):
      _sized(_size(value) * times)
  return left * right


def _power(left: Any, right: Any) -> Any:
  if isinstance(right, int) and right > 1000:
    raise TemplateRefusal(f"it was stopped: it computes a power of {right:,}")
  return left**right


def _modulo(left: Any, right: Any) -> Any:
  if isinstance(left, str):
    _sized(_largest(left))
    values = right if isinstance(right, tuple) else (right,)
    _sized(max((value for value in values if isinstance(value, int)), default=0) if "*" in left else 0)
  return left % right


def _largest(form: str) -> int:
  """The largest number in a text that says how values are written: no width is larger."""
  return max(map(int, re.findall("[0-9]{1,18}", form)), default=0)


def _add(left: Any, right: Any) -> Any:
  _sized(_size(left) + _size(right))
  return left + right


def _instrument(tree: nodes.Template, turns: bool) -> nodes.Template:
  return _Instrument(turns).visit(tree).set_environment(tree.environment)


class _Instrument(NodeTransformer):
  """Puts a call of `_tick` into the body of each loop and macro, or (with `turns`) those that mark turns."""

  def __init__(self, turns: bool):
    self._turns = turns

  def visit_For(self, node: nodes.For) -> Any:  # noqa: N802 - the visitor's names
    """Ticks in the body of a loop, or marks what it runs over."""
    node = self.generic_visit(node)
    names = _names(node.target)
    if not self._turns:
      node.body = [_write(node, "_tick"), *node.body]
      return node
    node.body = [*(_write(node, "_turn", name) for name in names), *node.body]
    return [_write(node, "_enter"), node, _write(node, "_leave")]

  def visit_Assign(self, node: nodes.Assign) -> Any:  # noqa: N802
    """Marks what is set, with `turns`."""
    node = self.generic_visit(node)
    return [node, *(_write(node, "_turn", name) for name in _names(node.target))] if self._turns else node

  def visit_Macro(self, node: nodes.Macro) -> Any:  # noqa: N802
    """Ticks in the body of a macro."""
    node = self.generic_visit(node)
    node.body = [_write(node, "_tick"), *node.body]
    return node


def _names(target: nodes.Node) -> list[str]:
  if isinstance(target, nodes.Tuple):
    return [name for item in target.items for name in _names(item)]
  return [target.name] if isinstance(target, nodes.Name) else []


def _write(at: nodes.Node, function: str, argument: str = "") -> nodes.Node:
  arguments = [nodes.Name(argument, "load")] if argument else []
  call = nodes.Call(nodes.Name(function, "load"), arguments, [], None, None)
  return nodes.Output([call]).set_lineno(at.lineno)
