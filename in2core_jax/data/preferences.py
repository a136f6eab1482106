"""Preference pairs: a chosen and a rejected answer to one prompt, in the spellings in use -> two conversations.

What both sides begin with is the prompt, and none of it is learnt; what follows in each is learnt. TRL calls the prompt
explicit where it has a column of its own, and implicit where both sides hold the whole dialogue.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from in2core_jax.data.key_names import is_empty
from in2core_jax.data.record_keys import shown
from in2core_jax.data.turns import Message, TurnReader, clean, listed, type_name
from in2core_jax.errors import UserError

_TEXTS = ("response", "responses", "answer", "message", "messages", "conversation", "conversations")
_TEXTS += ("output", "completion", "text", "content", "reply")
SIDES = (
  ("chosen", "rejected"),
  *((f"chosen_{name}", f"rejected_{name}") for name in _TEXTS),
  *((f"{name}_chosen", f"{name}_rejected") for name in _TEXTS),
)
_HUMAN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant): ?")  # Anthropic's HH-RLHF


class Pair(NamedTuple):
  """What a record of a pair says.

  Attributes:
    chosen, rejected: the whole conversations, which begin with the same prompt.
  """

  chosen: list[Message]
  rejected: list[Message]


def sides_of(view: Mapping[str, Any]) -> tuple[str, str] | None:
  """The columns of the two answers; None for what is no pair.

  Raises:
    UserError: one of the two says nothing.
  """
  is_answer = lambda key: key in view and isinstance(view[key], str | list | dict | None)  # noqa: E731
  for sides in SIDES:
    if all(map(is_answer, sides)):
      empty = [key for key in sides if is_empty(view[key])]
      if len(empty) == 1:
        other = sides[empty[0] == sides[0]]
        raise UserError(f"{empty[0]!r} is empty beside {other!r}: a preference pair needs both answers; remove it")
      if not empty:
        return sides
  return None


def read_pair(
  view: Mapping[str, Any],
  sides: tuple[str, str],
  reader: TurnReader,
  context: Callable[[Mapping[str, Any], str], list[Message]],
) -> Pair:
  """Reads the two conversations of a pair.

  Args:
    view: columns of the record.
    sides: names of the chosen and the rejected answer.
    reader: of turns.
    context: reads the columns of a prompt, told what the chosen answer is; an empty list where there are none.

  Raises:
    UserError: no prompt, two prompts, a side without an answer, two equal sides, or what `reader` refuses.
  """
  written = {key: dialogue(item) if isinstance(item, str) else item for key, item in view.items()}
  found = [_side(written[key], key, reader) for key in sides]
  prompt = context(written, found[0][-1]["content"] if found[0] else "")
  whole = [bool(turns) and turns[0]["role"] != "assistant" for turns in found]
  if whole[0] != whole[1]:
    one, other = sides if whole[0] else sides[::-1]
    raise UserError(f"{one!r} begins with the prompt and {other!r} with the answer; write both in the same way")
  if not whole[0]:
    if not prompt:
      raise UserError(
        f"{sides[0]!r} and {sides[1]!r} are answers without a prompt: add a column 'prompt', or name it, for "
        "example with data_fields=prompt=question"
      )
    found = [[*prompt, *turns] for turns in found]
  for key, turns in zip(sides, found, strict=True):
    if not any(map(_answers, turns)):
      raise UserError(f"{key!r} has no answer; a preference pair needs both")
  size = _shared(*found)
  asked = found[0][:size]
  if not any(message["role"] == "user" for message in asked):
    first = [_first_words(turns) for turns in found]
    raise UserError(f"the two sides answer different prompts, {shown(first[0])} and {shown(first[1])}; remove the pair")
  if whole[0] and prompt:
    _check_prompt(prompt, asked, sides[0])
  pair = Pair(*([*_as_context(asked), *turns[size:]] for turns in found))
  for key, turns in zip(sides, pair, strict=True):
    if not any(_answers(message) for message in turns[size:]):
      raise UserError(f"{key!r} has no answer after the prompt that both sides share; remove the pair")
  if pair.chosen == pair.rejected:
    raise UserError(f"{sides[0]!r} and {sides[1]!r} are equal: there is nothing to prefer; remove the pair")
  return pair


def dialogue(text: str) -> Any:
  """The turns of a text `Human: ... Assistant: ...`, each after an empty line as in HH-RLHF; another text as it is."""
  before, *rest = _HUMAN.split(text)
  if before.strip() or not rest or rest[0] != "Human" or "Assistant" not in rest[::2]:
    return text
  roles = ["user" if speaker == "Human" else "assistant" for speaker in rest[::2]]
  turns = [{"role": role, "content": said.strip()} for role, said in zip(roles, rest[1::2], strict=True)]
  return turns[:-1] if turns[-1]["role"] == "assistant" and not turns[-1]["content"] else turns


def _side(value: Any, key: str, reader: TurnReader) -> list[Message]:
  """The turns of one side: a list of turns, one turn, or the text of the answer."""
  value = listed(value, key)
  if isinstance(value, str):
    return [{"role": "assistant", "content": clean(value)}]
  if isinstance(value, dict) and not all(isinstance(column, list) for column in value.values()):
    return [reader.turn(value, repr(key), key)]
  if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
    return [{"role": "assistant", "content": clean(value[0])}]
  if not isinstance(value, list | dict):
    raise UserError(f"{key!r} must be a text or a list of turns but is {type_name(value)}")
  return reader.turns(value, key)


def _shared(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
  """How many turns are the prompt: those that both sides begin with, up to the last turn before an answer of either."""
  most = min(len(chosen), len(rejected)) - 1
  size = next((i for i in range(most) if chosen[i] != rejected[i]), max(most, 0))
  while size and chosen[size]["role"] != "assistant" and rejected[size]["role"] != "assistant":
    size -= 1  # they part at a question: what was answered before is where they differ
  return size


def _check_prompt(prompt: Sequence[Message], asked: Sequence[Message], key: str) -> None:
  """Refuses a prompt of its own that is not the one that the sides begin with."""
  said = [(message["role"], message["content"].strip()) for message in asked]
  own = [(message["role"], message["content"].strip()) for message in prompt]
  if own == said[: len(own)] or (len(own) == 1 and own[0] in said):
    return
  plain = [message for message in said if message[0] != "system"]  # a system prompt may have a column of its own
  if own != plain[: len(own)]:
    raise UserError(
      f"the prompt {shown(own[-1][1])} is not the one that {key!r} begins with, {_shown_last(asked)}; keep one of them"
    )


def _shown_last(asked: Sequence[Message]) -> str:
  return shown(next(message["content"] for message in reversed(asked) if message["role"] == "user"))


def _first_words(turns: Sequence[Message]) -> str:
  return next((message["content"] for message in turns if message["role"] != "system"), "")


def _answers(message: Message) -> bool:
  learnt = message["role"] == "assistant" and message.get("train", True)
  return learnt and bool(message["content"].strip() or "tool_calls" in message or "reasoning_content" in message)


def _as_context(messages: Sequence[Message]) -> list[Message]:
  """The same turns out of the loss."""
  return [{**message, "train": False} if message["role"] == "assistant" else message for message in messages]
