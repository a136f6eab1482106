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

import collections
import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from in2core_jax.template_program import DEFAULT_DATE, Message, Program, TemplateRefusal

Span = tuple[int, int]

_MARK = re.compile("\ue000([0-9]+)([cr])\ue001")  # in place of content or reasoning; pieces: template, k, key, template
_TURN_MARKS = ("\ue002", "\ue003")
_WORD = "zq{}qz"  # in place of names and arguments, which a template may write as JSON: plain ASCII
_PRIVATE = range(0xF0000, 0xFFFFE)


@dataclasses.dataclass(frozen=True)
class Turn:
  """The template's words around a response.

  Attributes:
    region: (turn, n): its region begins at the n-th mark from the end that takes up this turn; None: there is none.
    lead: characters between the response's first character and its first mark.
    header: what stands in the region before the response.
    ahead: what the generation prompt would write beyond the header.
    tail: the template's words behind the last mark.
    terminator: how many characters of them are response.
  """

  region: tuple[int, int] | None
  lead: int
  header: str
  ahead: str
  tail: str
  terminator: int


@dataclasses.dataclass(frozen=True)
class Structure:
  """A conversation of marks.

  Attributes:
    pieces: template, turn, key, template, turn, key, ..., template.
    turns: the assistant turns whose texts are rendered, by their numbers.
    lost: (turn, key) of what is not rendered.
    texts_only: nothing but content and reasoning was there to be rendered.
    as_text: the arguments of tool calls are given as JSON text.
  """

  pieces: list[str]
  turns: dict[int, Turn]
  lost: frozenset[tuple[int, str]]
  texts_only: bool
  as_text: bool


@dataclasses.dataclass
class Rendered:
  """A rendered conversation.

  Attributes:
    text: what the template writes.
    spans: [start, end) in characters of each response.
    marked: they are those of the template's `{% generation %}` marks.
    notes: what the template does not render as it stands in the record: {words: how many turns}.
  """

  text: str
  spans: list[Span]
  marked: bool = False
  notes: collections.Counter = dataclasses.field(default_factory=collections.Counter)


class Layout:
  """One chat template under one choice of the system prompt."""

  def __init__(self, source: str, tokenizer: Any, system_prompt: str, date: str = DEFAULT_DATE):
    """Compiles the template.

    Args:
      source: Jinja.
      tokenizer: whose special tokens the template may use.
      system_prompt: "default", "none" or a text, see `data.tokenize`.
      date: what the template is told that today is.

    Raises:
      TemplateRefusal: it is no valid Jinja, or does not end.
    """
    self.program = Program(source, dict(tokenizer.special_tokens_map), date)
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
    try:
      alone, together = self.program.render([empty]), self.program.render([empty, probe])
    except TemplateRefusal:
      return
    # Where a system message renders as nothing by itself it is ignored, or folded into the first user turn (Gemma),
    # which an empty one would still change.
    if not alone.removeprefix(self._bos) or not together.startswith(alone):
      return
    self.system, self.strip = (empty,), alone
    # Some templates write a beginning-of-sequence token before the system message: that one has to stay.
    if self._bos and alone.startswith(self._bos) and not together[len(alone) :].startswith(self._bos):
      self.prepend = self._bos

  # ---- rendering -----------------------------------------------------------------------

  def _full(self, messages: Sequence[Message]) -> list[Message]:
    """The messages that are given to the template; an example's own system message always stays."""
    return list(messages) if messages and messages[0]["role"] == "system" else [*self.system, *messages]

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
    key = (tuple(map(_shape, messages)), tuple((*sorted(t.get("function", t)), "function" in t) for t in tools))
    if key not in self._structures:
      made = None
      for as_text in (False, True):
        try:
          made = self._make_structure(messages, tools, as_text)
        except TemplateRefusal:
          continue
        if not any(part.startswith("call") for _, part in made.lost):
          break
      self._structures[key] = made
    return self._structures[key]

  def _make_structure(self, messages: Sequence[Message], tools: Sequence[dict], as_text: bool) -> Structure:
    marked, words = _marked(messages, as_text)
    tool_marks, tool_words = _marked_tools(tools)
    text, cuts = self._render_cuts(marked, tool_marks, _TURN_MARKS)
    found = {(int(mark[1]), mark[2]) for mark in _MARK.finditer(text)}
    wanted = {(k, "c") for k, m in enumerate(marked) if m.get("content")}
    wanted |= {(k, "r") for k, m in enumerate(marked) if "reasoning_content" in m}
    words |= tool_words
    lost = {place for place, word in words.items() if word not in text} | (wanted - found)
    turns = {}
    for k, message in enumerate(messages):
      if message["role"] == "assistant":
        turns[k] = self._turn(marked, tool_marks, text, cuts, k)
    return Structure(
      _MARK.split(text),
      {k: turn for k, turn in turns.items() if turn},
      frozenset(lost),
      not words,
      as_text,
    )

  def _turn(
    self, marked: list[Message], tools: Sequence[dict], text: str, cuts: list[tuple[int, int]], k: int
  ) -> Turn | None:
    """The template's words around turn k in a rendering of marks."""
    own = [mark.span() for mark in _MARK.finditer(text) if int(mark[1]) == k]
    own += [mark.span() for mark in re.finditer(_WORD.format(f"{k}f[0-9]+"), text)]
    if not own:
      return None
    first, last = min(own)[0], max(own)[1]
    others = [mark.span() for mark in _MARK.finditer(text) if int(mark[1]) != k]
    low = max((end for _, end in others if end <= first), default=0)
    high = min((start for start, _ in others if start >= last), default=len(text))
    region = max((i for i, (place, _) in enumerate(cuts) if low <= place <= first), default=-1)
    region_end = min((i for i, (place, _) in enumerate(cuts) if last <= place <= high), default=-1)
    start = cuts[region][0] if region >= 0 else self._prefix(marked[:k], tools, text, low, first) or low
    end = cuts[region_end][0] if region_end >= 0 else high
    is_last = k + 1 == len(marked)
    if region_end < 0 and not is_last:
      end = self._prefix(marked[: k + 1], tools, text, last, high) or end
    after = len(cuts) if region_end < 0 and is_last else region_end
    named = None
    if region >= 0 and after == region + 1:
      named = cuts[region][1], sum(turn == cuts[region][1] for _, turn in cuts[region:])
    before = text[start:first]
    if marked[k].get("tool_calls") and not any(mark[0] == "\ue000" for mark in (text[slice(*o)] for o in own)):
      before = self._plain_header() if before.startswith(self._plain_header()) else before
    length, ahead = self._header(marked, tools, text, k, start, before)
    tail = text[last:] if is_last else text[last:end]
    terminator = len(tail.rstrip())
    if is_last:
      terminator = self._last_terminator(tail, text[last:end].rstrip(), before)
    return Turn(named, first - start - length, before[:length], ahead, tail, terminator)

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
      if common == len(prompt):
        return (common - start, "") if common > start else whole
      if prompt == self.render(messages, tools):  # the template knows no generation prompt
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
      plain = self.structure(_conversation("user", "assistant"), ())
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
      marked, _ = _marked(_conversation("user", "assistant", "user", "assistant"), False)
      try:
        text, cuts = self._render_cuts(marked, (), _TURN_MARKS)
        turn = self._turn(marked, (), text, cuts, 1)
      except TemplateRefusal:
        return ""
      self._known["middle"] = turn.tail[: turn.terminator] if turn else ""
    return self._known["middle"]

  def renders_reasoning(self) -> bool:
    """Whether the template knows the reasoning of an answer."""
    if "reasoning" not in self._known:
      user, answer = _conversation("user", "assistant")
      plain = self.structure((user, answer | {"reasoning_content": "r"}), ())
      self._known["reasoning"] = plain is not None and (1, "r") not in plain.lost
    return self._known["reasoning"]

  # ---- responses -----------------------------------------------------------------------

  def spans(self, messages: Sequence[Message], tools: Sequence[dict]) -> Rendered:
    """Renders a conversation and finds its responses: assistant turns behind the first user turn, `train` not False.

    Raises:
      TemplateRefusal: the template refuses the conversation, does not render a part of it, or the responses cannot be
        told from the template's words.
    """
    structure = self.structure(messages, tools)
    learnt = _learnt(messages)
    barred = {k for k, message in enumerate(messages) if message.get("train") is False}
    messages = [_clean(message, structure is not None and structure.as_text) for message in messages]
    try:
      rendered = Rendered(self.render(messages, tools), [])
    except TemplateRefusal as refusal:
      roles = " ".join(message["role"] for message in self._full(messages))
      raise TemplateRefusal(f"the chat template refuses the turns [{roles}]: {refusal}") from refusal
    self._check_parts(messages, structure, rendered.notes)
    if self.program.has_generation:
      self._by_generation(messages, tools, learnt, barred, rendered)
    elif structure is None or not (structure.texts_only and self._by_pieces(messages, structure, learnt, rendered)):
      self._by_regions(messages, tools, structure, learnt, rendered)
    return rendered

  def _check_parts(self, messages: list[Message], structure: Structure | None, notes: collections.Counter) -> None:
    """Refuses a conversation of which the template does not render a part that makes it another one; notes the rest."""
    lost = structure.lost if structure is not None else frozenset()
    for k, part in sorted(lost):
      if part == "r":
        if not self.renders_reasoning():
          raise TemplateRefusal("the chat template does not render reasoning (reasoning_content)")
        notes["reasoning left out"] += 1
      elif part.startswith(("call", "tool")):
        what = "tool definitions" if part.startswith("tool") else f"the tool calls of turn {k}"
        raise TemplateRefusal(f"the chat template does not render {what}")
      elif part == "name":
        notes["name of a turn left out"] += 1
      elif part == "c" and messages[k]["content"].strip():
        role = messages[k]["role"]
        if role in ("user", "tool"):
          raise TemplateRefusal(f"the chat template does not render turn {k} ({role})")
        notes["text beside a tool call left out" if messages[k].get("tool_calls") else f"{_NOUN[role]} left out"] += 1

  def _by_pieces(self, messages: list[Message], structure: Structure, learnt: list[int], rendered: Rendered) -> bool:
    """Finds the responses where the text is that of the structure with the record's texts, which may be trimmed."""
    text, pieces, at = rendered.text, structure.pieces, 0
    places: dict[int, list[int]] = {}
    trimmed = set()
    if not text.startswith(pieces[0]):
      return False
    at = len(pieces[0])
    for i in range(1, len(pieces), 3):
      k, following = int(pieces[i]), pieces[i + 2]
      own = messages[k]["content" if pieces[i + 1] == "c" else "reasoning_content"]
      for change in (str, str.strip, str.lstrip, str.rstrip):
        now = change(own)
        if text.startswith(now + following, at):
          break
      else:
        return False
      if now != own:
        trimmed.add(k)
      places.setdefault(k, [at, at])[1] = at + len(now)
      at += len(now) + len(following)
    if at != len(text):
      return False
    for k in learnt:
      if k in structure.turns:
        turn, (first, last) = structure.turns[k], places[k]
        start = first - turn.lead
        start += len(turn.ahead) if turn.ahead and text.startswith(turn.ahead, start) else 0
        rendered.spans.append((start, last + turn.terminator))
        rendered.notes["white space trimmed"] += k in trimmed
    return True

  def _by_regions(
    self,
    messages: list[Message],
    tools: Sequence[dict],
    structure: Structure | None,
    learnt: list[int],
    rendered: Rendered,
  ) -> None:
    """Finds the responses by the regions of the template's loop in the true rendering."""
    text, cuts = rendered.text, self._true_cuts(messages, tools, rendered.text)
    for k in learnt:
      turn = structure.turns.get(k) if structure is not None else None
      if structure is not None and turn is None:
        continue  # nothing of the answer is rendered
      span = _in_region(text, cuts, turn, k + 1 == len(messages)) if turn is not None else None
      if span is None:
        span = self._by_prefixes(messages, tools, text, turn, k)
      (start, end), terminator = span
      start = self._behind_prompt(messages[:k], tools, text, start, end)
      rendered.spans.append((start, end))
      rendered.notes[_change(messages[k], text[start : end - terminator])] += 1

  def _behind_prompt(self, before: list[Message], tools: Sequence[dict], text: str, start: int, end: int) -> int:
    """Where a response begins whose generation prompt, which may depend on the texts, reaches beyond `start`."""
    try:
      prompt = self.render(before, tools, generation_prompt=True) if before else ""
    except TemplateRefusal:
      return start
    return len(prompt) if start < len(prompt) <= end and text.startswith(prompt) else start

  def _true_cuts(self, messages: list[Message], tools: Sequence[dict], text: str) -> list[tuple[int, int]]:
    """The marks of the template's loop in the rendering of `messages`; none where marks change what is rendered."""
    free = (chr(code) for code in _PRIVATE if chr(code) not in text)
    marked, cuts = self._render_cuts(messages, tools, (next(free), next(free)))
    return cuts if marked == text else []

  def _by_prefixes(
    self, messages: list[Message], tools: Sequence[dict], text: str, turn: Turn | None, k: int
  ) -> tuple[Span, int]:
    """Finds a response where the template has no loop over turns: by what is rendered without those that follow."""
    before = self.render(messages[:k], tools, generation_prompt=True)
    through = text if k + 1 == len(messages) else self.render(messages[: k + 1], tools)
    if not (text.startswith(before) and text.startswith(through)) or len(before) > len(through):
      raise TemplateRefusal(
        f"the chat template renders turn {k} differently when other turns follow, so the response tokens cannot be "
        "located; use single-turn data or a template that renders turn by turn"
      )
    start, end = len(before), len(through.rstrip())
    if turn is not None and text.startswith(turn.header, start):
      start += len(turn.header)  # no generation prompt tells of it
    return (start, max(start, end)), 0

  def _by_generation(
    self, messages: list[Message], tools: Sequence[dict], learnt: list[int], barred: set[int], rendered: Rendered
  ) -> None:
    """Takes the spans that the template marks itself, but for turns that are not to be learnt."""
    full = self._full(messages)
    text, spans = self.program.render_generation(full, tools)
    moved = len(rendered.text) - len(text)
    spans = [(low + moved, high + moved) for low, high in spans if low + moved >= 0]
    cuts = self._true_cuts(messages, tools, rendered.text)
    answers = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    owners = [max((cut for cut in cuts if cut[0] <= low), default=(0, -1))[1] for low, _ in spans]
    if not set(owners) <= set(answers):
      owners = answers
    if barred and len(owners) != len(spans):
      raise TemplateRefusal("the chat template's generation marks do not follow its turns, one of which is not learnt")
    rendered.marked = True
    by_turn = collections.defaultdict(str)
    for i, (low, high) in enumerate(spans):
      owner = owners[i] if len(owners) == len(spans) else -1
      if owner not in barred:
        rendered.spans.append((low, high))
      by_turn[owner] += rendered.text[low:high]
    for k in learnt:
      if k in by_turn:
        rendered.notes[_change(messages[k], by_turn[k])] += 1


_NOUN = {"assistant": "answer", "system": "system message"}


def _conversation(*roles: str) -> tuple[Message, ...]:
  return tuple({"role": role, "content": role} for role in roles)


def _shape(message: Message) -> tuple:
  """What a structure keeps of a turn."""
  calls = message.get("tool_calls", ())
  return message["role"], tuple(sorted(message.keys() - {"train"})), bool(message["content"] or not calls), len(calls)


def _learnt(messages: Sequence[Message]) -> list[int]:
  """The assistant turns that are learnt: behind the first user turn, for others answer nothing, and not taken out."""
  first = next((k for k, m in enumerate(messages) if m["role"] == "user"), len(messages))
  return [
    k
    for k in range(first, len(messages))
    if messages[k]["role"] == "assistant" and messages[k].get("train") is not False
  ]


def _clean(message: Message, as_text: bool) -> Message:
  """A turn as it is given to the template: no `train`, arguments of calls as objects (or all as JSON text)."""
  message = {key: value for key, value in message.items() if key != "train"}
  if "reasoning_content" in message:
    message["thinking"] = message["reasoning_content"]  # as transformers does, for templates that know it by this name
  if "tool_calls" in message:
    message["tool_calls"] = [
      {**call, "function": {**call["function"], "arguments": _arguments(call["function"].get("arguments"), as_text)}}
      for call in message["tool_calls"]
    ]
  return message


def _arguments(value: Any, as_text: bool) -> Any:
  if as_text:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
  if isinstance(value, str):
    try:
      parsed = json.loads(value)
    except (ValueError, RecursionError):
      return value
    return parsed if isinstance(parsed, dict) else value
  return value


def _marked(messages: Sequence[Message], as_text: bool) -> tuple[list[Message], dict[tuple[int, str], str]]:
  """The same turns with marks in place of texts, and the words that must be found in their rendering."""
  words, marked = {}, []
  for k, message in enumerate(messages):
    calls = []
    for j, call in enumerate(message.get("tool_calls", ())):
      name, key, value = (_WORD.format(f"{k}{letter}{j}") for letter in "fav")
      words |= {
        (k, f"call {j}, its name"): name,
        (k, f"call {j}, an argument"): key,
        (k, f"call {j}, its value"): value,
      }
      calls.append({**call, "function": {"name": name, "arguments": {key: value}}})
    own = {"role": message["role"], "content": f"\ue000{k}c\ue001" if message["content"] or not calls else ""}
    if "reasoning_content" in message:
      own["reasoning_content"] = f"\ue000{k}r\ue001"
    if calls:
      own["tool_calls"] = calls
    if "name" in message:
      own["name"] = words[k, "name"] = _WORD.format(f"{k}n")
    if "tool_call_id" in message:
      own["tool_call_id"] = message["tool_call_id"]
    marked.append(_clean(own, as_text))
  return marked, words


def _marked_tools(tools: Sequence[dict]) -> tuple[list[dict], dict[tuple[int, str], str]]:
  """The same tool definitions with words in place of name, description and parameters; and these words."""
  marked, words = [], {}
  for i, tool in enumerate(tools):
    own = dict(tool.get("function", tool))
    for key in ("name", "description", "parameters"):
      if own.get(key):
        word = words[i, f"tool {key}"] = _WORD.format(f"{i}{key}")
        kind = {"type": "string", "description": "a"}
        own[key] = word if key != "parameters" else {"type": "object", "properties": {word: kind}, "required": [word]}
    marked.append({**tool, "function": own} if "function" in tool else own)
  return marked, words


def _common(a: str, b: str) -> int:
  """The length of the longest common beginning."""
  low, high = 0, min(len(a), len(b))
  while low < high:
    middle = (low + high + 1) // 2
    low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
  return low


def _in_region(text: str, cuts: list[tuple[int, int]], turn: Turn, is_last: bool) -> tuple[Span, int] | None:
  """A response in its region of a true rendering: its span, and how much of it is terminator; None: not to be found."""
  if turn.region is None:
    return None
  label, back = turn.region
  found = [i for i, (_, owner) in enumerate(cuts) if owner == label]
  if len(found) < back:
    return None
  start, following = cuts[found[-back]][0], found[-back] + 1
  stop = cuts[following][0] if following < len(cuts) else len(text)
  if not text.startswith(turn.header, start):
    return None
  start += len(turn.header)
  start += len(turn.ahead) if turn.ahead and text.startswith(turn.ahead, start) else 0
  end = len(text) if is_last else stop
  if text.endswith(turn.tail, start, end):
    return (start, end - len(turn.tail) + turn.terminator), turn.terminator
  return (start, start + len(text[start:stop].rstrip())), 0


def _change(message: Message, rendered: str) -> str:
  """In words what a template made of an answer; "" where it stands there whole."""
  content = message["content"]
  if content in rendered or message.get("tool_calls"):
    return ""
  bare, found = _bare(content), _bare(rendered)
  if bare in found:
    return "white space trimmed" if content.strip() in rendered else "white space changed"
  if not found:
    return "answer left out"
  reasoning, mark, answer = content.rpartition("</think>")
  if mark and _bare(answer) in found:
    reasoning = _bare(reasoning).removeprefix("<think>")
    return "white space changed" if reasoning in found else "reasoning left out"
  return "answer rewritten"


def _bare(text: str) -> str:
  return "".join(text.split())
