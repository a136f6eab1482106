"""What transfer writes: agreement of the models' scores, and their choices retrained."""

import logging

import numpy as np

from experiments.solvers.solvers import spearman_interval
from experiments.transfer.scorers import AS_LONG, COPIES_LAST, LONGEST, Scorer
from experiments.transfer.settings import TransferSettings
from in2core_jax.evaluation import statistics, verdict
from in2core_jax.report import table_text
from in2core_jax.report.markdown import retrain_rows
from in2core_jax.report.plots import perplexity_plot, write_figure
from in2core_jax.runs import run_folder
from in2core_jax.selection import coreset

log = logging.getLogger(__name__)


_LOSSES = ("its evaluation loss as given", "its evaluation loss where it scores")


_RATIOS = {"token": "ratio", "example": "ratio by example"}


def agreement_rows(
  scorers: list[Scorer], cells: dict[str, dict], rows: list[statistics.RetrainRow], at: str
) -> list[dict]:
  """One row a scorer: agreement with the trained model's own scores and choice, perplexity against its own choice.

  Args:
    scorers: the trained model first.
    cells: model -> what `Transfer.scored` gave.
    rows: the retrained models.
    at: word of --score_at.
  """
  own = next(iter(cells.values()))
  ids = sorted(own["influence"])
  values = lambda cell: np.array([cell["influence"][example] for example in ids])  # noqa: E731
  compared, mine = verdict.Comparison(rows), f"chosen by {scorers[0].model}"
  table = []
  for number, scorer in enumerate(scorers):
    cell = cells[scorer.model]
    row = {"scores by": scorer.model, "layers": f"{scorer.layers} of {cell['layers in all']}"}
    row |= {"parameters": cell["parameters"], "fine-tuned": at == "full", "learning rate": scorer.rate}
    row |= dict(zip(_LOSSES, (cell["eval loss as given"], cell["eval loss"]), strict=True))
    rank = spearman_interval(values(cell), values(own))
    row |= {"Spearman": rank.mean, "Spearman low": rank.low, "Spearman high": rank.high}
    row["top-half overlap"] = statistics.top_overlap(values(cell), values(own), 0.5)
    row["overlap of the choices"] = len(set(cell["selected"]) & set(own["selected"])) / len(own["selected"])
    name = f"chosen by {scorer.model}"
    row["perplexity"] = float(np.mean([one.perplexity for one in compared.groups[name]]))
    if number:
      for by, word in _RATIOS.items():
        ratio = compared.difference(name, mine, by).ratio()
        row |= {f"{word} to own": ratio.mean, f"{word} low": ratio.low, f"{word} high": ratio.high}
    table.append(row)
  return table


def sentences(table: list[dict], share: float, by_scores: bool = True) -> list[str]:
  """For each other model: is its choice as good for the trained model as the trained model's own?

  Args:
    table: `agreement_rows`.
    share: of the examples that is kept, which is the overlap that two random choices have.
    by_scores: whether the policy chooses by influence, so that agreement of scores says something of the choice.
  """
  lines = []
  for row in table[1:]:
    said = " and ".join(_against_own(row, *one) for one in _RATIOS.items())
    agreement = f"its choice shares {row['overlap of the choices']:.0%} with the model's own, {share:.0%} by chance"
    agreement += f"; Spearman of the scores {row['Spearman']:.2f}" if by_scores else ""
    lines.append(f"Chosen by {row['scores by']} ({agreement}): {said}.")
  before, after = _LOSSES
  for row in table:
    if row["fine-tuned"] and row[after] >= row[before]:
      lines.append(
        f"Mind that fine-tuning at learning rate {row['learning rate']:g} did not lower the evaluation loss of "
        f"{row['scores by']} ({row[before]:.3f} before, {row[after]:.3f} after): overfitted or diverged, it says "
        "little about the model; --model_rates gives it a rate of its own."
      )
  return lines


def _against_own(row: dict, by: str, word: str) -> str:
  """One clause of `sentences`, by token or by example."""
  ratio, low, high = (row[f"{word} {end}"] for end in ("to own", "low", "high"))
  if np.isnan(low):
    return f"by {by} {ratio:.3f} times the perplexity of the model's own choice (no interval: one training each)"
  bounds = f"{ratio:.3f} times, 95 % interval {low:.3f} to {high:.3f}"
  if low > 1 or high < 1:
    return f"by {by} perplexity {'above' if low > 1 else 'below'} that of the model's own choice ({bounds})"
  return f"by {by} perplexity not distinguishable from that of the model's own choice ({bounds})"


def beside(rows: list[statistics.RetrainRow]) -> list[str]:
  """For each choice its perplexity's ratio to that of sets as long as the own choice, without copies, the longest."""
  compared, lines = verdict.Comparison(rows), []
  for name in (name for name in compared.groups if name.startswith("chosen by ")):
    there = [other for other in (AS_LONG, COPIES_LAST, LONGEST) if other in compared.groups]
    lines.append(f"{name}: {'; '.join(verdict.clause(compared, name, other, other) for other in there)}.")
  return lines


def chance(rows: list[statistics.RetrainRow]) -> list[str]:
  """`verdict.many_comparisons` of all that is told: against full data, random sets, the own choice and its likes."""
  compared = verdict.Comparison(rows)
  chosen = [name for name in compared.groups if name.startswith("chosen by ")]
  likes = [name for name in (*chosen[:1], AS_LONG, COPIES_LAST, LONGEST) if name in compared.groups]
  more = {
    f"{name} against {other} by {by}": compared.difference(name, other, by)
    for name in chosen
    for other in likes
    for by in _RATIOS
    if name != other
  }
  return verdict.chance_sentence(compared.estimates() | more)


def printed(table: list[dict]) -> list[dict]:
  """`agreement_rows` with an interval in one cell."""

  def show(row: dict, *names: str) -> str:
    mean, low, high = (row[name] for name in names)
    return f"{mean:.3f}" if np.isnan(low) else f"{mean:.3f} ({low:.3f} to {high:.3f})"

  lines = []
  for row in table:
    line = {name: row[name] for name in ("scores by", "layers", "parameters", "learning rate", *_LOSSES)}
    line["Spearman with own scores"] = show(row, "Spearman", "Spearman low", "Spearman high")
    line |= {name: row[name] for name in ("top-half overlap", "overlap of the choices")}
    line["perplexity"] = f"{row['perplexity']:.3f}"
    for word in _RATIOS.values():
      names = [f"{word} {end}" for end in ("to own", "low", "high")]
      line[f"{word} to own choice"] = show(row, *names) if names[0] in row else "1"
    lines.append(line)
  return lines


def write(
  run_dir: run_folder.RunDir, s: TransferSettings, table: list[dict], rows: list, recipe: dict, about: str = ""
) -> None:
  """transfer.md, .csv, .tex, retrained.csv, .tex, the figure; transfer.json last."""
  summary, words = verdict.summarise(rows), verdict.verdict(rows)
  share = rows[-1].examples / rows[0].examples  # the first is full data, the last a choice
  by_scores = s.policy in coreset.SCORE_POLICIES
  lines = [*sentences(table, share, by_scores), *(line for line in words.splitlines() if line.strip())]
  lines += [*beside(rows), *chance(rows), *verdict.sensitivity([rows])]
  lines += filter(None, [about])
  write_figure(run_dir, "transfer", perplexity_plot(summary))
  columns = list(dict.fromkeys(name for row in table for name in row))
  run_dir.write_text("transfer.csv", table_text.csv_table(table, columns))
  run_dir.write_text("transfer.tex", table_text.latex_table(printed(table), caption=f"Who selects for {s.model}"))
  run_dir.write_text("retrained.csv", table_text.csv_table(summary))
  run_dir.write_text("retrained.tex", table_text.latex_table(retrain_rows(summary), caption="Retrained"))
  named = [{"name": name, "value": table_text.format_value(value)} for name, value in recipe.items()]
  parts = [f"# Who selects for {table_text.escape_markdown(s.model)}"]
  parts += ["\n".join(f"- {table_text.escape_markdown(line, 1000)}" for line in lines)]
  parts += ["![Test perplexity](plots/transfer.svg)", table_text.markdown_table(printed(table)).rstrip()]
  parts += [
    "Spearman and overlaps are with the trained model's own scores and choice; the interval is a bootstrap over "
    "training examples. Chance is 0 for Spearman, one half for the top halves, and for the choices the share that is "
    f"kept. {verdict.BRACKETS}",
    f'"{AS_LONG}": random sets with the response lengths of the trained model\'s own choice (response_tokens below '
    "tell how far another choice is from them): where a choice is no better, its gain over random sets may be one of "
    "length.",
  ]
  if any(row.policy == COPIES_LAST for row in rows):
    parts[-1] += f' "{COPIES_LAST}": random sets without a text twice while there is another: the same of '
    parts[-1] += "duplicates it leaves out."
  parts += ["## Retrained", table_text.markdown_table(retrain_rows(summary)).rstrip()]
  parts += ["## Recipe", table_text.markdown_table(named, ["name", "value"])]
  text = "\n\n".join(parts)
  run_dir.write_text("transfer.md", text)
  facts = {"table": table, "retrained": summary, "conclusions": lines, "recipe": recipe}
  run_dir.write_json("transfer.json", facts | {"devices": run_folder.device_summary()})
  log.info("\n%s", text)
