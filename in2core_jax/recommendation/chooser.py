"""The rows of the pool that rules choose when they see some of the evaluation examples."""

import functools
from collections.abc import Sequence

import numpy as np

from in2core_jax.data.records import first_of, firsts
from in2core_jax.evaluation.tries import DISTINCT, LONGEST, MATCHED
from in2core_jax.pipeline import scoring
from in2core_jax.pipeline.finetune import trainable_rows
from in2core_jax.pipeline.policy_inputs import ChoiceInputs
from in2core_jax.pipeline.session import Session, choose
from in2core_jax.pipeline.settings import Settings
from in2core_jax.pipeline.solver_inputs import solve
from in2core_jax.recommendation.rules import RULES
from in2core_jax.runs import resumable, run_folder
from in2core_jax.runs.result_cache import ResultCache
from in2core_jax.runs.unfinished import FOLDER, Work
from in2core_jax.selection import coreset
from in2core_jax.selection.inputs import Budget, inputs_of


class Chooser:
  """What rules choose; orders are kept, and what several rules choose by is computed once."""

  def __init__(self, session: Session, s: Settings, run_dir: run_folder.RunDir, most: int, cells: ResultCache):
    """Computes nothing yet.

    Args:
      session: data and model.
      s: the flags of the rules; --checkpoint is the training on all data, for rules that are taken there.
      run_dir: keeps scores while they are computed.
      most: rows of an order.
      cells: keep orders.
    """
    self.session, self.settings, self.most = session, s, most
    self._run_dir, self._cells = run_dir, cells
    self.usable = trainable_rows(session)

  @functools.cached_property
  def distinct(self) -> np.ndarray:
    """The pool's rows with a response, of copies the first."""
    train = self.session.splits["train"]
    return np.flatnonzero((train.num_response_tokens > 0) & firsts(train.records))

  def size(self, budget: float) -> int:
    """Examples of a share of the pool."""
    return max(1, round(budget * len(self.usable)))

  def orders(self, rule: str, queries: Sequence[np.ndarray], checkpoint: str = "") -> list[np.ndarray]:
    """For each list of evaluation rows the pool's rows that the rule takes for them, best first.

    Args:
      rule: a name of `RULES`.
      queries: int [Q] each, rows of the evaluation set.
      checkpoint: the training on all data, for a rule that is taken there.
    """
    make = self._by_scores if RULES[rule].solves else self._by_policy
    found = lambda: {"rows": [own.tolist() for own in make(rule, queries, checkpoint)]}  # noqa: E731
    named = run_folder.hash_of([rows.tolist() for rows in queries])
    kept = self._cells.get(found, "order", rule, self.most, checkpoint and "trained", named)
    return [np.array(rows, np.int64) for rows in kept["rows"]]

  def _by_policy(self, rule: str, queries: Sequence[np.ndarray], checkpoint: str) -> list[np.ndarray]:
    policy = RULES[rule].policy
    found = []
    for rows in queries:
      inputs = inputs_of(self.session.splits["train"], **self._inputs.of({policy}, rows))
      found.append(coreset.select_rows(policy, inputs, Budget(num_examples=self.most)))
    return found

  @functools.cached_property
  def _inputs(self) -> ChoiceInputs:
    s = self.settings.replace(checkpoint="")
    return ChoiceInputs(self.session, s, self.session.model.params)

  def _by_scores(self, rule: str, queries: Sequence[np.ndarray], checkpoint: str) -> list[np.ndarray]:
    """By influence on the mean loss of each list of evaluation examples; all lists in one pass."""
    session, s = self.session, self.settings.replace(checkpoint=checkpoint)
    chosen = choose(session, session.checkpoint_params(checkpoint), s.layers, s.modules)
    named = run_folder.hash_of([rule, len(session.splits["train"]), *(rows.tolist() for rows in queries)])[:16]
    work = Work(self._run_dir, s.shard_batches, f"{FOLDER}/{named}")
    groups = {str(number): rows for number, rows in enumerate(queries)}
    v, _ = scoring.queries(session, s, chosen, work, groups=groups)
    result = solve(session, s, chosen, v, work.pieces("solve", queries=resumable.tree_sha256(v)))
    train = session.packer("train", chosen.tree, chosen.params)
    stream = session.stream(train, "scores", scoring.pieces_along(work, "scores", result.solution))
    raw = chosen.problem.scores(stream, len(train), result.solution, "jvp")
    work.remove()
    policy, dataset = RULES[rule].policy, session.splits["train"]
    inputs = [inputs_of(dataset, np.asarray(own, np.float64)) for own in raw]
    return [coreset.select_rows(policy, own, Budget(num_examples=self.most)) for own in inputs]

  # ---- sets that look at no evaluation example -----------------------------------------

  def whole(self, rule: str) -> np.ndarray:
    """All rows, or those of `distinct`."""
    return self.distinct if rule == DISTINCT else self.usable

  def random(self, budget: float, seed: int, copies_last: bool = False) -> np.ndarray:
    """A random set; with `copies_last` no example a second time before every other has come."""
    train = self.session.splits["train"]
    inputs = inputs_of(train)
    if not copies_last:
      return coreset.select_rows("random", inputs, Budget(num_examples=self.size(budget)), seed)
    copies = first_of(train.records)
    return coreset.select_copies_last("random", inputs, Budget(num_examples=self.size(budget)), copies, seed)

  def longest(self, budget: float) -> np.ndarray:
    """The longest responses."""
    inputs = inputs_of(self.session.splits["train"])
    return coreset.select_rows(LONGEST, inputs, Budget(num_examples=self.size(budget)))

  def matched(self, rows: np.ndarray, budget: float, seed: int) -> np.ndarray:
    """A random set of a budget with the response lengths of other rows, of which there may be more."""
    rng, size = np.random.default_rng((seed, 31)), self.size(budget)
    wanted = rng.permutation(rows)[:size]
    place = np.searchsorted(self.usable, wanted)
    lengths = self.session.splits["train"].num_response_tokens[self.usable]
    return self.usable[coreset.length_matched(place, lengths, seed)]


def guided(rule: str) -> bool:
  """Whether what a rule chooses depends on evaluation examples."""
  return rule in RULES or rule == MATCHED
