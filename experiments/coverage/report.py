"""What `coverage` says: signals against held-out topics, test points that are not covered, a figure."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.coverage.settings import CoverageSettings
from in2core_jax.errors import how_many
from in2core_jax.evaluation import coverage, statistics
from in2core_jax.pipeline.session import Session
from in2core_jax.report import table_text
from in2core_jax.report.plots import BLUE, ORANGE, SKY, VERMILION, write_figure
from in2core_jax.runs import run_folder

log = logging.getLogger(__name__)

POINTS = "eval"  # the part whose examples are the test points
YARDSTICK = "embedding, maximum"  # what influence has to be better than
YARDSTICKS = (YARDSTICK, "whitened embedding, relative maximum")
_LISTED = 10  # test points in each list


@dataclasses.dataclass(frozen=True)
class Findings:
  """What was found.

  Attributes:
    rows: of the table, one a signal.
    pooled: observations of all folds (`coverage.Pooled` of the experiment).
    whole: the test points under the whole training set.
    observed: the same under each fold's.
    counted: int, the test points that have a response.
    by_topic: one row a held-out topic.
  """

  rows: Sequence[dict]
  pooled: Any
  whole: Any
  observed: Sequence[Any]
  counted: np.ndarray
  by_topic: Sequence[dict]


def best(rows: Sequence[dict], words: tuple[str, ...]) -> dict:
  """The row of the highest AUC among signals whose name holds one of the words."""
  return max((row for row in rows if any(word in row["signal"] for word in words)), key=lambda row: row["AUC"])


def sentence(found: Findings, judged: str) -> str:
  """How well the judged signal finds held-out topics, against 0.9 and against the largest cosine of embeddings."""
  signals, pooled = found.pooled.signals, found.pooled
  own, embedding = (next(row for row in found.rows if row["signal"] == name) for name in (judged, YARDSTICK))
  looked = [best(found.rows, words) for words in (("base", "trained"), ("embedding",))]
  gap = coverage.area_difference(signals[judged], signals[YARDSTICK], pooled.uncovered, pooled.points)
  said = "cannot be distinguished from" if gap.low <= 0 <= gap.high else "is above" if gap.low > 0 else "is below"
  aim = "reaches" if own["AUC"] >= 0.9 else "does not reach"
  return (
    f"The influence received ({judged}) finds test points of held-out topics with an AUC of {own['AUC']:.3f} "
    f"({own['low']:.3f} to {own['high']:.3f}), which {aim} 0.9, and {said} the largest cosine of embeddings "
    f"({embedding['AUC']:.3f}): difference {gap.mean:+.3f} ({gap.low:+.3f} to {gap.high:+.3f} over redrawn test "
    f"points, for these topics and trainings). Found by looking at this table, the best influence signal is "
    f"{looked[0]['signal']} with "
    f"{looked[0]['AUC']:.3f}, the best of embeddings {looked[1]['signal']} with {looked[1]['AUC']:.3f}."
  )


def drop_area(pooled) -> statistics.Interval:
  """AUC with which the loss drop itself tells held-out topics: how far holding them out shows in the loss at all."""
  return coverage.area_interval(pooled.drop, pooled.uncovered, pooled.points)


def point_rows(session: Session, s: CoverageSettings, texts: Mapping[str, list[str]], found: Findings) -> list[dict]:
  """Every test point under the whole training set, the least covered first."""
  whole, points = found.whole, session.splits[POINTS]
  signal = whole.signals[s.coverage_signal]
  at = s.coverage_signal.rsplit(", ", 1)[1]
  rows = []
  for row in found.counted[np.argsort(signal[found.counted], kind="stable")]:
    rows.append(
      {
        "example_id": points.ids[row],
        "topic": points.topics[row],
        s.coverage_signal: signal[row],
        "embedding, maximum": whole.signals["embedding, maximum"][row],
        "loss before": whole.before[row],
        "loss after": whole.after[row],
        "text": table_text.plain_line(texts[POINTS][row], 200),
        "nearest": " | ".join(table_text.plain_line(texts["train"][i], 100) for i in whole.nearest[at][row]),
      }
    )
  return rows


def figure(found: Findings, judged: str) -> Figure:
  """AUC of every signal with its interval (left); the judged signal against the loss after fine-tuning (right)."""
  made = Figure(figsize=(11, 1.2 + 0.27 * len(found.rows)), layout="constrained")
  FigureCanvasAgg(made)
  left, right = made.subplots(1, 2, width_ratios=(1.2, 1))
  rows = sorted(found.rows, key=lambda row: row["AUC"])
  for place, row in enumerate(rows):
    color = BLUE if row["signal"].endswith(("base", "trained")) else ORANGE
    left.plot([row["low"], row["high"]], [place, place], color=color, linewidth=2)
    left.plot(row["AUC"], place, "o", color=color)
  left.plot([], [], "o", color=BLUE, label="influence received")
  left.plot([], [], "o", color=ORANGE, label="texts, embeddings, loss")
  left.axvline(0.5, color="grey", linewidth=1)
  left.axvline(0.9, color="grey", linestyle="--", linewidth=1)
  left.set_yticks(range(len(rows)), [row["signal"] for row in rows])
  left.set(xlabel="AUC for held-out topics, 95 % interval over redrawn test points", xlim=(0, 1))
  left.legend(frameon=False, fontsize=8, loc="upper left")
  pooled = found.pooled
  for known, color, label in (
    (False, SKY, "topic in training"),
    (True, VERMILION, "topic held out"),
  ):
    here = pooled.uncovered == known
    right.plot(pooled.signals[judged][here], np.exp(pooled.after[here]), ".", color=color, label=label, alpha=0.7)
  right.set(
    xlabel=f"influence received: {judged}", ylabel="perplexity of the test point after fine-tuning", yscale="log"
  )
  right.legend(frameon=False, fontsize=8)
  for plot in (left, right):
    plot.grid(alpha=0.3)
  return made


def write(
  run_dir: run_folder.RunDir, s: CoverageSettings, session: Session, texts: Mapping[str, list[str]], found: Findings
) -> None:
  """Tables, lists and figure; coverage.json last."""
  points = point_rows(session, s, texts, found)
  write_figure(run_dir, "coverage", figure(found, s.coverage_signal))
  run_dir.write_text("coverage.csv", table_text.csv_table(found.rows))
  run_dir.write_text(
    "coverage.tex", table_text.latex_table(found.rows, caption="Signals of coverage, held-out topics.")
  )
  run_dir.write_text("points.csv", table_text.csv_table(points))
  words = sentence(found, s.coverage_signal)
  text = markdown(s, session, found, points) + f"\n{words}\n"
  run_dir.write_text("coverage.md", text)
  run_dir.write_json(
    "coverage.json",
    {
      "rows": list(found.rows),
      "by_topic": list(found.by_topic),
      "observations": len(found.pooled.points),
      "folds": [
        {
          "topics": list(one.topics),
          "training_examples": len(one.rows),
          "uncovered": int(np.isin(np.array(session.splits[POINTS].topics)[found.counted], one.topics).sum()),
        }
        for one in found.observed
      ],
      "loss_drop_auc": str(drop_area(found.pooled)),
      "sentence": words,
      "devices": run_folder.device_summary(),
    },
  )
  log.info("\n%s", text)


def markdown(s: CoverageSettings, session: Session, found: Findings, points: Sequence[dict]) -> str:
  """The report but for its last sentence."""
  shown = ["topic", s.coverage_signal, "embedding, maximum", "loss before", "loss after", "text"]
  held = "; ".join(f"{', '.join(one.topics)} ({how_many(len(one.rows), 'example')} left)" for one in found.observed)
  return "\n".join(
    [
      "# Coverage\n",
      f"{len(session.splits['train'])} training examples, {len(found.counted)} test points (the evaluation set), "
      f"layers {s.layers}, solver {s.solver}, fine-tuned in layers {s.trainable_layers}. Held out: {held}.\n",
      f"Judged in {len(found.observed)} folds together: the {len(found.pooled.points) // len(found.observed)} test "
      "points whose topic has a training example; of duplicates one is a test point. A signal is high where the "
      "training set covers; AUC is that of a low signal for points of held-out topics. Intervals redraw test "
      "points; they say nothing of other held-out topics, between which AUC differs more (by fold), nor of other "
      "trainings (one a fold). Lower loss where the signal is higher is a negative correlation. 'base' and 'trained' "
      "say at which model gradients are taken. The loss drop of "
      "fine-tuning itself tells held-out topics with an AUC of "
      f"{drop_area(found.pooled)}.\n",
      "Mean, maximum and positive mass are over the training examples, of a test point's influence or cosine with "
      "each. Relative maximum holds that maximum against the highest value that other test points would give: "
      "(a - b) / (|a| + |b|). It sees the other points of a held-out topic, as whoever has the evaluation "
      "set does; a topic with a single test point looks covered to it.\n",
      "![Signals](plots/coverage.svg)\n",
      table_text.markdown_table(found.rows),
      "## By held-out topic\n",
      "Its test points against the covered ones of its fold. The loss drop of fine-tuning is what influence predicts: "
      "where it does not detect a topic, training on the others helped there as well.\n",
      table_text.markdown_table(found.by_topic),
      f"## Least covered by the whole training set ({s.coverage_signal})\n",
      table_text.markdown_table(points[:_LISTED], shown),
      "## Best covered, with the training examples that cover them\n",
      table_text.markdown_table(points[::-1][:_LISTED], [*shown, "nearest"]),
    ]
  )
