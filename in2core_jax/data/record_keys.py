"""What keys of records and turns mean when no shape reads them: nothing, something to be told, or a refusal.

Every key is read (`record_shapes.py`, `turns.py`), or without meaning for what is learnt (here), or it is told to the
user by name. Keys that make the conversation another one than we would render are refused: media, answers that were
rejected, turns or records that their owner has taken out of the loss in a way that we cannot follow.
"""

from __future__ import annotations

import json
from typing import Any

from in2core_jax.data.json_text import Decoder, Refused
from in2core_jax.data.key_names import is_empty, meant, snake
from in2core_jax.data.key_words import (
  ABOUT_LOSS,
  ANY_SIZE,
  CATEGORY,
  COUNTED_LISTS,
  DETAILS,
  LEARNT,
  MASKED_ROLES,
  NO_MEANING,
  NOT_LEARNT,
  OF_NUMBERS,
  OF_WORDS,
  PARTS,
  PERHAPS_TEXT,
  PREFERENCE,
  SAMPLE_WEIGHTS,
  SETTINGS,
  SHORT,
  SWITCH,
  UNWANTED,
  WANTED,
)
from in2core_jax.data.media import is_medium
from in2core_jax.errors import UserError


def has_no_meaning(key: str, value: Any) -> bool:
  """Whether the value is known to be without meaning for what is learnt: an id, a source, a score, a date, ..."""
  name = snake(key)
  parsed = _from_json(value)
  if _holds_parts(parsed):
    return False
  if name in ANY_SIZE:
    return not isinstance(parsed, str) or not name.startswith("meta")  # ChatGLM: the name of the tool that is called
  if name in COUNTED_LISTS or OF_NUMBERS.fullmatch(name):
    return isinstance(value, int | float) and not isinstance(value, bool)
  if name not in NO_MEANING and not OF_WORDS.fullmatch(name):
    return False
  most = CATEGORY if name in PERHAPS_TEXT else SHORT
  return len(value if isinstance(value, str) else json.dumps(value)) <= most


def _holds_parts(value: Any) -> bool:
  """Whether there is a key in it that is known to be a part of conversations, or to say what is learnt."""
  if isinstance(value, list):
    return any(map(_holds_parts, value))
  if not isinstance(value, dict):
    return False
  names = PARTS | LEARNT | NOT_LEARNT
  for key, item in value.items():
    if _holds_parts(item) or (not is_empty(item) and (meant(key) in names or is_medium(key))):
      return True
  return False


def _from_json(value: Any) -> Any:
  """The object or list that a text holds, as tables of texts have their metadata; anything else as it is."""
  if not isinstance(value, str) or value.lstrip()[:1] not in ("{", "["):
    return value
  try:
    return Decoder().whole(value)
  except Refused:
    return value


def column_type(key: str) -> str:
  """What a column of a table of texts holds under a name: "truth" or "number" values, which JSON would have as such."""
  name = snake(key)
  if name in WANTED | UNWANTED:
    return "truth"
  flags = LEARNT | NOT_LEARNT | SAMPLE_WEIGHTS | SETTINGS.keys() | COUNTED_LISTS
  return "number" if name in flags or _about_loss(name) or OF_NUMBERS.fullmatch(name) else "text"


def check_record_key(key: str, value: Any) -> bool:
  """Whether a key that no shape reads is settled by what we do anyway.

  Raises:
    UserError: it makes the record another one than what would be learnt from it.
  """
  name, flag = snake(key), flag_of(value)
  out = f"{key!r} is {shown(value)}"
  if name in WANTED | UNWANTED and isinstance(value, bool):
    if value is not (name in WANTED):
      raise UserError(f"{out}, an answer that is not to be learnt; remove such records")
    return True
  if PREFERENCE.fullmatch(name):
    raise UserError(
      f"{key!r} is there without the other answer: a preference pair has 'chosen' and 'rejected'; keep one answer, or "
      "name the columns, with data_fields=messages=chosen or data_fields=chosen=better,rejected=worse"
    )
  if meant(key) == "history" and isinstance(value, list | dict):
    raise UserError(f"{key!r} holds earlier rounds beside a list of turns; put them into the list, or remove the key")
  if name in SETTINGS:
    if flag is not SETTINGS[name]:
      raise UserError(
        f"{out}, which asks for other turns in the loss than every response; write 'train' into the turns"
      )
    return True
  if name == "mask" and isinstance(value, str):
    if value.lower() not in MASKED_ROLES:
      raise UserError(f"{out}, but the loss always passes over the user's turns and counts the responses")
    return True
  if name in _SETTLED:
    return _settles(out, key, value)
  if weighs(key, value):
    return True
  if name in SAMPLE_WEIGHTS and (isinstance(value, list) or (_is_number(value) and flag is None)):
    raise UserError(
      f"{out}, but all examples weigh the same here unless 'weight' is a number above 0 and up to a million; remove "
      "the key, or such records"
    )
  if DETAILS.fullmatch(name) or (_about_loss(name) and isinstance(value, list)):
    raise UserError(f"{key!r} says which parts of the record are learnt, which cannot be followed; {_WRITE_TRAIN}")
  if name in LEARNT | NOT_LEARNT and flag is not None:
    if flag is not (name in LEARNT):
      raise UserError(f"{out}, which takes the record out of the loss; remove such records")
    return True
  if _about_loss(name) and isinstance(value, bool):
    raise UserError(f"{out}, and it is not clear whether that takes the record out of the loss; remove the key")
  return False


def weighs(key: str, value: Any) -> bool:
  """Whether a key of a record says how much its loss counts in a training, as coreset.jsonl has it; 1 says nothing."""
  return key == "weight" and not isinstance(value, str) and _is_number(value) and value != 1 and 0 < value <= 1e6


def is_switch(value: Any) -> bool:
  """Whether a value says that there is reasoning, or how much, and is none itself."""
  return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in SWITCH)


_WRITE_TRAIN = "write 'train': true or false into the turns instead"


def turn_flag(turn: dict[str, Any], keys: list[str], at: str) -> tuple[bool | None, list[str]]:
  """What a turn says of its own place in the loss.

  Args:
    turn: the turn.
    keys: of it, those that nothing else reads.
    at: where it stands, for messages.

  Returns:
    (True: learnt, False: not, None: it says nothing; the keys that said so).

  Raises:
    UserError: a share of a weight, two that differ, parts of a turn, or a key of which it is not clear what it says.
  """
  found: dict[str, bool] = {}
  for key in keys:
    name, value = snake(key), turn[key]
    if is_empty(value):
      continue
    flag = flag_of(value)
    if name in LEARNT | NOT_LEARNT:
      if flag is None:
        raise UserError(f"{at} has {key}={shown(value)}: a turn is learnt (true, 1) or not (false, 0), nothing between")
      found[key] = flag is (name in LEARNT)
    elif DETAILS.fullmatch(name):
      raise UserError(f"{at} has {key!r}: a turn is learnt completely or not at all; {_WRITE_TRAIN}")
    elif _about_loss(name) and isinstance(value, bool | int | float | list):
      raise UserError(f"{at} has {key}={shown(value)}, and it is not clear whether it is learnt then; {_WRITE_TRAIN}")
  if len(set(found.values())) > 1:
    raise UserError(f"{at} is learnt by one of its keys and not by another: {', '.join(map(repr, found))}")
  return (next(iter(found.values())) if found else None), list(found)


# Whether an answer is one to be gone on with: keys that ask for it when they are true.
_SETTLED = frozenset(
  ["continue_final_message", "prefix", "partial", "is_prefix", "is_partial", "add_generation_prompt"]
)
_CHANNELS = ("final", "")
_TO_ALL = ("all", "user", "assistant", "")


def settles_turn(key: str, value: Any, role: str, at: str) -> bool:
  """Whether a key of a turn says what we do anyway.

  Raises:
    UserError: it makes the turn a beginning that others go on with, a thought or a call in another spelling, or a
      thought of somebody else than the assistant.
  """
  name = snake(key)
  if role == "assistant" and name in _SETTLED:
    return _settles(f"{at} has {key}={shown(value)}", key, value)
  if role == "assistant" and name == "channel" and isinstance(value, str):
    if value.strip().lower() not in _CHANNELS:
      raise UserError(f"{at} has {key}={shown(value)}: write what was thought as 'reasoning_content' of the answer")
    return True
  if role == "assistant" and name == "recipient" and isinstance(value, str):
    if value.strip().lower() not in _TO_ALL:
      raise UserError(f"{at} has {key}={shown(value)}: write a call of a tool as 'tool_calls'")
    return True
  if role != "assistant" and name in ("reasoning_content", "reasoning", "thinking") and isinstance(value, str):
    raise UserError(f"{at} has {key!r} in a turn of {role}; only the assistant thinks")
  return False


def _settles(what: str, key: str, value: Any) -> bool:
  """Whether a key says that the answer is whole, as all are here."""
  if flag_of(value) and snake(key) != "add_generation_prompt":
    raise UserError(
      f"{what}: an unfinished answer would be learnt as a finished one; finish it, or remove such records"
    )
  return flag_of(value) is not None


def _is_number(value: Any) -> bool:
  """Whether a value is a number, in a text too: tables of texts write them so."""
  if not isinstance(value, str):
    return isinstance(value, int | float) and not isinstance(value, bool)
  try:
    return float(value) == float(value)
  except ValueError:
    return False


def flag_of(value: Any) -> bool | None:
  """True, 1, 1.0, "true", "1" and their opposites; None for what is neither."""
  if isinstance(value, str):
    return {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}.get(value.strip().lower())
  return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


def _about_loss(name: str) -> bool:
  return not ABOUT_LOSS.isdisjoint(name.split("_"))


def shown(value: Any) -> str:
  """A value in a message."""
  text = json.dumps(value, ensure_ascii=False)
  return text if len(text) <= 60 else text[:60] + "..."
