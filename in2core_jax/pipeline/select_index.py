"""`select` from an index: scores, the rule and the report out of rows of a few numbers, without a pass over the pool.

The model is run for evaluation examples that the index does not know, and for the inverse Hessian product of policies
that choose by influence. All else is read.
"""

import dataclasses
import logging
from typing import Any

import numpy as np

from in2core_jax.data import records
from in2core_jax.data.ragged import taken
from in2core_jax.errors import UserError, how_many
from in2core_jax.ihvp import solvers
from in2core_jax.index import best, rules, store
from in2core_jax.index.basis import Raw
from in2core_jax.index.rows import NUMBERS, Block, Rows
from in2core_jax.influence import projected
from in2core_jax.influence.index_pass import OnDevice
from in2core_jax.parallel import processes
from in2core_jax.pipeline import index, phases, scoring, select_results, shapes
from in2core_jax.pipeline.advice import of_selection
from in2core_jax.pipeline.checks import budget_of, check_select
from in2core_jax.pipeline.policy_inputs import NEAR, shown
from in2core_jax.pipeline.select_outputs import add_forms
from in2core_jax.pipeline.session import Session, choose, open_session
from in2core_jax.pipeline.settings import Settings
from in2core_jax.pipeline.solver_inputs import announce, solve
from in2core_jax.pipeline.train_elsewhere import recipe_elsewhere, write_train_with
from in2core_jax.report import near_duplicates
from in2core_jax.runs import resumable, run_folder
from in2core_jax.runs.shards import ShardStore
from in2core_jax.runs.unfinished import Work
from in2core_jax.selection import aggregation, coreset
from in2core_jax.selection.inputs import PolicyInputs, inputs_of, taking_no_part
from in2core_jax.training import train_loop

log = logging.getLogger(__name__)

BY_INFLUENCE = tuple(name for name in coreset.SCORE_POLICIES if name != "highest_loss")
NEAR_COPIES_UP_TO = 50_000  # examples; of more, copies alone are held to be alike
TOP = 100  # examples of each query in query_top.parquet
_OUTSIDE = 0.1  # share of the queries' squared lengths beyond the basis from which on it is told
# The seed is of the sketch there, of the choice here.
_FROM_INDEX = tuple(name for name in index.MADE_WITH if name != "seed")


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
  """What a run does.

  Attributes:
    settings: the flags, with those that the index decides.
    session: examples and model.
    held: the index. facts: of it.
    rows: of the training examples.
  """

  settings: Settings
  session: Session
  held: store.IndexStore
  facts: dict[str, Any]
  rows: Rows


def run(given: Settings, session: Session | None = None) -> str:
  """Selects from --index and writes what `select` writes; returns the run folder."""
  run_folder.RunDir.refuse_held(given.run_dir)
  _check(given)
  held = store.IndexStore.load(given.index)
  facts = held.run_dir.load_json(store.MARK)
  s = _settled(given, facts["flags"])
  session = session or open_session(s)
  if session.model.hash != held.run_dir.identity["model_hash"]:
    raise UserError(f"--index={s.index} was made with other weights than those of --model={s.model}: make it again")
  check_select(session, s, shapes.scored_params(session.model.config, s))
  train = session.splits["train"]
  rows = held.read_rows(store.keys_of(train.tokens, train.response_mask), train.ids)
  task = Task(s, session, held, facts, rows)
  work = Work(run_folder.RunDir.open(s.run_dir, _identity(task), overwrite=s.overwrite), s.shard_batches)
  if work.run_dir.is_whole("summary.json"):
    log.info("%s is finished already", work.run_dir.path)
    add_forms(work.run_dir, train, s)
  else:
    _write(task, work, given)
  work.remove()
  return str(work.run_dir.path)


def _check(s: Settings) -> None:
  """Refuses what an index does not hold."""
  if s.policy not in rules.POLICIES:
    raise UserError(
      f"--policy={s.policy} does not work with an index: take {', '.join(rules.POLICIES)}, or leave --index out"
    )
  if s.is_set("eval_weights"):
    raise UserError(f"{s.as_flag('eval_weights')}: in an index all evaluation examples weigh the same; leave one out")
  for name in ("normalize", "trajectory"):
    if s.is_set(name):
      raise UserError(f"{s.as_flag(name)} needs gradients that an index does not hold: leave it or --index out")
  if s.modules not in ("all", "matrices"):
    raise UserError(f"{s.as_flag('modules')}: an index has gradients of all matrices: leave it or --index out")
  if s.score_path == "projected":
    raise UserError("--score_path=projected reads a store, --index an index: leave one of them out")
  other = [word for word in ("layer", "token", "self") if s.writes(word)]
  if other:
    raise UserError(f"--write={other[0]} needs gradients that an index does not hold: leave it or --index out")
  if s.policy in BY_INFLUENCE and phases.score_aggregate(s) in aggregation.BY_QUERY:
    raise UserError(
      f"--aggregate={s.aggregate} with --policy={s.policy} takes an inverse for every evaluation example: with --index "
      "take --policy=hybrid, or leave it out"
    )


def _settled(s: Settings, made_with: dict[str, Any]) -> Settings:
  """The flags with those of the index; one that was given and differs is refused."""
  known = [name for name in _FROM_INDEX if name in made_with]  # older indexes name fewer
  for name in known:
    if s.is_set(name) and getattr(s, name) != made_with[name]:
      raise UserError(
        f"{s.as_flag(name)}: the index {s.index} was made with --{name}={made_with[name]}: leave it out, or make "
        "another index"
      )
  return s.replace(**{name: made_with[name] for name in known})


def _identity(task: Task) -> dict:
  identity = task.session.own_identity("select", task.settings, ("data", "model", "select", "run"), ("train", "eval"))
  for name in ("checkpoint", "index"):
    identity["flags"].pop(name)
  identity["checkpoint"] = train_loop.checkpoint_hash(task.settings.checkpoint)
  identity["index"] = {"identity": task.held.run_dir.identity_sha256, "basis": task.facts["basis"]["sha256"]}
  return identity


def _write(task: Task, work: Work, given: Settings) -> None:
  """Scores, chooses, writes."""
  s, session, clock, run_dir = task.settings, task.session, scoring.Clock(), work.run_dir
  session.splits.write_skipped(run_dir)
  select_results.note_inputs(run_dir, session.splits, s, given)
  questions = questions_of(task)
  clock.lap("queries")
  scored, told_by = _scored(task, questions, work, clock)
  inputs, counted = _inputs(task, scored)
  how = rules.How("" if s.aggregate == "auto" else s.aggregate, _target_mean(s), s.matching_shrink, s.seed)
  outcome = rules.choose(s.policy, inputs, task.rows, questions, counted, budget_of(s), how)
  inputs = dataclasses.replace(inputs, apart=outcome.apart, similar_ids=questions.asked().ids)
  for line in select_results.about_choice(s, outcome.apart, outcome.aim):
    log.info("%s", line)
  clock.lap("selection")
  if s.writes("query"):
    run_dir.write_parquet("query_top.parquet", top_lists(task, questions))
    clock.lap("per query")
  rule = select_results.rule_of(s, inputs)
  warnings = of_selection(told_by, inputs, outcome.choice.rows, outcome.aim, session.splits["eval"], rule)
  about = _about(task, outcome, rule)
  scored = dataclasses.replace(scored, seconds=clock.seconds)
  recipe = recipe_elsewhere(s, session)  # from a checkpoint, which all processes open together
  if run_dir.writer:
    write_train_with(run_dir, session, s, outcome.choice.rows, recipe)
    select_results.write_results(run_dir, session, told_by, scored, outcome.choice, warnings, about)
  log.info(
    "selected %d of %s%s by %s out of the index: %s",
    len(outcome.choice.rows),
    how_many(len(inputs.ids), "example"),
    taking_no_part(inputs, session.splits["train"].truncated),
    s.policy,
    run_dir.path / "coreset.jsonl",
  )


def _about(task: Task, outcome: rules.Outcome, rule: str) -> dict[str, Any]:
  """What summary.json says of the rule, beside what every `select` run says."""
  apart, aim = outcome.apart, outcome.aim
  return {
    "rule": rule,
    "apart": dataclasses.asdict(apart) if apart else None,
    "another_kind": coreset.apart_enough(apart) if apart else None,
    "queries": outcome.queries,
    "target_kept": aim.kept if aim else None,
    "target_beyond_chance": aim.beyond_chance if aim else None,
    "index_size": task.facts["basis"]["size"],
  }


def _target_mean(s: Settings) -> str:
  return s.matching_target if s.loss_reduction == "mean" else "examples"


def _inputs(task: Task, scored: scoring.Scored) -> tuple[PolicyInputs, np.ndarray]:
  """What policies see of the pool, and which examples make the metric."""
  s, train = task.settings, task.session.splits["train"]
  first = records.firsts(train.records)
  more: dict[str, Any] = {}
  if s.policy in rules.SIMILAR:
    copies = records.first_of(train.records)
    if len(train) <= NEAR_COPIES_UP_TO:
      more["alike"] = near_duplicates.alike([shown(record) for record in train.records], copies, NEAR)
    else:
      log.info("more than %s examples: only copies come last, near copies do not", f"{NEAR_COPIES_UP_TO:,}")
      more["alike"] = copies
  return inputs_of(train, scored.influence, scored.loss, **more), (train.num_response_tokens > 0) & first


# ---- queries -------------------------------------------------------------------------


def questions_of(task: Task) -> rules.Questions:
  """The evaluation examples with a response as rows of the basis: those of the index, or computed and kept."""
  evals = task.session.splits["eval"]
  asked = index.asked_rows(task.session)
  keys = store.keys_of([evals.tokens[row] for row in asked], [evals.response_mask[row] for row in asked])
  arrays = _known(task.held.read_queries(), keys)
  if arrays is None:
    arrays = _computed(task, asked)
  copies = records.first_of(taken(evals.records, asked))
  block = Block(np.arange(len(asked)), *(arrays[name] for name in NUMBERS))
  inside = np.sum(np.asarray(block.gradients, np.float64) ** 2, axis=1)
  outside = 1 - float(np.sum(inside) / max(np.sum(block.square, dtype=np.float64), np.finfo(np.float64).tiny))
  if outside > _OUTSIDE:
    log.warning(
      "the index was made for other evaluation examples: %.0f %% of these gradients lie outside of its basis. Make an "
      "index with this --eval_data, or one with --index_basis=generic",
      100 * outside,
    )
  ids, topics = ([names[row] for row in asked] for names in (evals.ids, evals.topics))
  return rules.Questions(block, copies, ids, topics, evals.num_response_tokens[asked])


def _known(queries: dict[str, np.ndarray] | None, keys: np.ndarray) -> dict[str, np.ndarray] | None:
  """The rows of these queries, where the index has all of them."""
  if queries is None or not np.isin(keys, queries["keys"]).all():
    return None
  order = np.argsort(queries["keys"], kind="stable")
  place = order[np.searchsorted(queries["keys"], keys, sorter=order)]
  return {name: queries[name][place] for name in NUMBERS}


def _pool(task: Task) -> index.Pool:
  return index.Pool(task.session, task.settings.replace(seed=task.facts["flags"]["seed"]))


def _computed(task: Task, asked: np.ndarray) -> dict[str, np.ndarray]:
  """Rows of new queries, kept beside the run folder."""
  identity = {
    "index_queries": 1,
    "index": task.held.run_dir.identity_sha256,
    "basis": task.facts["basis"]["sha256"],
    "data": task.session.splits.identity("eval"),
  }
  folder = run_folder.beside(task.settings.run_dir, "index_queries") / run_folder.hash_of(identity)[:16]
  kept = ShardStore(run_folder.RunDir.open(folder, identity, shared=True), "rows", {})

  def compute() -> dict[str, np.ndarray]:
    pool = _pool(task)
    raw = pool.raw("eval", asked, None, phases.ASKED)
    return pool.rows_of(raw, OnDevice(task.held.load_basis()))

  return resumable.kept(kept, 0, compute)


def top_lists(task: Task, questions: rules.Questions, count: int = TOP) -> dict[str, np.ndarray]:
  """The examples with the highest products with each query, as columns of query_top.parquet; never all products."""
  train = task.session.splits["train"]
  order = aggregation.id_order(train.ids)
  places = np.empty(len(order), np.int64)
  places[order] = np.arange(len(order))
  along = np.asarray(questions.block.gradients, np.float32)
  walk = ((places[rows], along @ numbers.T) for rows, numbers in task.rows.gradients())
  lists = best.best(walk, len(along), min(count, len(train)))
  ids = np.array(train.ids, dtype=object)
  sizes = [len(keys) for keys in lists]
  keys = np.concatenate(lists)
  return {
    "query": np.repeat(np.array(questions.ids, dtype=object), sizes),
    "rank": np.concatenate([np.arange(1, size + 1) for size in sizes]),
    "example": ids[order[best.places_of(keys)]],
    "influence": best.values_of(keys),
  }


# ---- scores --------------------------------------------------------------------------


def _scored(
  task: Task, questions: rules.Questions, work: Work, clock: scoring.Clock
) -> tuple[scoring.Scored, Settings]:
  """Influence and loss of every example, and the flags that say what the influence is.

  Policies that do not choose by influence solve nothing: theirs is the product with the mean evaluation gradient.
  """
  s, names = task.settings, [""]
  if s.policy in BY_INFLUENCE and s.solver != "identity":
    result, along, names = _solved(task, work)
  else:
    s = s.replace(solver="identity")
    along, names = _means(questions, phases.score_aggregate(s) in aggregation.BY_TOPIC)
    result = solvers.identity({"along": along.astype(np.float32)})
  clock.lap("solver")
  total = np.empty((len(along), len(task.rows)))
  for rows, numbers in task.rows.gradients():
    total[:, rows] = along.astype(np.float32) @ numbers.T
  how = phases.score_aggregate(s) if s.policy in BY_INFLUENCE else "mean"
  influence = aggregation.aggregate(total, names, how, task.session.splits["train"].ids)
  clock.lap("scores")
  return scoring.Scored(influence, task.rows.values("loss"), result, clock.seconds), s


def _means(questions: rules.Questions, by_topic: bool) -> tuple[np.ndarray, list[str]]:
  """Mean gradients of the queries in the basis, f64 [G, r], and their names."""
  gradients = np.asarray(questions.block.gradients, np.float64)
  if not by_topic:
    return gradients.mean(axis=0, keepdims=True), [""]
  return aggregation.topic_means(gradients, questions.topics), sorted(set(questions.topics))


def _solved(task: Task, work: Work):
  """The inverse Hessian product of the evaluation gradients, in the basis: (result, f32 [Q, r], names)."""
  s, session = task.settings, task.session
  chosen = choose(session, session.checkpoint_params(s.checkpoint), s.layers, s.modules)
  v, names = scoring.queries(session, s, chosen, work)
  result = solve(session, s, chosen, v, work.pieces("solver", queries=resumable.tree_sha256(v)))
  announce(result)
  pool = _pool(task)
  directions = np.asarray(processes.to_host(projected.project_direction(result.solution, pool.projection.sketch)))
  views = np.zeros((len(directions), 2, session.model.config.hidden_size), np.float32)
  raw = Raw(directions.astype(np.float32), views, np.zeros(len(directions), np.float32))
  return result, pool.rows_of(raw, OnDevice(task.held.load_basis()))["gradients"], names
