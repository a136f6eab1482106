"""Renders conversations and finds their responses, by the structures of `template_layout`."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

from in2core_jax.data import template_marks
from in2core_jax.data.template_layout import Layout, Structure, Turn
from in2core_jax.data.template_program import Message, TemplateRefusal

Span = tuple[int, int]

_PRIVATE = range(0xF0000, 0xFFFFE)


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


class Responses(Layout):
  """A chat template that renders conversations and tells where their responses stand."""

  def spans(self, messages: Sequence[Message], tools: Sequence[dict]) -> Rendered:
    """Renders a conversation and finds its responses: assistant turns behind the first user turn, `train` not False.

    Raises:
      TemplateRefusal: the template refuses the conversation, does not render a part of it, or the responses cannot be
        told from the template's words.
    """
    structure = self.structure(messages, tools)
    learnt = _learnt(messages)
    barred = {k for k, message in enumerate(messages) if message.get("train") is False}
    messages = [template_marks.clean(message, structure is not None and structure.as_text) for message in messages]
    try:
      rendered = Rendered(self.render(messages, tools), [])
    except TemplateRefusal as refusal:
      roles = " ".join(message["role"] for message in self._full(messages))
      raise TemplateRefusal(f"the chat template refuses the turns [{roles}]: {refusal}") from refusal
    self._check_parts(messages, structure, rendered.notes)
    if self.program.has_generation:
      _check_texts(messages, rendered)
      self._by_generation(messages, tools, learnt, barred, rendered)
    elif structure is None or not (structure.texts_only and self._by_pieces(messages, structure, learnt, rendered)):
      self._by_regions(messages, tools, structure, learnt, rendered)
    return rendered

  def _check_parts(self, messages: list[Message], structure: Structure | None, notes: collections.Counter) -> None:
    """Refuses a conversation of which the template does not render a part that makes it another one; notes the rest."""
    if structure is not None and structure.disorder:
      raise TemplateRefusal(f"the chat template {structure.disorder}; correct it, or use data with fewer turns")
    lost = structure.lost if structure is not None else frozenset()
    for k, part in sorted(lost):
      if part == "r":
        if not self.renders_reasoning():
          raise TemplateRefusal("the chat template does not render reasoning (reasoning_content)")
        notes["reasoning left out"] += 1
      elif part.startswith(("call", "tool")):
        what = "tool definitions" if part.startswith("tool") else f"the tool calls of turn {k}"
        raise TemplateRefusal(f"the chat template does not render {what}; take a model whose template does (--model)")
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
        rendered.notes[_AHEAD] += bool(turn.words)
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
    _check_texts(messages, rendered)
    text, cuts = rendered.text, self._true_cuts(messages, tools, rendered.text)
    of_turn = collections.defaultdict(list)
    for i, (_, owner) in enumerate(cuts):
      of_turn[owner].append(i)
    for k in learnt:
      turn = structure.turns.get(k) if structure is not None else None
      if structure is not None and turn is None:
        continue  # nothing of the answer is rendered
      span = _in_region(text, cuts, of_turn, turn, k + 1 == len(messages)) if turn is not None else None
      if span is None:
        span = self._by_prefixes(messages, tools, text, turn, k)
      (start, end), terminator = span
      start = self._behind_prompt(messages[:k], tools, text, start, end)
      rendered.spans.append((start, end))
      rendered.notes[_change(messages[k], text[start : end - terminator])] += 1
      rendered.notes[_AHEAD] += turn is not None and bool(turn.words)

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
      elif len(owners) == len(spans) or not spans:
        rendered.notes["answer outside of the generation marks, and not learnt"] += 1


_NOUN = {"assistant": "answer", "system": "system message"}
_AHEAD = "learnt with words in front that are not those of the generation prompt"


def _check_texts(messages: Sequence[Message], rendered: Rendered) -> None:
  """Notes texts of users, tools and systems that are not rendered as they stand.

  Raises:
    TemplateRefusal: one of them stands in front of what was said before it.
  """
  text, at = rendered.text, 0
  for k, message in enumerate(messages):
    role, content = message["role"], message["content"].strip()
    place = text.find(content, 0 if role == "system" else at)
    if place >= 0:
      at = at if role == "system" else place + len(content)
    elif role == "assistant":
      continue  # `_change` tells of it
    elif role != "system" and content in text:
      raise TemplateRefusal(
        f"the chat template renders turn {k} ({role}) before an earlier one; correct it, or use data with fewer turns"
      )
    elif _bare(content) not in _bare(text):
      rendered.notes[f"text of a {role} turn changed or left out"] += 1


def _learnt(messages: Sequence[Message]) -> list[int]:
  """The assistant turns that are learnt: behind the first user turn, for others answer nothing, and not taken out."""
  first = next((k for k, m in enumerate(messages) if m["role"] == "user"), len(messages))
  return [
    k
    for k in range(first, len(messages))
    if messages[k]["role"] == "assistant" and messages[k].get("train") is not False
  ]


def _in_region(
  text: str, cuts: list[tuple[int, int]], of_turn: dict[int, list[int]], turn: Turn, is_last: bool
) -> tuple[Span, int] | None:
  """A response in its region of a true rendering: its span, and how much of it is terminator; None: not to be found."""
  if turn.region is None:
    return None
  label, back = turn.region
  found = of_turn[label]
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
    if f"{reasoning}</think>" in found:
      return "white space changed"
    return "reasoning left out" if reasoning not in found else "answer rewritten"
  return "answer rewritten"


def _bare(text: str) -> str:
  return "".join(text.split())
