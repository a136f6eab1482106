"""Reports of a selection and of retrained models, in Markdown."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from in2core_jax.errors import UserError, how_many
from in2core_jax.report.plots import score_edges
from in2core_jax.report.table_text import escape_markdown, format_value, markdown_table, plain_line

_TOPICS = 50  # rows of the topic table in a report


def score_histogram_text(scores: np.ndarray, selected: np.ndarray, bins: int = 15, width: int = 50) -> str:
  """Bars of characters: # selected, . left out; the outer bars hold what lies beyond."""
  scores, selected = np.asarray(scores, np.float64), np.asarray(selected, bool)
  edges = score_edges(scores, bins)
  inside = np.clip(scores, edges[0], edges[-1])
  every, kept = np.histogram(inside, edges)[0], np.histogram(inside[selected], edges)[0]
  lines = []
  for i, (count, inner) in enumerate(zip(every, kept, strict=True)):
    long = round(width * count / max(every.max(), 1))
    dark = round(long * inner / count) if count else 0
    bar = "#" * dark + "." * (long - dark)
    lines.append(f"{edges[i]:>10.3g} to {edges[i + 1]:>10.3g} | {bar:<{width}} | {count} ({inner} selected)")
  return "\n".join(lines)


def topic_table(topics: Sequence[str], selected: np.ndarray, response_tokens: np.ndarray) -> list[dict]:
  """One dict per topic, most dropped first: examples, selected, share kept, response tokens kept, change of share."""
  topics, selected = np.asarray(topics, dtype=np.str_), np.asarray(selected, bool)
  tokens = np.asarray(response_tokens, np.float64)
  names, codes = np.unique(topics, return_inverse=True)
  sizes, kept_sizes = np.bincount(codes), np.bincount(codes, selected).astype(int)
  all_tokens, kept_tokens = np.bincount(codes, tokens), np.bincount(codes, tokens * selected)
  table = []
  for i, (topic, size, kept) in enumerate(zip(names, sizes.tolist(), kept_sizes.tolist(), strict=True)):
    table.append(
      {
        "topic": str(topic),
        "examples": size,
        "selected": kept,
        "kept %": _percent(kept, size),
        "response tokens kept %": _percent(kept_tokens[i], all_tokens[i]),
        "share of pool %": _percent(size, topics.size),
        "share of coreset %": _percent(kept, selected.sum()),
      }
    )
  return sorted(table, key=lambda row: (row["kept %"], row["topic"]))


def _percent(part: float, whole: float) -> float | None:
  return round(100 * float(part) / float(whole), 1) if whole else None


def select_report_markdown(
  scores: Mapping[str, Sequence],
  texts: Sequence[str],
  summary: Mapping[str, Mapping],
  warnings: Sequence[str] = (),
  images: Mapping[str, str] | None = None,
  count: int = 10,
  answer: Sequence[str] = (),
) -> str:
  """The report of one `select` run.

  Args:
    scores: the columns of scores.parquet, [N] each: example_id, influence, rank (1 = highest), selected (bool),
      loss, num_tokens, num_response_tokens, topic; perhaps choice (1 = chosen first, 0 = left out) and reason.
    texts: N strings, what the examples say (prompt and response), in the same order; shortened and escaped here.
    summary: title of a section -> its names and values, such as {"Solver": {"solver": "lissa", "residual": 0.01},
      "Data": {...}}; each becomes a table.
    warnings: sentences, such as those of `findings.warnings`; escaped here.
    images: caption -> path or URL relative to the report, written by our own stages.
    count: examples to show at each end.
    answer: what to do with the selection, why, and further sentences (`answer.Answer`); they come first.

  Returns:
    Markdown, ending in a newline.

  Raises:
    UserError: a column is missing, or lengths differ.
  """
  needed = ("example_id", "influence", "rank", "selected", "num_tokens", "num_response_tokens", "topic")
  missing = [name for name in needed if name not in scores]
  if missing:
    raise UserError(f"report: columns {', '.join(missing)} are missing from the scores; found {', '.join(scores)}")
  lengths = {name: len(scores[name]) for name in needed} | {"texts": len(texts)}
  if len(set(lengths.values())) != 1 or not texts:
    raise UserError(f"report: columns differ in length or are empty: {lengths}")
  selected = np.asarray(scores["selected"], bool)
  order = np.argsort(np.asarray(scores["rank"]), kind="stable")
  parts = ["# Selection report"]
  if answer:
    word, *sentences = (escape_markdown(sentence, 1000) for sentence in answer)
    parts += [f"**{word}**: {' '.join(sentences)}"]
  parts += [_headline(scores, selected)]
  parts += ["## Warnings", "\n".join(f"- {escape_markdown(w, 1000)}" for w in warnings) or "None."]
  parts += [f"![{escape_markdown(caption)}]({path})" for caption, path in (images or {}).items()]
  parts += ["## Scores", "```text\n" + score_histogram_text(scores["influence"], selected) + "\n```"]
  parts += ["`#` selected, `.` left out; the outer bars hold everything beyond them."]
  if "choice" in scores:
    choice = np.asarray(scores["choice"], np.int64)
    first = np.argsort(np.where(choice == 0, len(choice) + 1, choice), kind="stable")[: min(count, (choice > 0).sum())]
    parts += ["## First choices", _examples_table(scores, texts, first, "reason")]
  parts += ["## Strongest proponents", _examples_table(scores, texts, order[:count])]
  parts += ["## Strongest opponents", _examples_table(scores, texts, order[::-1][:count])]
  topics = topic_table(scores["topic"], selected, scores["num_response_tokens"])
  parts += ["## Topics, most dropped first", markdown_table(topics[:_TOPICS]).rstrip()]
  parts += [f"{how_many(len(topics) - _TOPICS, 'more topic[s] [keeps|keep]')} more."] if len(topics) > _TOPICS else []
  for title, values in summary.items():
    rows = [{"name": name, "value": format_value(value)} for name, value in values.items()]
    parts += [f"## {escape_markdown(title)}", markdown_table(rows, ["name", "value"]).rstrip()]
  return "\n\n".join(parts) + "\n"


def _headline(scores: Mapping[str, Sequence], selected: np.ndarray) -> str:
  tokens = np.asarray(scores["num_response_tokens"], np.int64)
  influence = np.asarray(scores["influence"], np.float64)
  share = tokens[selected].sum() / max(tokens.sum(), 1)
  return (
    f"{how_many(selected.sum(), f'of {selected.size:,} examples [is|are]')} selected ({selected.mean():.1%}), with "
    f"{share:.1%} of the response tokens. {np.mean(influence > 0):.1%} of all examples are proponents (positive "
    "influence: more weight on them lowers the evaluation loss)."
  )


def _examples_table(scores: Mapping[str, Sequence], texts: Sequence[str], rows: np.ndarray, why: str = "") -> str:
  names = {"choice": "choice", why: "why"} if why else {}
  names |= {"rank": "rank", "influence": "influence", "selected": "selected", "topic": "topic"}
  names |= {"num_response_tokens": "response tokens", "example_id": "example_id"}
  table = []
  for row in rows:
    cells = {shown: scores[name][row] for name, shown in names.items()}
    # Bytes-like scalars of NumPy and Arrow come out as what format_value knows.
    cells = {shown: value.item() if hasattr(value, "item") else value for shown, value in cells.items()}
    cells |= {"topic": plain_line(cells["topic"], 60), "example_id": plain_line(cells["example_id"], 60)}
    cells |= {"why": plain_line(cells["why"])} if why else {}
    table.append({**cells, "text": plain_line(texts[row])})
  return markdown_table(table).rstrip()


def retrain_report_markdown(
  sections: Mapping[str, tuple[Sequence[Mapping], str]],
  settings: Mapping[str, object] | None = None,
  images: Mapping[str, str] | None = None,
  level: float = 0.95,
  notes: Sequence[str] = (),
  overviews: Mapping[str, Sequence[Mapping]] | None = None,
  warnings: Sequence[str] = (),
) -> str:
  """The report of retraining on each policy's set.

  Args:
    sections: title -> (the output of `verdict.summarise`, that of `verdict.verdict`, one line for each policy) of
      trainings that are compared with each other; a single one may have an empty title.
    settings: names and values of the recipe, such as steps and learning rate.
    images: caption -> path relative to the report.
    level: of the intervals in the table.
    notes: sentences about all sections together, such as that of `verdict.many_comparisons`.
    overviews: title -> rows of a table over all sections, which comes before them.
    warnings: sentences, which come first.

  Returns:
    Markdown, ending in a newline.
  """
  parts = ["# Retrain and compare"]
  if warnings:
    parts += ["## Warnings", "\n".join(f"- {escape_markdown(w, 1000)}" for w in warnings)]
  for title, lines in (overviews or {}).items():
    parts += [f"## {escape_markdown(title).capitalize()}", markdown_table(lines).rstrip()]
  for title, (table, verdict) in sections.items():
    lines = "\n".join(f"- {escape_markdown(line, 1000)}" for line in verdict.splitlines() if line.strip())
    heading = escape_markdown(title).capitalize() or ("Comparison" if warnings else "")
    parts += [f"## {heading}"] if heading else []
    parts += [lines, markdown_table(retrain_rows(table)).rstrip()]
  parts += [
    f"In brackets: {level:.0%} intervals that hold for new test examples and for new trainings. Perplexity is on the "
    "test set, lower is better; its own interval is wide, because test examples differ in difficulty. to_random is the "
    "ratio to random sets on the same test examples, which is what policies are compared by; in evaluation.csv also "
    "that to full data. A policy with one training has the spread of those with several."
  ]
  parts += [escape_markdown(note, 4000) for note in notes]
  parts += [f"![{escape_markdown(caption)}]({path})" for caption, path in (images or {}).items()]
  if settings:
    recipe = [{"name": name, "value": format_value(value)} for name, value in settings.items()]
    parts += ["## Recipe", markdown_table(recipe, ["name", "value"]).rstrip()]
  return "\n\n".join(parts) + "\n"


def retrain_rows(table: Sequence[Mapping]) -> list[dict]:
  """`verdict.summarise` as rows to print: perplexities and ratios to random sets with their intervals in a cell each.

  Keys `equal` and `fraction`, where rows have them, are shown when they differ.
  """
  rows, several = [], {name for name in ("equal", "fraction") if len({row.get(name) for row in table}) > 1}
  for summary in table:
    row = {name: summary[name] for name in ("equal", "fraction") if name in several}
    names = ("policy", "seeds", "examples", "response_tokens", "steps", "trained_tokens")
    row |= {name: summary[name] for name in names}
    ratios = [name for name in ("to_random", "example_to_random") if name in summary]
    for name in ("perplexity", "example_perplexity", *ratios):
      value, low, high = (summary[f"{name}{end}"] for end in ("", "_low", "_high"))
      bounds = "" if math.isnan(low) else f" ({low:.3f} to {high:.3f})"
      row[name] = "" if math.isnan(value) else f"{value:.3f}{bounds}"
    rows.append(row)
  return rows
