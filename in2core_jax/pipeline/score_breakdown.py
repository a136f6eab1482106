"""Scores taken apart: by layer, by token, by evaluation example."""

import dataclasses

import jax

from in2core_jax.ihvp import solvers
from in2core_jax.influence import decompose
from in2core_jax.model.objective import token_losses_fn
from in2core_jax.pipeline import phases
from in2core_jax.pipeline.scoring import Clock, Scored, pieces_along, query_scores
from in2core_jax.pipeline.select_results import write_query_scores
from in2core_jax.pipeline.session import BoundSubtree, Session
from in2core_jax.pipeline.settings import Settings
from in2core_jax.report import facts
from in2core_jax.runs.unfinished import Work


def taken_apart(
  session: Session, s: Settings, chosen: BoundSubtree, scored: Scored, work: Work, clock: Clock
) -> Scored:
  """Writes the tables that --write asks for; the sums by layer and the scores by query are kept for the report."""
  if s.writes("layer") or s.writes("token"):
    scored = by_layer_and_token(session, s, chosen, scored, work)
    clock.lap("per layer and token")
  if s.writes("query"):
    scored = by_query(session, s, chosen, scored, work)
    clock.lap("per query")
  return dataclasses.replace(scored, seconds=scored.seconds | clock.seconds)


def by_layer_and_token(session: Session, s: Settings, chosen: BoundSubtree, scored: Scored, work: Work) -> Scored:
  """Writes layer_scores.parquet and token_scores.parquet; the layers' sums are kept for the report."""
  layers = None
  if s.writes("layer"):
    table = layer_table(session, s, chosen, scored.result, work)
    work.run_dir.write_parquet("layer_scores.parquet", table)
    layers = facts.layers_of(table)
  if s.writes("token"):
    work.run_dir.write_parquet("token_scores.parquet", token_table(session, chosen, scored.result, work))
  return dataclasses.replace(scored, layers=layers)


def by_query(session: Session, s: Settings, chosen: BoundSubtree, scored: Scored, work: Work) -> Scored:
  """Writes query_scores.parquet; the scores are kept for the report."""
  queries = query_scores(session, s, chosen, work)
  write_query_scores(work.run_dir, session.splits, queries)
  return dataclasses.replace(scored, queries=queries)


def layer_table(session: Session, s: Settings, chosen: BoundSubtree, result: solvers.SolveResult, work: Work) -> dict:
  """Columns of layer_scores.parquet, which add up to the scores."""
  train = session.batcher("train", chosen.tree, chosen.params)
  stream = session.stream(train, phases.LAYERS, pieces_along(work, "layers", result.solution))
  direction = jax.tree.map(lambda leaf: leaf[0], result.solution)
  found = decompose.layer_scores(chosen.problem, chosen.tree, stream, len(train), direction, s.microbatch)
  return decompose.layer_columns(session.splits["train"].ids, found)


def token_table(session: Session, chosen: BoundSubtree, result: solvers.SolveResult, work: Work) -> dict:
  """Columns of token_scores.parquet, which add up to the scores."""
  train = session.packer("train", chosen.tree, chosen.params)
  stream = session.stream(train, phases.TOKENS, pieces_along(work, "tokens", result.solution))
  direction = jax.tree.map(lambda leaf: leaf[0], result.solution)
  losses = token_losses_fn(session.model.config, chosen.tree)
  found = decompose.token_scores(chosen.problem, losses, stream, len(train), direction)
  return decompose.token_columns(session.splits["train"], found, lambda token: session.model.tokenizer.decode([token]))
