"""Where the responses stand in what a chat template renders.

The template is rendered once with marks in place of all texts, for each structure of a conversation (its roles and
keys). That rendering holds the template's own words alone. They tell for an assistant turn, whose text is M,

    ...<|im_end|>\\n | <|im_start|>assistant\\n ^ <think>\\n\\n</think>\\n\\n M <|im_end|> ^ \\n | <|im_start|>user...

its region (| to |) by the template's own loop, its start (first ^) where the generation prompt ends, its end (second ^)
behind the terminator.

The response is what the model has to write itself after the template's generation prompt. So an empty think block that
the template puts in front of an answer is response, unless the generation prompt holds it; where the prompt writes more
than stands in front of a finished answer (`<think>\\n` of the R1 distillations), what both have in common is prompt; a
template without a generation prompt has the words in front of an answer for its header. The terminator is what the
template writes behind every answer.

Each record's rendering is then checked against its structure, piece by piece. Where a template looks into the texts
(it cuts reasoning off, say), the pieces do not fit. Then the regions of its loop in the true rendering are used, and
the header and the terminator are looked for at their ends.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from in2core_jax.data import template_marks
from in2core_jax.data.template_program import DEFAULT_DATE, Message, Program, TemplateRefusal

_TURN_MARKS = ("\ue002", "\ue003")


@dataclasses.dataclass(frozen=True)
class Turn:
  """The template's words around a response.

  Attributes:
    region: (turn, n): its region begins at the n-th mark from the end that takes up this turn; None: there is none.
    lead: characters between the response's first character and its first mark.
    header: what stands in the region before the response.
    ahead: what the generation prompt would write beyond the header.
    tail: the template's words behind the last mark.
    terminator: how many characters of them, and of what the next turn begins with, are response.
    words: that stand in front of an answer where the generation prompt has others, and that are no marks of reasoning.
  """

  region: tuple[int, int] | None
  lead: int
  header: str
  ahead: str
  tail: str
  terminator: int
  words: str = ""


@dataclasses.dataclass(frozen=True)
class Structure:
  """A conversation of marks.

  Attributes:
    pieces: template, turn, key, template, turn, key, ..., template.
    turns: the assistant turns whose texts are rendered, by their numbers.
    lost: (turn, key) of what is not rendered.
    texts_only: nothing but content and reasoning was there to be rendered.
    as_text: the arguments of tool calls are given as JSON text.
    disorder: how the template moves or repeats turns, in words; "" where each stands once, in the order of the record.
  """

  pieces: list[str]
  turns: dict[int, Turn]
  lost: frozenset[tuple[int, str]]
  texts_only: bool
  as_text: bool
  disorder: str = ""


class Layout:
  """One chat template under one choice of the system prompt."""

  def __init__(self, source: str, tokenizer: Any, system_prompt: str, date: str = DEFAULT_DATE):
    """Compiles the template.

    Args:
      source: Jinja.
      tokenizer: whose special tokens the template may use.
      system_prompt: "default", "none" or a text, see `tokenizing.tokenize`.
      date: what the template is told that today is.

    Raises:
      TemplateRefusal: it is no valid Jinja, or does not end.
    """
    variables = {**tokenizer.special_tokens_map, **getattr(tokenizer, "template_tokens", {})}
    self.program = Program(source, variables, date)
    self._eos = getattr(tokenizer, "eos_token", None) or ""
    self._bos = getattr(tokenizer, "bos_token", None) or ""
    self._structures: dict[Any, Structure | None] = {}
    self._headers: dict[tuple[str, str], tuple[int, str]] = {}
    self._known: dict[str, Any] = {}
    self.system: tuple[Message, ...] = ()
    self.strip, self.prepend = "", ""
    if system_prompt == "none":
      self._learn_empty_system()
    elif system_prompt != "default":
      self.system = ({"role": "system", "content": system_prompt},)

  def _learn_empty_system(self) -> None:
    """Finds out how to keep the template from adding a system message of its own.

    An explicit empty system message replaces the template's default; its own rendering, known from rendering it
    alone, is then cut off the front. A template that refuses or ignores a system message needs nothing of this.
    """
    empty, probe = {"role": "system", "content": ""}, {"role": "user", "content": "a"}
    answer = {"role": "assistant", "content": "b"}
    try:
      alone, together = self.program.render([empty]), self.program.render([empty, probe])
      turns = [self.program.render([*system, probe, answer]) for system in ((), (empty,))]
    except TemplateRefusal:
      return
    # Where a system message renders as nothing by itself it is ignored, or folded into the first user turn (Gemma),
    # which an empty one would still change.
    if not alone.removeprefix(self._bos) or not together.startswith(alone):
      return
    # A template that counts turns, or takes them up in pairs, writes other words behind a system message.
    if not turns[0].endswith(turns[1].removeprefix(alone).removeprefix(self._bos)):
      return
    self.system, self.strip = (empty,), alone
    # Some templates write a beginning-of-sequence token before the system message: that one has to stay.
    if self._bos and alone.startswith(self._bos) and not together[len(alone) :].startswith(self._bos):
      self.prepend = self._bos

  # ---- rendering -----------------------------------------------------------------------

  def _full(self, messages: Sequence[Message]) -> list[Message]:
    """The messages that are given to the template; an example's own system message always stays."""
    full = list(messages) if messages and messages[0]["role"] == "system" else [*self.system, *messages]
    bare = [k for k, message in enumerate(full) if message.get("tool_calls") and not message["content"]]
    if bare and self._wants_null():
      for k in bare:
        full[k] = full[k] | {"content": None}
    return full

  def _wants_null(self) -> bool:
    """Whether calls without a text are rendered where their content is null, and not where it is an empty text."""
    if "null" not in self._known:
      call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
      user, answer = template_marks.conversation("user", "assistant")
      kept = []
      for self._known["null"] in (False, True):
        made = self._structure_of((user, answer | {"content": "", "tool_calls": [call]}), ())
        kept.append(made is not None and not _loses_calls(made))
      self._known["null"] = kept == [False, True]
    return self._known["null"]

  def _front(self, text: str, messages: Sequence[Message]) -> str:
    if not self.system or messages[0]["role"] == "system":
      return text
    return self.prepend + text.removeprefix(self.strip)

  def render(self, messages: Sequence[Message], tools: Sequence[dict] = (), generation_prompt: bool = False) -> str:
    """Returns the rendering of `messages`, which must hold at least one turn that is not a system message."""
    return self._front(self.program.render(self._full(messages), tools, generation_prompt), messages)

  def _render_cuts(
    self, messages: Sequence[Message], tools: Sequence[dict], marks: tuple[str, str]
  ) -> tuple[str, list[tuple[int, int]]]:
    """The rendering with (place, turn) of the loop's marks; turns count from the first of `messages`."""
    full = self._full(messages)
    text, cuts = self.program.render_marked(full, tools, marks)
    front = self._front(text, messages)
    moved, lead = len(front) - len(text), len(full) - len(messages)
    return front, [(max(0, place + moved), max(-1, turn - lead)) for place, turn in cuts]

  # ---- structure -----------------------------------------------------------------------

  def structure(self, messages: Sequence[Message], tools: Sequence[dict]) -> Structure | None:
    """The structure of a conversation; None where the template refuses marks in place of its texts."""
    key = (
      tuple(map(template_marks.shape, messages)),
      tuple((*sorted(t.get("function", t)), "function" in t) for t in tools),
    )
    if key not in self._structures:
      self._structures[key] = self._structure_of(messages, tools)
    return self._structures[key]

  def _structure_of(self, messages: Sequence[Message], tools: Sequence[dict]) -> Structure | None:
    made = None
    for as_text in (False, True):
      try:
        made = self._make_structure(messages, tools, as_text)
      except TemplateRefusal:
        continue
      if not _loses_calls(made):
        break
    return made

  def _make_structure(self, messages: Sequence[Message], tools: Sequence[dict], as_text: bool) -> Structure:
    marked, words = template_marks.marked_turns(messages, as_text)
    tool_marks, tool_words = template_marks.marked_tools(tools)
    text, cuts = self._render_cuts(marked, tool_marks, _TURN_MARKS)
    found = {(int(mark[1]), mark[2]) for mark in template_marks.MARK.finditer(text)}
    wanted = {(k, "c") for k, m in enumerate(marked) if m.get("content")}
    wanted |= {(k, "r") for k, m in enumerate(marked) if "reasoning_content" in m}
    words |= tool_words
    lost = {place for place, word in words.items() if word not in text} | (wanted - found)
    turns, places = {}, _Places(text, cuts)
    for k, message in enumerate(messages):
      if message["role"] == "assistant":
        turns[k] = self._turn(marked, tool_marks, text, places, k)
    return Structure(
      template_marks.MARK.split(text),
      {k: turn for k, turn in turns.items() if turn},
      frozenset(lost),
      not words,
      as_text,
      _disorder(marked, [(int(mark[1]), mark[2]) for mark in template_marks.MARK.finditer(text)]),
    )

  def _turn(self, marked: list[Message], tools: Sequence[dict], text: str, places: _Places, k: int) -> Turn | None:
    """The template's words around turn k in a rendering of marks."""
    own, cuts = places.of_turn.get(k), places.cuts
    if not own:
      return None
    first, last = min(own)[0], max(own)[1]
    low, high = places.around(k, first, last)
    region, region_end = places.last_cut(low, first), places.first_cut(last, high)
    start = cuts[region][0] if region >= 0 else self._prefix(marked[:k], tools, text, low, first) or low
    end = cuts[region_end][0] if region_end >= 0 else high
    is_last = k + 1 == len(marked)
    if region_end < 0 and not is_last:
      end = self._prefix(marked[: k + 1], tools, text, last, high) or end
    after = len(cuts) if region_end < 0 and is_last else region_end
    named = None
    if region >= 0 and after == region + 1:
      named = cuts[region][1], places.from_end(region)
    before = text[start:first]
    if marked[k].get("tool_calls") and not any(mark[0] == "\ue000" for mark in (text[slice(*o)] for o in own)):
      before = self._plain_header() if before.startswith(self._plain_header()) else before
    length, ahead = self._header(marked, tools, text, k, start, before)
    tail = text[last:] if is_last else text[last:end]
    terminator = len(tail.rstrip())
    if is_last:
      terminator = self._last_terminator(tail, text[last:end].rstrip(), before)
    elif not terminator:
      # Some end an answer where the next turn begins: then its words are those that end the last answer.
      final = self._final_terminator()
      terminator = len(tail) + len(final) if final and text.startswith(final, end) else 0
    words = before[length:].strip()
    words = words if ahead.strip() and "think" not in words else ""
    return Turn(named, first - start - length, before[:length], ahead, tail, terminator, words)

  def _prefix(self, messages: list[Message], tools: Sequence[dict], text: str, low: int, high: int) -> int:
    """Where the rendering of the first messages ends in that of all; 0 where it does not, or not in [low, high]."""
    try:
      part = self.render(messages, tools) if messages else ""
    except TemplateRefusal:
      return 0
    return len(part) if text.startswith(part) and low <= len(part) <= high else 0

  def _header(
    self, marked: list[Message], tools: Sequence[dict], text: str, k: int, start: int, before: str
  ) -> tuple[int, str]:
    """(how much of `before`, the words in front of a response, is header, what the prompt would write beyond it)."""
    key = (marked[k - 1]["role"] if k else "", before)
    if key not in self._headers:
      self._headers[key] = self._find_header(marked[:k], tools, text, start, before)
    return self._headers[key]

  def _find_header(
    self, messages: list[Message], tools: Sequence[dict], text: str, start: int, before: str
  ) -> tuple[int, str]:
    whole = (len(before) if before.strip() else 0), ""  # white space alone is no header: the model writes it
    try:
      prompt = self.render(messages, tools, generation_prompt=True) if messages else ""
      common = _common(prompt, text[: start + len(before)])
      knows = not messages or prompt != self.render(messages, tools)  # whether there is a generation prompt
      if common == len(prompt):
        if not knows and not before[common - start :].strip():  # Jinja drops the line break at the end of a template
          return whole
        return (common - start, "") if common > start else whole
      if not knows:
        return whole
    except TemplateRefusal:
      return whole
    ahead = prompt[common:]
    if common < start + len(before):  # what is common may end within a token
      common = start + len(text[start:common].rstrip("<[({|/"))
    return (common - start, ahead) if common > start else whole

  def _plain_header(self) -> str:
    """The words in front of an answer without calls."""
    if "header" not in self._known:
      self._known["header"] = ""
      plain = self.structure(template_marks.conversation("user", "assistant"), ())
      if plain and 1 in plain.turns:
        self._known["header"] = plain.turns[1].header
    return self._known["header"]

  def _last_terminator(self, tail: str, in_region: str, before: str) -> int:
    """How many characters of the words behind a conversation's last answer are its terminator."""
    every = self._middle_terminator()
    if every and tail.startswith(every):
      more = re.match(rf"(?:\s|{re.escape(self._eos)})*" if self._eos else r"\s*", tail[len(every) :])[0]
      return len(every) + len(more.rstrip())
    if in_region:
      tail = in_region
    header = before.strip()
    tail = tail.rstrip()
    return len((tail.removesuffix(header) if header else tail).rstrip())

  def _middle_terminator(self) -> str:
    """What the template writes behind an answer that another turn follows; "" where there is no such turn."""
    if "middle" not in self._known:
      self._known["middle"] = ""
      marked, _ = template_marks.marked_turns(
        template_marks.conversation("user", "assistant", "user", "assistant"), False
      )
      try:
        text, cuts = self._render_cuts(marked, (), _TURN_MARKS)
        turn = self._turn(marked, (), text, _Places(text, cuts), 1)
      except TemplateRefusal:
        return ""
      self._known["middle"] = turn.tail[: turn.terminator] if turn else ""
    return self._known["middle"]

  def _final_terminator(self) -> str:
    """What the template writes behind a conversation's last answer."""
    if "final" not in self._known:
      self._known["final"] = ""
      plain = self.structure(template_marks.conversation("user", "assistant"), ())
      turn = plain.turns.get(1) if plain else None
      self._known["final"] = turn.tail[: turn.terminator].strip() if turn else ""
    return self._known["final"]

  def renders_reasoning(self) -> bool:
    """Whether the template knows the reasoning of an answer."""
    if "reasoning" not in self._known:
      user, answer = template_marks.conversation("user", "assistant")
      plain = self.structure((user, answer | {"reasoning_content": "r"}), ())
      self._known["reasoning"] = plain is not None and (1, "r") not in plain.lost
    return self._known["reasoning"]


class _Places:
  """Where marks and cuts stand in a rendering of marks, by turn: conversations may have ten thousands of turns.

  Attributes:
    of_turn: {turn: [start, end) of its marks, and of its words in tool calls}.
    cuts: (place, turn) wherever the template takes up another turn.
  """

  def __init__(self, text: str, cuts: list[tuple[int, int]]):
    self._marks = [(*mark.span(), int(mark[1])) for mark in template_marks.MARK.finditer(text)]
    self._length, self.cuts, self._cuts = len(text), cuts, [place for place, _ in cuts]
    self.of_turn: dict[int, list[tuple[int, int]]] = collections.defaultdict(list)
    for start, end, k in self._marks:
      self.of_turn[k].append((start, end))
    for word in re.finditer(template_marks.WORD.format("([0-9]+)f[0-9]+"), text):
      self.of_turn[int(word[1])].append(word.span())
    self._of_cut: dict[int, list[int]] = collections.defaultdict(list)
    for i, (_, k) in enumerate(cuts):
      self._of_cut[k].append(i)

  def around(self, k: int, first: int, last: int) -> tuple[int, int]:
    """The end of the mark of another turn before `first`, and the start of one behind `last`."""
    before = bisect.bisect_right(self._marks, first, key=lambda mark: mark[1]) - 1
    while before >= 0 and self._marks[before][2] == k:
      before -= 1
    behind = bisect.bisect_left(self._marks, last, key=lambda mark: mark[0])
    while behind < len(self._marks) and self._marks[behind][2] == k:
      behind += 1
    low = self._marks[before][1] if before >= 0 else 0
    return low, self._marks[behind][0] if behind < len(self._marks) else self._length

  def last_cut(self, low: int, high: int) -> int:
    """The number of the last cut in [low, high]; -1: there is none."""
    i = bisect.bisect_right(self._cuts, high) - 1
    return i if i >= 0 and self._cuts[i] >= low else -1

  def first_cut(self, low: int, high: int) -> int:
    """The number of the first cut in [low, high]; -1: there is none."""
    i = bisect.bisect_left(self._cuts, low)
    return i if i < len(self._cuts) and self._cuts[i] <= high else -1

  def from_end(self, cut: int) -> int:
    """How many cuts take up the same turn from this one on."""
    same = self._of_cut[self.cuts[cut][1]]
    return len(same) - bisect.bisect_left(same, cut)


def _loses_calls(structure: Structure) -> bool:
  return any(part.startswith("call") for _, part in structure.lost)


def _disorder(messages: Sequence[Message], found: list[tuple[int, str]]) -> str:
  """How a rendering of marks moves or repeats turns; a system message may stand anywhere."""
  twice = min((k for (k, _), count in collections.Counter(found).items() if count > 1), default=None)
  if twice is not None:
    return f"renders turn {twice} ({messages[twice]['role']}) more than once"
  turns = [k for k, part in found if part == "c" and messages[k]["role"] != "system"]
  if turns != sorted(turns):
    return f"renders the turns in another order than the conversation has ({', '.join(map(str, turns))})"
  return ""


def _common(a: str, b: str) -> int:
  """The length of the longest common beginning."""
  low, high = 0, min(len(a), len(b))
  while low < high:
    middle = (low + high + 1) // 2
    low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
  return low
