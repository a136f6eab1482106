"""What tells one run folder's identity from another's, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from etils import epath


def difference(path: epath.Path, old: Mapping[str, Any], new: Mapping[str, Any], most: int = 4) -> str:
  """The message for a folder of another identity: which flags and other facts differ, there and now."""
  old, new = _flatten(_as_told(old)), _flatten(_as_told(new))
  keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key, _ABSENT) != new.get(key, _ABSENT)]
  shown = [
    f"{key} is {_short(old.get(key, _ABSENT))} there and {_short(new.get(key, _ABSENT))} now" for key in keys[:most]
  ]
  more = f"; and {len(keys) - most} more" if len(keys) > most else ""
  return (
    f"{path}: holds a run of other settings: {'; '.join(shown)}{more}. "
    "Give another --run_dir, or --overwrite to remove that run's results"
  )


def common(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """(entries of one identity, of another one) that both have."""
  there, now = {}, {}
  for key in old.keys() & new.keys():
    pair = old[key], new[key]
    nested = [isinstance(value, Mapping) for value in pair]
    if nested[0] == nested[1]:
      there[key], now[key] = common(*pair) if all(nested) else pair
  return there, now


# Words of --write by the names under which identities keep them, so that older folders go on.
OLD_WRITES = {"query": "per_query", "layer": "per_layer", "token": "per_token", "self": "self_influence"}


def by_flags(kept: Mapping[str, Any]) -> dict[str, Any]:
  """Settings of an identity under the names of today's flags: budget in place of fraction, num_examples, token_budget.

  Args:
    kept: the entry "flags" of an identity.
  """
  kept = dict(kept)
  asked = {word: kept.pop(old) for word, old in OLD_WRITES.items() if old in kept}
  share, count, tokens = (kept.pop(name, None) for name in ("fraction", "num_examples", "token_budget"))
  named = {"dedup" if name == "drop_copies" else name: value for name, value in kept.items()}
  named |= {"write": ",".join(word for word, wanted in asked.items() if wanted)} if asked else {}
  if share or count or tokens:
    named["budget"] = f"{tokens}tok" if tokens else str(count or share)
  return named


def _as_told(identity: Mapping[str, Any]) -> dict[str, Any]:
  """An identity with its settings as flags."""
  facts = {key: value for key, value in identity.items() if key != "flags"}
  return facts | {f"--{name}": value for name, value in by_flags(identity.get("flags", {})).items()}


class _Absent:
  def __repr__(self) -> str:
    return "not set"


_ABSENT = _Absent()


def _short(value: Any, most: int = 60) -> str:
  text = repr(value)
  return text if len(text) <= most else text[: most - 3] + "..."


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested objects as dotted keys."""
  flat = {}
  for key, item in value.items():
    if isinstance(item, Mapping) and item:
      flat |= _flatten(item, f"{prefix}{key}.")
    else:
      flat[prefix + key] = item
  return flat
