"""How much each source of evaluation examples counts in a choice (--eval_weights)."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from in2core_jax.data.sources import names_of
from in2core_jax.errors import UserError, how_many
from in2core_jax.pipeline.lists import in_order
from in2core_jax.pipeline.session import Session
from in2core_jax.pipeline.settings import Settings
from in2core_jax.selection import coreset
from in2core_jax.selection.aggregation import WEIGHED, Sources
from in2core_jax.selection.inputs import SIMILARITIES

_ALL_ALIKE = ("density", "loss_drop")  # rules in which no evaluation example can count more than another


def sources_of(session: Session, s: Settings) -> Sources | None:
  """The source of each evaluation example, and what each source counts; None without --eval_weights.

  Raises:
    UserError: not a number above 0 for each source.
  """
  if not s.eval_weights.strip():
    return None
  names = names_of(session.splits["eval"].records)
  known = list(dict.fromkeys(names))
  try:
    shares = np.array([float(word) for word in in_order(s.eval_weights, "eval_weights")])
  except ValueError:
    shares = np.zeros(0)
  if len(shares) != len(known) or not np.isfinite(shares).all() or not (shares > 0).all():
    raise UserError(
      f"--eval_weights={s.eval_weights}: need {len(known)} numbers above 0, one for each source that evaluation "
      f"examples come from: {', '.join(known)}"
    )
  place = {name: number for number, name in enumerate(known)}
  return Sources(np.array([place[name] for name in names]), shares / shares.sum())


def rows_of(session: Session, s: Settings) -> list[dict[str, Any]]:
  """What each source counts: `source`, `share`, and how many `examples` with a response share it; [] without weights.

  Raises:
    UserError: what `sources_of` refuses; a source whose share nobody has.
  """
  sources = sources_of(session, s)
  if sources is None:
    return []
  evals = session.splits["eval"]
  known = list(dict.fromkeys(names_of(evals.records)))
  counts = np.bincount(sources.codes[evals.num_response_tokens > 0], minlength=len(known)).tolist()
  if 0 in counts:
    raise UserError(
      f"--eval_weights={s.eval_weights}: no evaluation example of {known[counts.index(0)]} has a response, so nothing "
      "can have its share; leave the source out"
    )
  shares = zip(known, sources.shares.tolist(), counts, strict=True)
  return [{"source": name, "share": share, "examples": count} for name, share, count in shares]


def in_words(rows: Sequence[Mapping[str, Any]]) -> str:
  """`rows_of` in one line."""
  return ", ".join(f"{row['source']} {row['share']:.1%} ({how_many(row['examples'], 'example')})" for row in rows)


def check(session: Session, s: Settings, policies: Collection[str]) -> None:
  """Refuses weights that a rule would pass over.

  Raises:
    UserError: names the rule; or what `rows_of` refuses.
  """
  if not rows_of(session, s):
    return
  for policy in policies:
    similar = "hybrid" if policy == "auto" else policy  # what auto takes where it does not draw
    own = "mean" if policy in coreset.SCORE_POLICIES else SIMILARITIES.get(similar, "")
    how = own if s.aggregate == "auto" else s.aggregate if own else ""
    if policy in _ALL_ALIKE or (how and how not in WEIGHED):
      why = f"--aggregate={how}" if how else "it"
      raise UserError(
        f"--eval_weights={s.eval_weights} with policy {policy}: {why} has no weights; take --aggregate=mean or "
        "round_robin, or policy auto, hybrid, matching or proponents"
      )
