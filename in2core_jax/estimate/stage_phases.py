"""The phases of every stage, as the run would go through them, with what each computes and holds."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
from etils import epath

from in2core_jax.costs import flop_counts, memory
from in2core_jax.data import packing
from in2core_jax.estimate.pricing import FLOAT, Phase, Pricer
from in2core_jax.influence import kernels
from in2core_jax.params import adapters, subtree
from in2core_jax.pipeline import auto_batch, shapes, solver_inputs
from in2core_jax.pipeline.scoring import WHITENED, score_aggregate, topic_rows, trajectory_weights
from in2core_jax.pipeline.session import Session
from in2core_jax.pipeline.settings import Settings, integers, listed, seeds_of, shares
from in2core_jax.pipeline.shapes import num_checkpoints, num_steps, trained_shapes
from in2core_jax.runs import run_folder
from in2core_jax.selection import aggregation, coreset
from in2core_jax.selection.inputs import Budget

_FIT = "EK-FAC"  # begins the name of its phase


def finetune_phases(bench: Session, s: Settings) -> list[Phase]:
  """Fine-tuning on the full training set."""
  params, tree = trained_shapes(bench.model.config, s)
  price = Pricer(bench, "finetune", params, tree)
  rows = bench.splits["train"].num_response_tokens.nonzero()[0]
  steps = num_steps(s, len(rows))
  kept = s.keep_checkpoints or -(-steps // s.checkpoint_every)
  # float32 weights and Adam's two moments; the newest is written before the oldest goes.
  disk = 3 * FLOAT * price.sizes.subtree * (kept + 1)
  found = [*price.boundary("train"), *price.reference("train")]
  return [*found, dataclasses.replace(training(price, s, rows, steps), disk=disk)]


def training(price: Pricer, s: Settings, rows: np.ndarray, steps: int) -> Phase:
  """Optimiser steps on some rows of the training set, in the shape that the run would choose."""
  shape = packing.training_shape([price.bench.packer("train", rows=rows)], s.batch_size, [s.seed])
  step = shape_work(shape, price.groups, s.batch_size)
  flops = steps * flop_counts.pass_flops(price.sizes, "gradient", step, price.cached)
  # Weights in float32, two moments, the gradient and the update.
  device = price.device(price.program("gradient", (shape,)), 5)
  return price.phase(f"training, {steps} steps of {s.batch_size} examples", flops, device, 2.0 * steps)


def select_phases(bench: Session, s: Settings) -> list[Phase]:
  """Influence of every training example, and the coreset."""
  price = Pricer(bench, "select", *shapes.scored_shapes(bench.model.config, s))
  groups = topic_rows(bench, s)
  inverse = auto_batch.inverse_of(s, len(groups))
  held = memory.num_vectors(inverse)
  evals = functools.reduce(flop_counts.Work.plus, (price.packed("eval", rows) for rows in groups.values()))
  times = 1
  if s.trajectory != "none":  # a demo has no checkpoint yet
    times = len(trajectory_weights(s.checkpoint)) if s.checkpoint else num_checkpoints(bench, s)
    if score_aggregate(s) in aggregation.BY_QUERY:  # a pass for each block of queries
      times *= -(-len(bench.splits["eval"]) // s.query_block)
  found = [*price.boundary("train"), *price.boundary("eval"), *price.reference("train", "eval")]
  found.append(price.packed_pass("query gradients", "gradient", evals, times, 2 + len(groups)))
  found += solver_phases(price, s, inverse)
  found += score_phases(price, s, inverse, times)
  found += choice_phases(price, s, {s.policy})
  if s.writes("layer"):
    work = price.by_row("train")
    more = flop_counts.contraction_flops(price.sizes, work.examples, 1)
    found.append(price.mapped_pass("scores by layer", work, more, held))
  if s.writes("token"):
    found.append(price.packed_pass("scores by token", "jvp", price.packed("train"), 1, held))
  by_query = score_aggregate(s) in aggregation.BY_QUERY and s.trajectory == "none" and s.normalize != WHITENED
  for _ in range(int(s.writes("query")) + int(by_query)):
    found += per_query_phases(price, s, inverse)
  return [*found, results_phase(bench, s, len(groups))]


def solver_phases(price: Pricer, s: Settings, inverse: flop_counts.Inverse) -> list[Phase]:
  """The inverse Hessian product: products with curvature batches, EK-FAC's fit, DataInf's passes."""
  if inverse.solver == "identity":
    return []
  sizes, held = price.sizes, memory.num_vectors(inverse, s.acceleration != "none")
  if inverse.solver == "datainf":
    rows = price.by_row("train")
    phase = price.mapped_pass("datainf", rows, 0.0, held)
    return [dataclasses.replace(phase, flops=flop_counts.datainf_flops(sizes, inverse, rows, price.cached))]
  curvature = solver_inputs.curvature_rows(price.bench, s)
  batch = shape_work(curvature.shape, price.groups, curvature.batch)
  fixed = curvature.num_fixed
  count = flop_counts.num_products(inverse.solver, fixed, inverse.depth, inverse.repeat, sizes.subtree)
  flops = flop_counts.products_flops(sizes, inverse, batch, fixed, price.cached)
  queries = 64 if inverse.solver == "exact" else inverse.queries
  device = price.device(price.program(inverse.curvature, (curvature.shape,), queries), held)
  with_ekfac = s.solver == "ekfac" or s.precondition == "ekfac"
  if with_ekfac:
    flops += flop_counts.ekfac_apply_flops(sizes, inverse.queries) * (s.depth if s.precondition == "ekfac" else 1)
  # Until the run is finished: the queries' gradients, the solution, and LiSSA's state (its iterate and three sums).
  disk = FLOAT * sizes.subtree * inverse.queries * (2 + (4 if inverse.solver == "lissa" else 0))
  most = "at most " if inverse.solver == "cg" else ""  # it stops at --solver_tol
  name = f"{inverse.solver}, {most}{count} products of {curvature.batch} examples"
  found = [price.phase(name, flops, device, 3.0 * count, disk=disk)]
  if not with_ekfac:
    return found
  rows = price.by_row("train", curvature.factors, every_slot=False)
  every = price.by_row("train", curvature.factors)
  flops = flop_counts.ekfac_fit_flops(sizes, rows, every, s.curvature != "fisher", price.cached)
  size = memory.ekfac_bytes(sizes)
  device = price.device(price.mapped() + 2 * size, inverse.queries)
  fit = price.phase(f"{_FIT} of {len(curvature.factors)} examples", flops, device, 6 * rows.batches, disk=size)
  return [fit, *found]


def score_phases(price: Pricer, s: Settings, inverse: flop_counts.Inverse, times: int) -> list[Phase]:
  """Losses and scores of the training set, by the path that `select.score` takes."""
  sizes, queries = price.sizes, inverse.queries
  train, held = price.packed("train"), 2 * queries
  losses = price.packed_pass("losses", "losses", train)
  if s.score_path == "projected":
    return [losses, *projection_phases(price, s, ("train",), loaded=False)]
  if s.normalize == WHITENED:
    return [losses, *projection_phases(price, s, ("train", "eval"))]
  if s.normalize != "none" or s.writes("self"):
    rows = price.by_row("train")
    a_row = flop_counts.ekfac_apply_flops(sizes, 1) if s.solver == "ekfac" else 0.0
    more = rows.examples * a_row + flop_counts.contraction_flops(sizes, rows.examples, queries + 2)
    return [price.mapped_pass("scores and norms, per-example gradients", rows, more, held)]
  less = s.trajectory == "less"
  if not less and kernels.score_path(s.score_path, queries) == "jvp":
    name = f"losses and scores, jvp{f' of {queries} queries' if queries > 1 else ''}"
    return [price.packed_pass(name, "jvp", train, times * queries, held), *([losses] if s.trajectory != "none" else [])]
  rows = price.by_row("train").times(times)
  more = flop_counts.contraction_flops(sizes, rows.examples, queries)
  return [losses, price.mapped_pass("scores, per-example gradients", rows, more, held)]


def per_query_phases(price: Pricer, s: Settings, inverse: flop_counts.Inverse) -> list[Phase]:
  """Scores of every evaluation example, a block of them at a time."""
  block = min(s.query_block, len(price.bench.splits["eval"]))
  blocks = -(-len(price.bench.splits["eval"]) // block)
  each = inverse._replace(queries=block)
  evals, rows = price.by_row("eval"), price.by_row("train")
  vmap = kernels.score_path(s.score_path, block) == "vmap"
  scores = flop_counts.pass_flops(price.sizes, "gradient" if vmap else "jvp", rows, price.cached) * (
    1 if vmap else block
  )
  scores += flop_counts.contraction_flops(price.sizes, rows.examples, block)
  more = blocks * scores
  found = [price.mapped_pass(f"per query: gradients and scores, {blocks} blocks", evals, more, 3 * block, True)]
  for phase in solver_phases(price, s, each):
    if phase.name.startswith(_FIT):  # made for the aggregated query, and read back
      continue
    flops, gathered = phase.flops * blocks, phase.gathered * blocks
    found.append(dataclasses.replace(phase, name=f"per query: {phase.name}", flops=flops, gathered=gathered))
  return found


def choice_phases(price: Pricer, s: Settings, policies: set[str]) -> list[Phase]:
  """What policies choose from beside scores (`policy_inputs.ChoiceInputs`)."""
  found = []
  if policies & set(coreset.GRADIENT_POLICIES):
    found += projection_phases(price, s, ("train", "eval"))
  if policies & set(coreset.HIDDEN_POLICIES):
    found += [price.hidden_states(part) for part in ("train", "eval")]
  return found


def projection_phases(price: Pricer, s: Settings, parts: tuple[str, ...], loaded: bool = True) -> list[Phase]:
  """Projected gradients, of the training set kept on disk; at the parameters that are scored.

  Args:
    loaded: whether all of them come into memory, as a policy needs them.
  """
  bench = price.bench
  base = shapes.param_shapes(bench.model.config, bench.settings.dtype)
  params = jax.eval_shape(lambda p: adapters.add_sketch(p, s.sketch_size, jax.random.key(0)), base)
  other = Pricer(bench, price.stage, params, subtree.make_subtree(params, s.layers, "sketch"))
  found = []
  for part in parts:
    work = other.by_row(part, every_slot=False)
    flops = flop_counts.pass_flops(other.sizes, "gradient", work, other.cached)
    rows = max((layout.size, shape.num_tokens, layout.num_slots) for shape, layout in bench.batching.layout.items())
    program = memory.Program("gradient", rows[0] // other.groups, rows[1], rows[2])
    size = memory.program_bytes(bench.model.config, other.sizes, program, bench.settings.dtype)
    size += 2 * FLOAT * rows[0] // other.groups * other.sizes.subtree
    disk = FLOAT * other.sizes.subtree * len(bench.splits[part]) if part == "train" else 0.0
    name = f"projected gradients ({part})"
    phase = other.phase(name, flops, other.device(size), 2 * work.batches, disk=disk)
    found.append(dataclasses.replace(phase, host=phase.host + (disk if loaded else 0.0)))
  return found


def results_phase(bench: Session, s: Settings, queries: int) -> Phase:
  """Files of a select run; scores are also kept in pieces while they are computed."""
  train, evals = bench.splits["train"], bench.splits["eval"]
  numbers = len(train) * (20 + 2 * (queries + 1))
  numbers += len(train) * (len(evals) + 2) if s.writes("query") else 0
  numbers += int(train.num_response_tokens.sum()) * 8 if s.writes("token") else 0
  numbers += len(train) * bench.model.config.num_layers * 2 if s.writes("layer") else 0
  texts = sum(len(record.raw) for record in train.records)
  return Phase("select", "scores and coreset", disk=FLOAT * numbers + texts)


def evaluate_phases(bench: Session, s: Settings, known: int = 0) -> list[Phase]:
  """Retraining on every compared set, and the test losses; all of them take the steps of the full set.

  Args:
    known: trainings that are there already.
  """
  params, tree = trained_shapes(bench.model.config, s)
  price = Pricer(bench, "evaluate", params, tree)
  rows = bench.splits["train"].num_response_tokens.nonzero()[0]
  one = training(price, s, rows, num_steps(s, len(rows)))
  count, whole = num_trainings(s, share_kept(s, bench.splits["train"].num_tokens[rows]))
  count, whole = count - known, whole - known
  test = price.packed_pass("test losses", "losses", price.packed("test"), count + known + 1)
  found = [*price.boundary("train"), *price.boundary("test"), *price.reference("train", "test")]
  named = {*listed(s.policies), *(map(_policy_of_run, listed(s.select_runs)) if s.fractions else ())}
  found += choice_phases(price, s, named)
  name = f"{count} trainings: {one.name.removeprefix('training, ')}"
  return [*found, dataclasses.replace(one, name=name, flops=whole * one.flops, gathered=whole * one.gathered), test]


def demo_phases(bench: Session, s: Settings) -> list[Phase]:
  """All three; a boundary cache that serves several of them is filled once."""
  found: dict[tuple, Phase] = {}
  # Fine-tuning is the training on the full set with --seed; evaluate takes its checkpoint.
  known = int("full" in listed(s.policies) and s.seed in integers(s.fixed_seeds or s.seeds, "seeds"))
  stages = [
    *finetune_phases(bench, s),
    *select_phases(bench, s),
    *evaluate_phases(bench, s.replace(select_runs=s.policy), known),
  ]
  for phase in stages:
    shared = phase.name.startswith(("hidden states", "reference model"))
    found.setdefault((phase.name, "" if shared else phase.stage), phase)
  return list(found.values())


STAGES = {
  "finetune": finetune_phases,
  "select": select_phases,
  "evaluate": evaluate_phases,
  "demo": demo_phases,
}


# ---- small parts ---------------------------------------------------------------------


def share_kept(s: Settings, num_tokens: np.ndarray) -> float:
  """Share of the training examples in a set of the one budget, by `compared.candidates` that of the first select run.

  Args:
    s: flags; of a select run that is not finished they are taken to be its own.
    num_tokens: int [N], of the training examples with a response; a token budget is taken to keep average ones.
  """
  summaries = filter(None, map(_summary_of, listed(s.select_runs)[:1]))
  budget = Budget.read(s.budget)
  counts = [summary["selected"] for summary in summaries] or [budget.num_examples]
  if counts[0]:
    return min(1.0, counts[0] / len(num_tokens))
  return min(1.0, budget.token_budget / num_tokens.sum()) if budget.token_budget else budget.fraction


def num_trainings(s: Settings, share: float = 1.0) -> tuple[int, float]:
  """(trainings of an evaluation, how many of the full set's steps these are).

  As `evaluate.plan_of` compares: a policy has its seeds, and in a sweep every budget; a select run has the fixed seeds,
  and in a sweep it only names its policy. Full data is trained once for each seed, whatever is equal.

  Args:
    s: flags.
    share: of the examples in a set, where there is one budget.
  """
  seeds, fixed = seeds_of(s)
  budgets = [share for share in shares(s.fractions, "fractions") if share < 1]
  policies, runs = listed(s.policies), listed(s.select_runs)
  if budgets:
    policies += [name for name in dict.fromkeys(map(_policy_of_run, runs)) if name not in policies]
    runs = []
  kept = budgets or [share]
  compared = [(name, len(seeds if name in coreset.SEEDED_POLICIES else fixed)) for name in policies]
  count, whole = 0, 0.0
  for name, own in [*compared, *((name, len(fixed)) for name in runs)]:
    if name == "full":
      count, whole = count + own, whole + own
      continue
    for equal in listed(s.equal):
      count += own * len(kept)
      # A smaller set has fewer steps in as many epochs; in as many tokens about the same.
      whole += own * (sum(kept) if equal == "epochs" else len(kept))
  return count, whole


def _policy_of_run(folder: str) -> str:
  """The policy of a select run, or the folder's name while it is not finished."""
  summary = _summary_of(folder)
  return summary["policy"] if summary else epath.Path(folder).name


def _summary_of(folder: str) -> dict | None:
  """summary.json of a select run, None while it is not finished."""
  there = (epath.Path(folder) / "summary.json").exists()
  return run_folder.RunDir.load(folder).load_json("summary.json") if there else None


def shape_work(shape: packing.PackedShape, groups: int, examples: int) -> flop_counts.Work:
  """One batch of a packed shape."""
  tokens = groups * shape.height * shape.num_tokens
  return flop_counts.Work(tokens, tokens * shape.num_tokens, groups * shape.num_slots, examples, 1)
