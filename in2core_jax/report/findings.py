"""What a reader of a `select` run should mind: the one list of warnings of terminal, report.md and report.html.

`warnings` gathers them: those that the run itself has kept, what the data was not used for, and what the numbers of the
run say about data, choice, scores and solver. What was looked at and is fine is in `fine`.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from in2core_jax.data import summaries
from in2core_jax.errors import how_many
from in2core_jax.evaluation import statistics
from in2core_jax.report import table_text
from in2core_jax.report.facts import SelectRun

# Rules whose choice is a ranking by influence: what decides the ranking decides the choice.
BY_INFLUENCE = ("proponents", "opponents", "topic_quota", "length_matched_random")
_MANY_COPIES = 0.05  # share of the training set from which duplicates are warned of, chosen or not
_PARTS = {"train": "training", "eval": "evaluation", "test": "test"}
_LONGEST = 1000  # characters of a sentence


@dataclasses.dataclass(frozen=True)
class Finding:
  """A sentence about the data, the choice or the solve, and whether a reader should mind it."""

  text: str
  mind: bool


def warnings(run: SelectRun) -> list[str]:
  """Every warning, each once: of the retraining, of the run itself, then what follows from its data and numbers."""
  found = [*(run.retrain or {}).get("warnings", ()), *run.summary["warnings"], *summaries.told_lines(run.data)]
  found += [finding.text for finding in _measured(run) if finding.mind]
  return list(dict.fromkeys(map(as_line, found)))


def as_line(text: str) -> str:
  """A sentence as it is shown everywhere."""
  return table_text.plain_line(text, _LONGEST)


def fine(run: SelectRun) -> list[str]:
  """What was looked at and is no reason to worry."""
  return [finding.text for finding in _measured(run) if not finding.mind]


def _measured(run: SelectRun) -> list[Finding]:
  return [*_overlap(run.data["overlap"]), *_duplicates(run), *_solver(run), *_length(run), *_cut(run), *_influence(run)]


def overlap_warnings(overlap: Mapping[str, Mapping[str, int]]) -> list[str]:
  """What of `data_summary`'s overlap of the parts is to be minded, where there is no select run."""
  return [finding.text for finding in _overlap(overlap) if finding.mind]


def _overlap(overlap: Mapping[str, Mapping[str, int]]) -> list[Finding]:
  found = []
  for name, count in overlap.items():
    first, second = (_PARTS.get(part, part) for part in name.split("/"))
    same, prompts = count["same_messages"], count["same_prompt"]
    if not same and not prompts:
      found.append(Finding(f"No {second} example and no {second} prompt occurs in the {first} set.", False))
      continue
    occur = how_many(same, f"{second} example[s] [occurs|occur]")
    text = f"{occur} in the {first} set, and {how_many(prompts, '[has|have]')} a prompt that occurs there."
    found.append(Finding(text, True))
  return found


def _duplicates(run: SelectRun) -> list[Finding]:
  size, chosen = len(run.records), run.selected
  copies = size - len(np.unique(run.copies))
  kept = int(chosen.sum()) - len(np.unique(run.copies[chosen]))
  close, top = sum(len(group.rows) for group in run.top_copies), len(run.searched)
  mind = kept > 0 or copies > _MANY_COPIES * size
  are = "[is a duplicate|are duplicates] of"
  text = f"{how_many(copies, f'of the {size:,} training examples {are}')} an earlier one; "
  text += f"{how_many(kept, f'of the selected {are}')} another selected one."
  if mind:
    text += " To leave them out, use --dedup in finetune, select and evaluate."
  what = "first choices" if "choice" in run.columns else "strongest proponents"
  near = how_many(close, f"of the {top:,} {what} [is a near-duplicate|are near-duplicates] of another one.")
  return [Finding(text, mind), Finding(near, close > 0.1 * top)]


def _cut(run: SelectRun) -> list[Finding]:
  size, truncated = len(run.records), np.asarray(run.truncated, bool)
  cut, kept, empty = int(truncated.sum()), int((truncated & run.selected).sum()), int((run.response_tokens == 0).sum())
  text = how_many(cut, f"training example[s] ({cut / size:.1%}) [is|are] truncated; ")
  text += how_many(kept, "of them [is|are] selected.")
  if cut > 0.05 * size:
    text += " What was cut off does not count; a higher --max_length keeps it."
  without = how_many(empty, "training example[s] [has|have] no response token: influence 0, never selected.")
  return [
    Finding(text, cut > 0.05 * size),
    Finding(without, empty > 0),
    *(Finding(line, True) for line in _without_response(run.data["parts"])),
  ]


def _without_response(parts: Mapping[str, Mapping[str, int]]) -> list[str]:
  """What is lost of the evaluation and the test set, by their counts in `data_summary`."""
  lines = []
  for name, counts in parts.items():
    if name != "train" and counts["empty_responses"]:
      cut = " Some are truncated; a higher --max_length keeps more." if counts["truncated"] else ""
      those = f"of {counts['examples']:,} {_PARTS[name]} examples"
      said = f"{those} [has no response token and counts|have no response token and count] for nothing."
      lines.append(how_many(counts["empty_responses"], said) + cut)
  return lines


def _influence(run: SelectRun) -> list[Finding]:
  """What the ranking by influence has to do with length, loss and a few examples; to mind where it has decided."""
  found, decides = [], run.rule in BY_INFLUENCE
  for name, values in (("response length", run.response_tokens), ("loss", run.columns["loss"])):
    values = np.asarray(values, np.float64)
    rho = statistics.spearman(run.influence, values) if np.isfinite(values).all() else math.nan
    if math.isnan(rho):
      found.append(Finding(f"Influence and {name}: no rank correlation, because one of them is constant.", False))
    else:
      strong = abs(rho) > 0.3
      word = f" A ranking by influence is partly a ranking by {name}." if strong else ""
      found.append(Finding(f"Influence and {name}: Spearman {rho:+.2f}.{word}", strong and decides))
  positive = np.sort(np.maximum(run.influence, 0))[::-1]
  if positive[0] > 0:
    few = max(1, round(0.01 * len(positive)))
    share = positive[:few].sum() / positive.sum()
    text = f"The strongest 1 % of the examples ({few:,}) bring {share:.0%} of all positive influence."
    found.append(Finding(text, bool(share > 0.25) and decides))
  return found


def _length(run: SelectRun) -> list[Finding]:
  """What the choice itself, by whatever rule, has to do with length."""
  answered = run.response_tokens > 0  # the others are never selected
  chosen, lengths = run.selected[answered], run.response_tokens[answered].astype(np.float64)
  if chosen.all() or not chosen.any():
    return []
  longer = statistics.roc_auc(lengths, chosen)
  kept, left = lengths[chosen].mean(), lengths[~chosen].mean()
  word = f" The selection prefers {'long' if longer.mean > 0.5 else 'short'} responses."
  biased = abs(longer.mean - 0.5) > 0.15 and not longer.low <= 0.5 <= longer.high
  text = f"Selected examples have {kept:.1f} response tokens on average, the others {left:.1f}.{word if biased else ''}"
  said = any("it prefers short responses" in warning for warning in run.summary["warnings"])  # `selection_warnings`
  return [Finding(text, biased and not (said and longer.mean < 0.5))]


def _solver(run: SelectRun) -> list[Finding]:
  solver, residual = run.summary["solver"], run.summary["solver_residual"]
  name, steps = solver.get("solver", "solver"), run.summary["solver_steps"]
  if residual is None:
    return [Finding(f"The residual of {name} was not measured.", name != "identity")]
  shown = table_text.format_value(residual)
  if solver.get("converged") is False:  # some solvers know no tolerance
    return [Finding(_unsolved(run, name, f"{shown} after {how_many(steps, 'step')}", residual), True)]
  text = f"{name}: relative residual {shown} after {how_many(steps, 'step')}"
  worse = residual > 1
  return [Finding(f"{text}, worse than no answer, whose residual is 1." if worse else f"{text}.", worse)]


def _unsolved(run: SelectRun, name: str, reached: str, residual: float) -> str:
  flags = collections.ChainMap(dict(run.summary["solver"]), run.summary["identity"]["flags"])
  tolerance = flags.get("tol", flags.get("solver_tol"))
  asked = "" if tolerance is None else f" of {tolerance:g}"
  worse = " That is worse than no answer, whose residual is 1." if residual > 1 else ""
  absolute = run.summary["identity"]["flags"].get("damping") is not None
  remedies = ([] if name == "cg" else ["--solver=cg"]) + ["more --depth"]
  remedies += ["a higher --damping" if absolute else "a higher --damping_ratio"]
  return (
    f"{name} stopped above its tolerance{asked}, at a relative residual of {reached}.{worse} What helps: "
    f"{', '.join(remedies)}."
  )
