"""What the phases of every stage compute and hold; which they are, and in which order, says `pipeline.phases`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np
from etils import epath

from in2core_jax.costs import flop_counts, memory
from in2core_jax.data import packing
from in2core_jax.data.records import Raws, firsts
from in2core_jax.data.subsets import PARTS
from in2core_jax.errors import how_many
from in2core_jax.estimate.pricing import FLOAT, Phase, Pricer
from in2core_jax.influence import kernels, projected
from in2core_jax.params import adapters, moment_probes, subtree
from in2core_jax.pipeline import auto_batch, index, phases, shapes, solver_inputs
from in2core_jax.pipeline.index_settings import NONZEROS, IndexSettings
from in2core_jax.pipeline.scoring import topic_rows
from in2core_jax.pipeline.session import Session
from in2core_jax.pipeline.settings import Settings, integers, listed, seeds_of, shares
from in2core_jax.pipeline.shapes import num_steps, num_summed, trained_shapes
from in2core_jax.recommendation import plan as plans
from in2core_jax.recommendation import run as recommend
from in2core_jax.recommendation.settings import FEW, in_little
from in2core_jax.runs import run_folder
from in2core_jax.selection import aggregation, coreset
from in2core_jax.selection.inputs import Budget


def finetune_phases(session: Session, s: Settings) -> list[Phase]:
  """Fine-tuning on the full training set."""
  params, tree = trained_shapes(session.model.config, s)
  price = Pricer(session, "finetune", params, tree)
  rows = session.splits["train"].num_response_tokens.nonzero()[0]
  steps = num_steps(s, len(rows))
  kept = s.keep_checkpoints or -(-steps // s.checkpoint_every)
  # float32 weights and Adam's two moments; the newest is written before the oldest goes.
  disk = 3 * FLOAT * price.sizes.subtree * (kept + 1)
  prices = hidden_prices(price) | {
    phases.TRAINING: lambda: [dataclasses.replace(training(price, s, rows, steps), disk=disk)]
  }
  return [*price.reference("train"), *priced(phases.of_finetune(price.boundary), prices)]


def priced(names: Iterable[str], prices: Mapping[str, Callable[[], list[Phase]]]) -> list[Phase]:
  """The phases of a table of `pipeline.phases`, in its order."""
  return [phase for name in names for phase in prices[name]()]


def training(price: Pricer, s: Settings, rows: np.ndarray, steps: int) -> Phase:
  """Optimiser steps on some rows of the training set, in the shape that the run would choose."""
  shape = packing.training_shape([price.session.packer("train", rows=rows)], s.batch_size, [s.seed])
  step = shape_work(shape, price.groups, s.batch_size)
  flops = steps * flop_counts.pass_flops(price.sizes, "gradient", step, price.cached)
  # Weights in float32, two moments, the gradient and the update.
  device = price.device(price.program("gradient", (shape,)), 5)
  return price.phase(
    f"{phases.TRAINING}, {how_many(steps, 'step')} of {how_many(s.batch_size, 'example')}", flops, device, 2.0 * steps
  )


def select_phases(session: Session, s: Settings) -> list[Phase]:
  """Influence of every training example, and the coreset."""
  price = Pricer(session, "select", *shapes.scored_shapes(session.model.config, s))
  groups = topic_rows(session, s)
  inverse = auto_batch.inverse_of(s, len(groups))
  held, way = memory.num_vectors(inverse), phases.way_of(s, len(groups))
  evals = functools.reduce(flop_counts.Work.plus, (price.packed("eval", rows) for rows in groups.values()))
  times = 1
  if s.trajectory != "none":
    times = num_summed(session, s)
    if phases.score_aggregate(s) in aggregation.BY_QUERY:  # a pass for each block of queries
      times *= -(-len(session.splits["eval"]) // s.query_block)
  of_store = way == "projected" and s.policy not in coreset.GRADIENT_POLICIES

  def by_layer() -> list[Phase]:
    work = price.by_row("train")
    more = flop_counts.contraction_flops(price.sizes, work.examples, 1)
    return [price.mapped_pass(phases.LAYERS, work, more, held)]

  prices = hidden_prices(price) | choice_prices(price, s, loaded=not of_store)
  prices |= solver_prices(price, s, inverse) | score_prices(price, s, inverse, times)
  prices |= {
    phases.QUERIES: lambda: [price.packed_pass(phases.QUERIES, "gradient", evals, times, 2 + len(groups))],
    phases.LAYERS: by_layer,
    phases.TOKENS: lambda: [price.packed_pass(phases.TOKENS, "jvp", price.packed("train"), 1, held)],
    phases.BLOCKS: lambda: block_phases(price, s, inverse),
    phases.RESULTS: lambda: [results_phase(session, s, len(groups))],
  }
  return [*price.reference("train", "eval"), *priced(phases.of_select(s, price.boundary, len(groups)), prices)]


def hidden_prices(price: Pricer) -> dict[str, Callable[[], list[Phase]]]:
  """Filling the boundary cache, part by part."""
  if not price.cached:
    return {}
  return {phases.hidden(price.boundary, part): (lambda part=part: [price.fill(part)]) for part in PARTS}


def solver_prices(price: Pricer, s: Settings, inverse: flop_counts.Inverse) -> dict[str, Callable[[], list[Phase]]]:
  """The inverse Hessian product: products with curvature batches, EK-FAC's fit, DataInf's passes."""
  return {s.solver: lambda: [products(price, s, inverse)], phases.FACTORS: lambda: [factors(price, s, inverse)]}


def products(price: Pricer, s: Settings, inverse: flop_counts.Inverse) -> Phase:
  """The solver's own passes."""
  sizes, held = price.sizes, memory.num_vectors(inverse, s.acceleration != "none")
  if inverse.solver == "datainf":
    rows = price.by_row("train", every_slot=False)
    flops = flop_counts.datainf_flops(sizes, inverse, rows, price.cached)
    passes = 2 if inverse.relative else 1
    return price.phase("datainf", flops, price.device(row_bytes(price), held), 2.0 * passes * rows.batches)
  curvature = solver_inputs.curvature_rows(price.session, s)
  batch = shape_work(curvature.shape, price.groups, curvature.batch)
  fixed = curvature.num_fixed
  count = flop_counts.num_products(inverse.solver, fixed, inverse.depth, inverse.repeat, sizes.subtree, inverse.apart)
  flops = flop_counts.products_flops(sizes, inverse, batch, fixed, price.cached)
  queries = 64 if inverse.solver == "exact" else inverse.queries
  device = price.device(price.program(inverse.curvature, (curvature.shape,), queries), held)
  if "ekfac" in (s.solver, s.precondition):
    flops += flop_counts.ekfac_apply_flops(sizes, inverse.queries) * (s.depth if s.precondition == "ekfac" else 1)
  # Until the run is finished: the queries' gradients, the solution, and LiSSA's state (its iterate and three sums).
  disk = FLOAT * sizes.subtree * inverse.queries * (2 + (4 if inverse.solver == "lissa" else 0))
  most = "at most " if inverse.solver == "cg" else ""  # it stops at --solver_tol
  name = f"{inverse.solver}, {most}{how_many(count, 'product')} of {how_many(curvature.batch, 'example')}"
  return price.phase(name, flops, device, 3.0 * count, disk=disk)


def factors(price: Pricer, s: Settings, inverse: flop_counts.Inverse) -> Phase:
  """What the solver or its preconditioner is fitted to first: EK-FAC, or a diagonal out of one pass."""
  curvature = solver_inputs.curvature_rows(price.session, s)
  name = f"{phases.FACTORS} of {how_many(len(curvature.factors), 'example')}"
  every = price.by_row("train", curvature.factors)
  if s.precondition == "diagonal":
    return price.mapped_pass(name, every, 0.0, 1 + inverse.queries)
  rows = price.by_row("train", curvature.factors, every_slot=False)
  flops = flop_counts.ekfac_fit_flops(price.sizes, rows, every, s.curvature != "fisher", price.cached)
  size = memory.ekfac_bytes(price.sizes)
  device = price.device(price.mapped() + 2 * size, inverse.queries)
  return price.phase(name, flops, device, 6 * rows.batches, disk=size)


def score_prices(
  price: Pricer, s: Settings, inverse: flop_counts.Inverse, times: int
) -> dict[str, Callable[[], list[Phase]]]:
  """Losses and scores of the training set, by the way that `scoring.score` takes."""
  sizes, queries = price.sizes, inverse.queries
  train, held = price.packed("train"), 2 * queries
  losses = lambda name: price.packed_pass(name, "losses", train)  # noqa: E731

  def norms() -> list[Phase]:
    if moment_probes.beside_all(price.sub):
      rows = price.by_row("train", every_slot=False)
      flops = flop_counts.measures_flops(sizes, rows, queries, s.solver == "ekfac", price.cached)
      return [price.phase(phases.NORMS, flops, price.device(row_bytes(price), held), 2.0 * rows.batches)]
    rows = price.by_row("train")
    a_row = flop_counts.ekfac_apply_flops(sizes, 1) if s.solver == "ekfac" else 0.0
    more = rows.examples * a_row + flop_counts.contraction_flops(sizes, rows.examples, queries + 2)
    return [price.mapped_pass(f"{phases.NORMS}, per-example gradients", rows, more, held)]

  def plain(name: str) -> list[Phase]:
    if s.trajectory != "less" and kernels.score_path(s.score_path, queries) == "jvp":
      return [price.packed_pass(f"{name}, jvp{_of(queries)}", "jvp", train, times * queries, held)]
    rows = price.by_row("train").times(times)
    more = flop_counts.contraction_flops(sizes, rows.examples, queries)
    return [price.mapped_pass(f"{name}, per-example gradients", rows, more, held)]

  def scores() -> list[Phase]:
    found = plain(phases.SCORES)
    return found if found[0].name.startswith(f"{phases.SCORES}, jvp") else [losses(f"{phases.SCORES}, losses"), *found]

  return {
    phases.AT_STEPS: lambda: plain(f"{phases.AT_STEPS} {how_many(times, 'checkpoint')}"),
    phases.LOSSES: lambda: [losses(phases.LOSSES)],
    phases.NORMS: norms,
    phases.SCORES: scores,
  }


def _of(queries: int) -> str:
  return f" of {queries} queries" if queries > 1 else ""


def block_phases(price: Pricer, s: Settings, inverse: flop_counts.Inverse) -> list[Phase]:
  """Scores of every evaluation example, a block of them at a time."""
  block = min(s.query_block, len(price.session.splits["eval"]))
  blocks = -(-len(price.session.splits["eval"]) // block)
  evals, rows = price.by_row("eval"), price.by_row("train")
  vmap = kernels.score_path(s.score_path, block) == "vmap"
  scores = flop_counts.pass_flops(price.sizes, "gradient" if vmap else "jvp", rows, price.cached) * (
    1 if vmap else block
  )
  scores += flop_counts.contraction_flops(price.sizes, rows.examples, block)
  more = blocks * scores
  found = [price.mapped_pass(f"{phases.BLOCKS}, {how_many(blocks, 'block')}", evals, more, 3 * block, True)]
  if inverse.solver == "identity":
    return found
  # Factors are made for the aggregated query, and read back.
  solved = products(price, s, inverse._replace(queries=block))
  flops, gathered = solved.flops * blocks, solved.gathered * blocks
  return [*found, dataclasses.replace(solved, name=f"{phases.BLOCKS}: {solved.name}", flops=flops, gathered=gathered)]


def choice_prices(price: Pricer, s: Settings, loaded: bool = True) -> dict[str, Callable[[], list[Phase]]]:
  """What policies choose from beside scores (`policy_inputs.ChoiceInputs`), and what is kept of it on disk.

  Args:
    price: at the parameters that are scored.
    s: how gradients are projected.
    loaded: whether all projected gradients come into memory, as a policy needs them.
  """

  def drop() -> list[Phase]:
    return [
      price.packed_pass(phases.DROP, "gradient", price.packed("eval"), s.epochs),
      price.packed_pass(f"{phases.DROP}, losses", "losses", price.packed("train"), 2),
    ]

  found = {phases.DROP: drop}
  found |= {phases.projected(part): (lambda part=part: [projection(price, s, part, loaded)]) for part in PARTS}
  return found | {phases.embedded(part): (lambda part=part: [price.hidden_states(part)]) for part in PARTS}


def projection(price: Pricer, s: Settings, part: str, loaded: bool) -> Phase:
  """Projected gradients of a part, of the training set kept on disk; at the parameters that are scored."""
  other = sketched(price.session, price.stage, s)
  work = other.by_row(part, every_slot=False)
  flops = flop_counts.pass_flops(other.sizes, "gradient", work, other.cached)
  disk = FLOAT * other.sizes.subtree * len(price.session.splits[part]) if part == "train" else 0.0
  device = other.device(sketch_bytes(other))
  phase = other.phase(phases.projected(part), flops, device, 2 * work.batches, disk=disk)
  return dataclasses.replace(phase, host=phase.host + (disk if loaded else 0.0))


def sketched(session: Session, stage: str, s: Settings) -> Pricer:
  """Prices passes whose gradients are in the cores of a sketch."""
  base = shapes.param_shapes(session.model.config, session.settings.dtype, 0, session.settings.frozen_weights)
  cores = adapters.cores_of(base, s.modules)
  size = projected.size_of(base, s.layers, s.sketch_size, cores)
  params = jax.eval_shape(lambda p: adapters.add_sketch(p, size, jax.random.key(0)), base)
  return Pricer(session, stage, params, subtree.make_subtree(params, s.layers, cores))


def row_bytes(price: Pricer) -> float:
  """Bytes of the program of a backward pass over a batch with a row for each example."""
  session = price.session
  rows = max((layout.size, shape.num_tokens, layout.num_slots) for shape, layout in session.batching.layout.items())
  program = memory.Program("gradient", rows[0] // price.groups, rows[1], rows[2])
  return memory.program_bytes(session.model.config, price.sizes, program, session.settings.dtype)


def sketch_bytes(price: Pricer) -> float:
  """Bytes of the program that gives sketched gradients: beside it a copy of the cores for each example, a gradient."""
  examples = max((layout.size, shape.num_tokens) for shape, layout in price.session.batching.layout.items())[0]
  return row_bytes(price) + 2 * FLOAT * examples // price.groups * price.sizes.subtree


def index_phases(session: Session, s: IndexSettings) -> list[Phase]:
  """A new index: whole sketched gradients of those that its basis follows, then rows of all other examples."""
  price, train = sketched(session, "index", s), session.splits["train"]
  price.cached = False  # tokens go in, and each example is seen once
  sample = index.sample_rows(train, s.index_size)
  others = index.other_rows(train, sample)
  kept = s.index_size if s.index_basis == "queries" else NONZEROS
  packed = session.batching.packed_shapes
  program = price.program("gradient", packed) + 2 * FLOAT * price.sizes.subtree * max(shape.size for shape in packed)

  def passed(part: str, pieces: list[np.ndarray]) -> tuple[flop_counts.Work, float]:
    works = (price.packed(part, own) for own in pieces)
    work = functools.reduce(flop_counts.Work.plus, works, flop_counts.Work())
    # Hidden states are the base model's: with other weights they take a pass of their own.
    base = price.hidden_states(part).flops * work.examples / len(session.splits[part]) if s.checkpoint else 0.0
    return work, flop_counts.pass_flops(price.sizes, "gradient", work, False) + base

  def raw(name: str, part: str, rows: np.ndarray) -> list[Phase]:
    work, flops = passed(part, index.raw_pieces(rows))
    size = FLOAT * price.sizes.subtree * len(rows)
    phase = price.phase(name, flops, price.device(program), 2 * work.batches, disk=size)
    return [dataclasses.replace(phase, host=size)]

  def rest() -> list[Phase]:
    work, flops = passed("train", [others])
    flops += flop_counts.contraction_flops(price.sizes, len(others), kept)
    disk = index.row_bytes(s) * (len(sample) + len(others)) + FLOAT * price.sizes.subtree * kept
    return [price.phase(phases.INDEX, flops, price.device(program, kept), 2 * work.batches, disk=disk)]

  prices = {
    phases.SAMPLE: lambda: raw(phases.SAMPLE, "train", sample),
    phases.ASKED: lambda: raw(phases.ASKED, "eval", index.asked_rows(session)),
    phases.INDEX: rest,
  }
  return priced(phases.of_index(s), prices)


def results_phase(session: Session, s: Settings, queries: int) -> Phase:
  """Files of a select run; scores are also kept in pieces while they are computed."""
  train, evals = session.splits["train"], session.splits["eval"]
  numbers = len(train) * (20 + 2 * (queries + 1))
  numbers += len(train) * (len(evals) + 2) if s.writes("query") else 0
  numbers += int(train.num_response_tokens.sum()) * 8 if s.writes("token") else 0
  numbers += len(train) * session.model.config.num_layers * 2 if s.writes("layer") else 0
  texts = sum(map(len, Raws(train.records)))
  return Phase("select", phases.RESULTS, disk=FLOAT * numbers + texts)


def evaluate_phases(session: Session, s: Settings, known: int = 0) -> list[Phase]:
  """Retraining on every compared set, and the test losses; all of them take the steps of the full set.

  Args:
    known: trainings that are there already.
  """
  params, tree = trained_shapes(session.model.config, s)
  price = Pricer(session, "evaluate", params, tree)
  rows = session.splits["train"].num_response_tokens.nonzero()[0]
  one = training(price, s, rows, num_steps(s, len(rows)))
  count, whole = num_trainings(s, share_kept(s, session.splits["train"].num_tokens[rows]))
  count, whole = count - known, whole - known
  name = f"{how_many(count, phases.TRAINING)}: {one.name.removeprefix(f'{phases.TRAINING}, ')}"
  every = dataclasses.replace(one, name=name, flops=whole * one.flops, gathered=whole * one.gathered)
  named = {*listed(s.policies), *(map(_policy_of_run, listed(s.select_runs)) if s.fractions else ())}
  prices = hidden_prices(price) | choice_prices(price, s)
  prices |= {
    phases.TRAININGS: lambda: [every],
    phases.TEST: lambda: [price.packed_pass(phases.TEST, "losses", price.packed("test"), count + known + 1)],
  }
  return [*price.reference("train", "test"), *priced(phases.of_evaluate(named, price.boundary), prices)]


def demo_phases(session: Session, s: Settings) -> list[Phase]:
  """All three and the recommendation; a boundary cache that serves several of them is filled once."""
  found: dict[tuple, Phase] = {}
  # Fine-tuning is the training on the full set with --seed; evaluate takes its checkpoint.
  known = int("full" in listed(s.policies) and s.seed in integers(s.fixed_seeds or s.seeds, "seeds"))
  stages = [
    *finetune_phases(session, s),
    *select_phases(session, s),
    *evaluate_phases(session, s.replace(select_runs=s.policy), known),
    recommendation_phase(session, s),
  ]
  for phase in stages:
    shared = phase.name.startswith(("hidden states", "reference model"))
    found.setdefault((phase.name, "" if shared else phase.stage), phase)
  return list(found.values())


def recommendation_phase(session: Session, s: Settings) -> Phase:
  """What the demo ends in: short trainings on small sets, by the plan of the run with FLOPs for seconds."""
  own = in_little(s, s.run_dir)
  price, train = Pricer(session, "recommend", *trained_shapes(session.model.config, s)), session.splits["train"]
  rows = train.num_response_tokens.nonzero()[0]
  step = training(price, s, rows, 1)
  few = {part: np.arange(min(FEW, len(session.splits[part]))) for part in ("eval", "test")}
  judged = [price.packed_pass("", "losses", price.packed(part, own_rows)).flops for part, own_rows in few.items()]
  copies = not firsts(train.records)[rows].all()  # then all of the data is trained on with each text once, too
  pace = plans.Pace(step.flops, *judged, 0.0, {}, 0.0, 0.0, int(copies))
  flops = plans.seconds_of(recommend.wanted(own, session), pace, recommend.steps_of(session, own))
  steps = how_many(round(flops / step.flops), "step")
  name = f"{phases.RECOMMENDATION}, about {steps} of {how_many(s.batch_size, 'example')}"
  return dataclasses.replace(step, name=name, flops=flops, gathered=step.gathered * flops / step.flops)


STAGES = {
  "finetune": finetune_phases,
  "index": index_phases,
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
