"""Which test points the training set does not cover: influence received, against topics held out of the training set.

./run.sh coverage --flagfile=experiments/flags/coverage.flags

The test points are the evaluation examples. Each fold removes whole topics from the training set, whose test points are
then known not to be covered. One more training set, the whole one, gives the lists of points. Writes coverage.md
and points.csv into --run_dir.
"""

import dataclasses
import functools
import logging
from collections.abc import Sequence

import numpy as np

from experiments import flags
from experiments.coverage import report
from experiments.coverage.settings import CoverageSettings
from in2core_jax.data.records import spoken
from in2core_jax.data.subsets import distinct_points
from in2core_jax.errors import UserError
from in2core_jax.evaluation import coverage, statistics
from in2core_jax.influence import normalize
from in2core_jax.parallel import sharding
from in2core_jax.params import subtree
from in2core_jax.pipeline import solver_inputs
from in2core_jax.pipeline.checks import check_size
from in2core_jax.pipeline.finetune import trainable_rows
from in2core_jax.pipeline.projection import Projection
from in2core_jax.pipeline.retraining import Retrainer
from in2core_jax.pipeline.session import BoundSubtree, Session, choose, open_session
from in2core_jax.pipeline.settings import OTHER_POLICIES, listed, refuse
from in2core_jax.runs import resumable, run_folder
from in2core_jax.runs.result_cache import ResultCache
from in2core_jax.runs.unfinished import FOLDER, Work
from in2core_jax.selection import bm25, cosines
from in2core_jax.selection.whitening import WhitenedMetric, check_gradients

log = logging.getLogger(__name__)

POINTS = report.POINTS
_DOES = "coverage fine-tunes without the held-out topics itself; scores are of single test points, and choose nothing"
_REFUSED = (
  *("checkpoint", "normalize", "write=self", "write=layer", "write=token", "aggregate", "trajectory"),
  *("eval_weights", *OTHER_POLICIES),
)
_CELLS = "train and points"  # columns of the arrays in cells
AGGREGATES = ("mean", "maximum", "positive mass", "relative maximum")
BASE, TRAINED = "base", "trained"
_WHITENED = 0.01  # damping ratio of whitened embeddings
_DRAWS = 300  # of the bootstrap of each correlation; there are dozens
KINDS = ("", " cosine", " whitened cosine")  # of tables; the last of projected gradients alone


def influence_signals(projected: bool) -> tuple[str, ...]:
  """Names of the signals that are made of gradients."""
  kinds = KINDS if projected else KINDS[:2]
  return tuple(f"{name}{kind}, {at}" for at in (BASE, TRAINED) for kind in kinds for name in AGGREGATES)


def folds_of(session: Session, s: CoverageSettings) -> list[tuple[str, ...]]:
  """The topics that each fold holds out.

  Raises:
    UserError: topics without a test point or training example, or too few of them.
  """
  evals = session.splits[POINTS]
  there = {topic for topic, tokens in zip(evals.topics, evals.num_response_tokens, strict=True) if tokens}
  known = sorted((there & set(session.splits["train"].topics)) - {""})
  if s.hold_out_topics.strip().isdecimal():
    return coverage.deal_topics(known, int(s.hold_out_topics), s.folds, s.seed)
  names = listed(s.hold_out_topics)
  absent = [name for name in names if name not in known]
  if absent or not 0 < len(set(names)) < len(known):
    what = f"there is no test point and training example of {absent[0]!r}" if absent else "hold out some, not all"
    raise UserError(f"--hold_out_topics={s.hold_out_topics}: {what}; topics with both are {', '.join(known)}")
  return [tuple(sorted(set(names)))]


def measured(session: Session, s: CoverageSettings, chosen: BoundSubtree, work: Work) -> dict[str, normalize.Measures]:
  """Scores of every test point with every example of "train" and of POINTS, and norms for cosines.

  `--query_block` test points at a time.
  """
  size, found = len(session.splits[POINTS]), {part: [] for part in ("train", POINTS)}
  block = min(s.query_block, size)
  examples = {part: session.batcher(part, chosen.tree, chosen.params) for part in found}
  for start in range(0, size, block):
    rows = np.minimum(np.arange(start, start + block), size - 1)  # a filled last block compiles nothing new
    points = session.batcher(POINTS, chosen.tree, chosen.params, rows)
    v = sharding.place_vectors(chosen.problem.gradients(session.stream(points), len(rows)), session.batching.mesh, True)
    pieces = work.pieces(f"solver-{start}", queries=resumable.tree_sha256(v))
    result = solver_inputs.solve(session, s, chosen, v, pieces)
    for part, batcher in examples.items():
      stream = session.stream(batcher, f"influence of {part} on test points {start}..{rows[-1]} of {size}")
      block_found = normalize.measure(chosen.problem, stream, len(batcher), result.solution)
      kept = {name: getattr(block_found, name)[: size - start] for name in ("scores", "direction_norms")}
      found[part].append(dataclasses.replace(block_found, **kept))
  join = lambda blocks, name: np.concatenate([getattr(block, name) for block in blocks])  # noqa: E731
  return {
    part: dataclasses.replace(blocks[0], **{name: join(blocks, name) for name in ("scores", "direction_norms")})
    for part, blocks in found.items()
  }


def tables_of(session: Session, s: CoverageSettings, params, work: Work) -> np.ndarray:
  """Tables of `KINDS`: every test point with every example of "train" and of POINTS, float64 [2 or 3, Q, N + Q].

  With `--score_path=projected` of projected gradients: one pass, whatever the number of test points.
  """
  if s.score_path == "projected":
    projection = Projection(session, s, params, s.seed)
    return tables_from(projection.features("train"), projection.features(POINTS), session.splits["train"].ids)
  found = measured(session, s, choose(session, params, s.layers, s.modules), work)
  return np.concatenate([np.stack([part.scores, normalize.cosine(part)]) for part in found.values()], axis=2)


def tables_from(train: np.ndarray, points: np.ndarray, ids: Sequence[str]) -> np.ndarray:
  """Scores, cosines and cosines in the training set's whitened metric, of projected gradients, float64 [3, Q, N + Q].

  Args:
    train: [N, W].
    points: [Q, W].
    ids: N example ids.
  """
  check_gradients(train, "training")
  check_gradients(points, "evaluation")
  every = np.concatenate([train, points]).astype(np.float64)
  wide = every[len(train) :]
  plain = cosines.unit(wide) @ cosines.unit(every).T
  return np.stack([wide @ every.T, plain, WhitenedMetric.fit(every[: len(train)], ids=ids).cosines(wide, every)])


@dataclasses.dataclass(frozen=True)
class Observed:
  """The test points under one training set.

  Attributes:
    topics: held out of it; none for the whole training set.
    rows: of the whole training set, those that it has.
    signals: name -> float64 [Q], high where it covers.
    before: mean nats of each test point at the base model, float64 [Q].
    after: the same after fine-tuning on it.
    nearest: name -> int [Q, 3], rows of the whole training set that cover the point best by cosine.
  """

  topics: tuple[str, ...]
  rows: np.ndarray
  signals: dict[str, np.ndarray]
  before: np.ndarray
  after: np.ndarray
  nearest: dict[str, np.ndarray]


class Study:
  """Trains and scores under each training set; what is finished is kept in cells."""

  def __init__(
    self, session: Session, s: CoverageSettings, run_dir: run_folder.RunDir, folds: Sequence[tuple[str, ...]]
  ):
    self.session, self.settings, self.cells, self.folds = session, s, ResultCache(run_dir), folds
    self._run_dir = run_dir
    self.texts = {part: [text_of(record) for record in session.splits[part].records] for part in ("train", POINTS)}
    silent = session.splits[POINTS].num_response_tokens == 0
    self.ignored = np.eye(len(silent), dtype=bool) | silent[None, :]

  def rows(self, topics: tuple[str, ...]) -> np.ndarray:
    """Training examples of other topics."""
    return np.flatnonzero([topic not in topics for topic in self.session.splits["train"].topics])

  @functools.cached_property
  def judge(self) -> Retrainer:
    """One for all training sets, which are trained for the same steps by one program."""
    return Retrainer(self.session, self.settings, [self.answered(topics) for topics in ((), *self.folds)])

  @functools.cached_property
  def before(self) -> np.ndarray:
    """Mean nats of each test point at the base model, float64 [Q], the same for all training sets."""
    return self.judge.losses(self.judge.sub, POINTS)

  def answered(self, topics: tuple[str, ...]) -> np.ndarray:
    """Those of `rows` that have a response."""
    return np.intersect1d(self.rows(topics), trainable_rows(self.session))

  def observe(self, topics: tuple[str, ...]) -> Observed:
    """All signals and losses with some topics held out."""
    rows = self.rows(topics)
    tables_there = ("whitened",) if self.settings.score_path == "projected" else ()
    name = (TRAINED, _CELLS, *tables_there, *topics)
    cell = self.cells.get(lambda: self._train_and_score(topics, rows, name), *name, with_array=True)
    tables = {BASE: self._base_scores(topics, rows), TRAINED: self.cells.read_array(*name)}
    signals, nearest, size = {}, {}, len(rows)
    for at, table in tables.items():
      for kind, values in zip(KINDS, table, strict=False):
        found = coverage.received(values[:, :size])
        found["relative maximum"] = coverage.relative_maximum(values[:, :size], values[:, size:], self.ignored)
        signals |= {f"{name}{kind}, {at}": value for name, value in found.items()}
      nearest[at] = rows[np.argsort(-table[1, :, :size], axis=1, kind="stable")[:, :3]]
    before, after = np.array(cell["before"]), np.array(cell["after"])
    signals |= self._texts_and_embeddings(rows) | {"loss before": -before}
    return Observed(topics, rows, signals, before, after, nearest)

  def _train_and_score(self, topics: tuple[str, ...], rows: np.ndarray, name: tuple[str, ...]) -> dict:
    s, fold, judge = self.settings, self.session.with_train(rows), self.judge
    result = judge.train(self.answered(topics), s.seed, f"train without {', '.join(topics) or 'holding out a topic'}")
    params = subtree.merge(result.sub, judge.frozen, judge.chosen)
    self._score(fold, params, name)
    return {
      "before": self.before.tolist(),
      "after": judge.losses(result.sub, POINTS).tolist(),
      "steps": judge.recipe.steps,
    }

  def _base_scores(self, topics: tuple[str, ...], rows: np.ndarray) -> np.ndarray:
    """Tables of `KINDS` at the base model: without a curvature, scores and cosines are columns of the whole set's."""
    s, every = self.settings, len(self.session.splits["train"])
    if s.score_path == "projected":  # the metric is that of the training set
      features = self._base_features
      ids = self.session.splits["train"].ids
      return tables_from(features["train"][rows], features[POINTS], [ids[row] for row in rows])
    if topics and s.solver == "identity":
      columns = np.concatenate([rows, every + np.arange(len(self.session.splits[POINTS]))])
      return self._base_scores((), np.arange(every))[:, :, columns]

    name = (BASE, _CELLS, *topics)

    def make() -> dict:
      fold = self.session.with_train(rows) if topics else self.session
      self._score(fold, fold.model.params, name)
      return {}

    self.cells.get(make, *name, with_array=True)
    return self.cells.read_array(*name)

  def _score(self, fold: Session, params, name: tuple[str, ...]) -> None:
    """Writes the array of a cell. Its unfinished work has a folder of its own: no other fold's may be taken for it."""
    s = self.settings
    work = Work(self._run_dir, s.shard_batches, f"{FOLDER}/{run_folder.hash_of(name)[:16]}")
    tables = tables_of(fold, s, params, work)
    work.remove()
    self.cells.write_array(tables.astype(np.float32), *name)

  @functools.cached_property
  def _base_features(self) -> dict[str, np.ndarray]:
    projection = Projection(self.session, self.settings, self.session.model.params, self.settings.seed)
    return {part: projection.features(part) for part in ("train", POINTS)}

  @functools.cached_property
  def _embedded(self) -> dict[str, np.ndarray]:
    return {part: self.session.hidden.pooled(part) for part in ("train", POINTS)}

  def _texts_and_embeddings(self, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Similarity of each test point to the training texts, by the base model's embeddings and by words."""
    train, points = self._embedded["train"][rows], self._embedded[POINTS]
    center, found = train.mean(axis=0), {}
    images = {
      "embedding": lambda x: x,
      "centred embedding": lambda x: x - center,
      "whitened embedding": cosines.whitening(train, _WHITENED),
    }

    def add(name: str, ours: np.ndarray, among: np.ndarray) -> None:
      found[f"{name}, mean"], found[f"{name}, maximum"] = ours.mean(axis=1), ours.max(axis=1)
      found[f"{name}, relative maximum"] = coverage.relative_maximum(ours, among, self.ignored)

    for name, image in images.items():
      of = lambda to, image=image: cosines.cosine_to(image(points), image(to)).astype(np.float64)  # noqa: E731
      add(name, of(train), of(points))
    texts = self.texts[POINTS]
    documents = [*(self.texts["train"][row] for row in rows), *texts]
    words = bm25.bm25(texts, documents)  # one corpus, so that a word is worth the same on either side
    add("BM25", words[:, : len(rows)], words[:, len(rows) :])
    return found


def text_of(record) -> str:
  """All messages of a record."""
  return " ".join(map(spoken, record.messages))


# ---- what the signals tell -----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pooled:
  """Observations of all folds: each test point once in each.

  Attributes:
    signals: name -> float64 [M].
    uncovered: bool [M], whether the point's topic is held out.
    after: float64 [M], mean nats after fine-tuning.
    drop: float64 [M], by how much fine-tuning lowers it.
    points: int [M], which test point.
    fold: int [M], which fold.
  """

  signals: dict[str, np.ndarray]
  uncovered: np.ndarray
  after: np.ndarray
  drop: np.ndarray
  points: np.ndarray
  fold: np.ndarray


def pool(observed: Sequence[Observed], topics: Sequence[str], counted: np.ndarray) -> Pooled:
  """Puts the folds together.

  Args:
    observed: one a fold.
    topics: of the test points.
    counted: int, the test points that are judged.
  """
  named = np.array(topics, dtype=object)[counted]
  join = lambda values: np.concatenate([np.asarray(value)[counted] for value in values])  # noqa: E731
  return Pooled(
    {name: join([one.signals[name] for one in observed]) for name in observed[0].signals},
    np.concatenate([np.isin(named, one.topics) for one in observed]),
    join([one.after for one in observed]),
    join([one.before - one.after for one in observed]),
    np.tile(counted, len(observed)),
    np.repeat(np.arange(len(observed)), len(counted)),
  )


def judged_points(session: Session) -> np.ndarray:
  """Test points with a response whose topic has a training example: of the others no fold says "covered" truly."""
  points, trained = session.splits[POINTS], set(session.splits["train"].topics)
  known = np.array([topic in trained for topic in points.topics])
  return np.flatnonzero(known & (points.num_response_tokens > 0))


def correlation(signal: np.ndarray, outcome: np.ndarray, points: np.ndarray) -> statistics.Interval:
  """Spearman's correlation with its interval over redrawn test points."""
  return coverage.by_point(lambda rows: statistics.spearman(signal[rows], outcome[rows]), points, draws=_DRAWS)


def table_of(pooled: Pooled, whole: Observed, counted: np.ndarray) -> list[dict]:
  """One row a signal: how it tells held-out topics, and how it goes with the loss after fine-tuning."""
  rows = []
  for name, signal in pooled.signals.items():
    auc = coverage.area_interval(signal, pooled.uncovered, pooled.points, draws=_DRAWS)
    by_fold = [
      coverage.area(signal[pooled.fold == fold], pooled.uncovered[pooled.fold == fold])
      for fold in np.unique(pooled.fold)
    ]
    alone = correlation(whole.signals[name][counted], whole.after[counted], counted)
    rows.append(
      {
        "signal": name,
        "AUC": auc.mean,
        "low": auc.low,
        "high": auc.high,
        "AUC by fold": f"{min(by_fold):.2f} to {max(by_fold):.2f}",
        "with loss after": str(correlation(signal, pooled.after, pooled.points)),
        "with loss drop": str(correlation(signal, pooled.drop, pooled.points)),
        "with loss after, whole set": str(alone),
      }
    )
  return rows


def by_topic(observed: Sequence[Observed], topics: Sequence[str], judged: np.ndarray, signal: str) -> list[dict]:
  """One row a held-out topic: how well a signal and those it is held against tell its test points from covered ones."""
  named = np.array(topics, dtype=object)[judged]
  shown, rows = (signal, *report.YARDSTICKS), []
  for one in observed:
    covered = ~np.isin(named, one.topics)
    for topic in one.topics:
      there = named == topic
      these, signals = covered | there, {name: one.signals[name] for name in shown}
      signals["loss drop"] = one.before - one.after
      areas = {f"AUC, {name}": coverage.area(value[judged][these], there[these]) for name, value in signals.items()}
      rows.append({"topic": topic, "test points": int(there.sum())} | areas)
  return sorted(rows, key=lambda row: row["topic"])


def run(settings: CoverageSettings, session: Session | None = None) -> str:
  """Trains and scores each fold, writes coverage.{md,csv,tex,json}, points.csv and a figure; returns the run folder."""
  s = settings
  refuse(s, _REFUSED, _DOES)
  if s.score_path == "projected" and s.solver != "identity":
    raise UserError(
      f"--score_path=projected --solver={s.solver}: coverage has no inverse of projected gradients, and whole ones for "
      "every test point otherwise: give --solver=identity or leave --score_path out"
    )
  run_folder.RunDir.refuse_held(s.run_dir)  # before the work that comes before the folder is opened
  known = influence_signals(s.score_path == "projected")
  if s.coverage_signal not in known:
    raise UserError(f"--coverage_signal={s.coverage_signal} is none of {'; '.join(known)}")
  session = session or open_session(s)
  session = session.with_evals(np.unique(distinct_points(session.splits[POINTS])))  # a copy is no other test point
  folds = folds_of(session, s)
  solver_inputs.solver_settings(s)  # as the rest, told before the first training
  params = session.model.params
  tree = subtree.make_subtree(params, s.layers, s.modules)
  check_size(s, subtree.size_of(params, tree), f"--solver={s.solver}")
  identity = session.own_identity("coverage", s, ("data", "model", "finetune", "select", "run"), ("train", POINTS))
  run_dir = run_folder.RunDir.open(s.run_dir, identity, s.overwrite)
  session.splits.write_skipped(run_dir)
  run_dir.write_flags("flags.txt", s.as_flags(), ["python -m experiments.coverage --flagfile=THIS"])
  study = Study(session, s, run_dir, folds)
  whole, observed = study.observe(()), [study.observe(topics) for topics in folds]
  counted = np.flatnonzero(session.splits[POINTS].num_response_tokens)
  topics, judged = session.splits[POINTS].topics, judged_points(session)
  pooled = pool(observed, topics, judged)
  table = table_of(pooled, whole, counted)
  topic_rows = by_topic(observed, topics, judged, s.coverage_signal)
  found = report.Findings(table, pooled, whole, observed, counted, topic_rows)
  report.write(run_dir, s, session, study.texts, found)
  return str(run_dir.path)


def main(_) -> None:
  """Entry point."""
  run(flags.read(CoverageSettings))
