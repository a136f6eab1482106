"""What policies choose from beside scores: projected gradients, hidden states, texts; each once, when it is asked."""

import functools
from collections.abc import Collection

import numpy as np

from in2core_jax.data import records, tokenizing
from in2core_jax.data.subsets import by_id
from in2core_jax.errors import UserError
from in2core_jax.pipeline.loss_drop import loss_drop
from in2core_jax.pipeline.projection import Projection
from in2core_jax.pipeline.session import Session, choose
from in2core_jax.pipeline.settings import Settings
from in2core_jax.pipeline.target_weights import sources_of
from in2core_jax.report import near_duplicates
from in2core_jax.selection import aggregation, bm25, coreset, cosines, hybrid
from in2core_jax.selection.inputs import SIMILARITIES
from in2core_jax.selection.whitening import Measured, WhitenedMetric, check_gradients

NEAR = 0.8  # of the shingles: what two examples share beside a long instruction that many begin with
MOST_PAIRS = 8192  # examples whose similarities with each other are held: 0.5 GB


OF_PAIRS = (*coreset.PAIR_POLICIES, *coreset.WEIGHTED_POLICIES)  # policies that hold so many


def check_pairs(session: Session) -> None:
  """Refuses `OF_PAIRS` for more examples than all pairs of can be compared.

  Raises:
    UserError: there are more.
  """
  size = len(session.splits["train"])
  if size > MOST_PAIRS:
    raise UserError(
      f"policies {', '.join(OF_PAIRS)} compare all pairs of the {size:,} training examples, at most {MOST_PAIRS:,}: "
      "take hybrid or matching"
    )


class ChoiceInputs:
  """Of one training set, at some parameters, for any part of the evaluation set.

  Evaluation examples without a response have no gradient, and are left out everywhere.
  """

  def __init__(self, session: Session, s: Settings, params, stored: bool = True):
    """Computes nothing yet.

    Args:
      session: data and model; hidden states and texts are those of its base model.
      s: how gradients are projected, similarities aggregated, what matching aims at.
      params: where gradients are taken.
      stored: whether gradients are kept beside the run folder: only those of the base model or of --checkpoint have a
        name there.
    """
    self.session, self.settings, self._stored = session, s, stored
    self._params = params

  def of(self, policies: Collection[str], rows: np.ndarray | None = None, aggregate: str = "") -> dict:
    """Fields of `inputs.PolicyInputs`.

    Args:
      policies: those that are wanted; what only others need is not computed.
      rows: of the evaluation set, the queries; None: all.
      aggregate: a word of --aggregate in place of the settings'.
    """
    wanted, found = set(policies), {}
    among = lambda kept: kept if rows is None else kept[np.isin(kept, rows)]  # noqa: E731
    if wanted & set(coreset.FEATURE_POLICIES):
      found |= self._matched(among(self._answered))
    if "loss_drop" in wanted:
      s = self.settings
      chosen = choose(self.session, self._params, s.layers, s.modules)
      found["drop"] = loss_drop(self.session, s, chosen, among(self._first_queries))
    if wanted & {*coreset.HYBRID_POLICIES, *SIMILARITIES}:
      found |= self._similar(wanted, among(self._first_queries), aggregate or self.settings.aggregate)
    return found

  # Copies are one query, and one example of what the training set is like. Queries come in the order of their ids, so
  # that those that take turns do not depend on the order of reading.

  @functools.cached_property
  def _answered(self) -> np.ndarray:
    return np.flatnonzero(self.session.splits["eval"].num_response_tokens)

  @functools.cached_property
  def _first_queries(self) -> np.ndarray:
    evals = self.session.splits["eval"]
    return by_id(evals, (evals.num_response_tokens > 0) & records.firsts(evals.records))

  @functools.cached_property
  def _counts(self) -> np.ndarray:
    train = self.session.splits["train"]
    return (train.num_response_tokens > 0) & records.firsts(train.records)

  def _sources_of(self, queries: np.ndarray) -> aggregation.Sources | None:
    every = sources_of(self.session, self.settings)
    return None if every is None else every.take(queries)

  # ---- gradients ---------------------------------------------------------------------

  @functools.cached_property
  def _projection(self) -> Projection:
    return Projection(self.session, self.settings, self._params, self.settings.seed)

  @functools.cached_property
  def _features(self) -> np.ndarray:
    projection = self._projection
    return projection.store().features() if self._stored else projection.features("train")

  @functools.cached_property
  def _eval_features(self) -> np.ndarray:
    return self._projection.features("eval")

  @functools.cached_property
  def _hybrid(self) -> hybrid.HybridMetric:
    train = self.session.splits["train"]
    features = self._features, self._eval_features  # first: they keep the hidden states that the others begin with
    hidden = self._views("train")
    return hybrid.HybridMetric.fit(features[0], hidden, train.ids, self._counts)

  @functools.cached_property
  def _whitened(self) -> tuple[WhitenedMetric, Measured]:
    """The metric of the training set's gradients, and these in it."""
    if "_hybrid" in self.__dict__:
      return self._hybrid.metric, self._hybrid.pool.gradients
    check_gradients(self._features, "training")
    metric = WhitenedMetric.fit(self._features, ids=self.session.splits["train"].ids, counted=self._counts)
    return metric, metric.measured(self._features)

  @functools.cached_property
  def _kernel(self) -> np.ndarray:
    check_pairs(self.session)
    return self._hybrid.among()

  def _matched(self, queries: np.ndarray) -> dict:
    """What greedy matching chooses from and aims at."""
    s, evals = self.settings, self.session.splits["eval"]
    return {
      "features": self._features,
      "target": self._eval_features[queries],
      "query_tokens": evals.num_response_tokens[queries],
      "target_sources": self._sources_of(queries),
      # Gradients of summed losses weigh tokens by themselves.
      "target_mean": s.matching_target if s.loss_reduction == "mean" else "examples",
      "shrink": s.matching_shrink,
    }

  def whitened_cosines(self) -> tuple[np.ndarray, list[str], aggregation.Sources | None]:
    """Cosines in the whitened metric with every query, f64 [Q, N], the queries' topics, and where they come from."""
    topics, queries = self.session.splits["eval"].topics, self._first_queries
    return self._similarity("whitened_cosine", queries), [topics[row] for row in queries], self._sources_of(queries)

  # ---- similarities ------------------------------------------------------------------

  def _hidden(self, part: str, pooling: str) -> np.ndarray:
    """Pooled hidden states, [N, D]; the session keeps them."""
    return self.session.hidden.pooled(part, pooling=pooling)

  def _views(self, part: str) -> np.ndarray:
    """What `hybrid` looks at, [N, V, D]."""
    return np.stack([self._hidden(part, pooling) for pooling in hybrid.VIEWS], axis=1)

  @functools.cached_property
  def _texts(self) -> dict[str, list[str]]:
    return {part: [shown(record) for record in self.session.splits[part].records] for part in ("train", "eval")}

  @functools.cached_property
  def _alike(self) -> np.ndarray:
    copies = records.first_of(self.session.splits["train"].records)
    return near_duplicates.alike(self._texts["train"], copies, NEAR)

  def _similar(self, wanted: set[str], queries: np.ndarray, how: str) -> dict:
    """Similarities of queries and examples, and how policies use them."""
    topics = self.session.splits["eval"].topics
    found: dict = {"aggregate": None if how == "auto" else how, "alike": self._alike}
    found["similar_topics"] = [topics[row] for row in queries]
    found["similar_ids"] = [self.session.splits["eval"].ids[row] for row in queries]
    found["similar_sources"] = sources = self._sources_of(queries)
    found["similar_tokens"] = self.session.splits["eval"].num_response_tokens[queries]
    plain = sorted(wanted & {*SIMILARITIES} - {"hybrid"})
    found["similarities"] = {name: self._similarity(name, queries) for name in plain}
    if wanted & {*coreset.HYBRID_POLICIES}:
      asked = self._hybrid.asked(self._eval_features[queries], self._views("eval")[queries])
      similarity = self._hybrid.similarity(asked)
      found["similarities"]["hybrid"] = self._hybrid.smoothed(asked, similarity)
      found["apart"] = self._hybrid.apart(asked)
      if wanted & {*coreset.PAIR_POLICIES}:
        found |= {"kernel": self._kernel, "towards": aggregation.source_mean(similarity, sources)}
    return found

  def _similarity(self, name: str, queries: np.ndarray) -> np.ndarray:
    """[Q, N], of a policy that looks at one thing."""
    if name == "whitened_cosine":
      metric, pool = self._whitened
      check_gradients(self._eval_features[queries], "evaluation")
      return metric.cosines(self._eval_features[queries], pool)
    if name == "layer_ranks":
      return aggregation.mean_ranks(
        [self._of_layer(columns, queries) for columns in self._projection.columns_of_layers()]
      )
    if name == "bm25":
      return bm25.bm25([self._texts["eval"][row] for row in queries], self._texts["train"])
    if name == "whitened_embedding":
      told = self._views("train")
      return hybrid.Texts.fit(told[self._counts]).cosines(self._views("eval")[queries], told)
    pooling = "position" if name == "rds" else "mean"
    told = self._hidden("train", pooling)
    return cosines.cosine_to(self._hidden("eval", pooling)[queries], told)

  def _of_layer(self, columns: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Whitened cosines of queries and examples by some of the gradients' numbers, [Q, N]."""
    features = self._features[:, columns]
    check_gradients(features, "training")
    metric = WhitenedMetric.fit(features, ids=self.session.splits["train"].ids, counted=self._counts)
    return metric.cosines(self._eval_features[queries][:, columns], features)


def shown(record: tokenizing.Record) -> str:
  """A conversation in one string, for reports and comparisons of words; of a preference pair both sides."""
  told = [f"[{message['role']}] {records.spoken(message)}" for message in record.messages]
  told += [f"[rejected {message['role']}] {records.spoken(message)}" for message in records.rejected_turns(record)]
  return " ".join(told)
