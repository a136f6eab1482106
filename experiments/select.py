"""Stage 4, the heart: influence of every training example on the evaluation set, and the coreset that follows from it.

python -m experiments.select --train_data=jsonl:mine.jsonl --layers=last:8 --fraction=0.5 --run_dir=runs/mine
"""

import dataclasses
import logging
import math
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cli, flags
from experiments.flags import Settings
from experiments.workbench import Chosen, Workbench, choose
from in2core_jax import adapters, artifacts, batches, coreset, data, finetune, ihvp, influence, report, subtree
from in2core_jax.errors import UserError
from in2core_jax.progress import Progress

log = logging.getLogger(__name__)


class Clock:
  """Seconds per phase."""

  def __init__(self):
    self.seconds: dict[str, float] = {}
    self._last = time.perf_counter()

  def lap(self, phase: str) -> None:
    """Ends a phase."""
    now = time.perf_counter()
    self.seconds[phase] = round(self.seconds.get(phase, 0.0) + now - self._last, 2)
    self._last = now


@dataclasses.dataclass(frozen=True)
class Scored:
  """What scoring gives.

  Attributes:
    influence: float64 [N], on the aggregated query.
    loss: float32 [N] of the training examples.
    result: of the solver.
    seconds: per phase.
  """

  influence: np.ndarray
  loss: np.ndarray
  result: ihvp.SolveResult
  seconds: dict


def solver_settings(s: Settings) -> influence.SolverSettings:
  """The solver that the flags ask for."""
  given = not math.isnan(s.damping)
  return influence.SolverSettings(
    s.solver,
    s.curvature,
    s.damping if given else None,
    None if given else s.damping_ratio,
    s.depth,
    s.repeat,
    None if math.isnan(s.scale) else s.scale,
    s.acceleration,
    s.solver_tol,
    s.seed,
    s.average,
  )


def curvature_data(bench: Workbench, s: Settings, chosen: Chosen) -> influence.CurvatureData:
  """Splits the training rows into a fixed set and the rest that LiSSA's minibatches are drawn from."""
  dataset = bench.parts["train"]
  usable = np.flatnonzero(dataset.num_response_tokens)
  mixed = np.random.default_rng((s.seed, 11)).permutation(usable)
  # Half at most goes to the fixed set, so that a small data set leaves something to draw.
  size = min(s.curvature_examples, max(1, len(usable) // 2))
  fixed, drawn = np.sort(mixed[:size]), np.sort(mixed[size:])
  whole = bench.batcher("train", chosen.tree, chosen.params)
  groups = {shape: [] for shape in bench.shapes}
  for row in drawn if len(drawn) else fixed:
    groups[whole.shape_of([row])].append(row)
  groups = {shape: np.array(rows) for shape, rows in groups.items() if rows}
  layout = curvature_layout(whole, groups, s.curvature_batch)
  sized = bench.batcher("train", chosen.tree, chosen.params, layout=layout)
  build = lambda rows, shape, count: bench.place(sized.batch(rows, shape, layout[shape].size))  # noqa: E731
  draw = influence.stratified_draw([(rows, shape) for shape, rows in groups.items()], s.curvature_batch, build)
  # Batches of the fixed set have the sizes of a minibatch's parts: one program serves both.
  some = bench.batcher("train", chosen.tree, chosen.params, fixed, layout)
  return influence.CurvatureData(bench.stream(whole, f"{s.solver} over the training set"), bench.stream(some), draw)


def curvature_layout(whole: batches.Batcher, groups: dict, size: int) -> dict[batches.Shape, batches.Layout]:
  """Sizes of a stratified minibatch's parts, and slots that hold nearly every draw (a fuller one compiles anew)."""
  rng, plan = np.random.default_rng(0), []
  counts = influence.stratified_counts([len(rows) for rows in groups.values()], size)
  for (shape, rows), count in zip(groups.items(), counts, strict=True):
    padded = batches.round_up(count, whole.multiple_of)
    plan += [(rng.choice(rows, min(count, len(rows)), replace=False), shape, padded) for _ in range(32)]
  return whole.layout_of(plan)


def queries(bench: Workbench, s: Settings, chosen: Chosen):
  """The aggregated queries and their names: one for --aggregate=mean, else one for each evaluation topic."""
  topics = np.array(bench.parts["eval"].topics)
  names = ["all"] if s.aggregate == "mean" else sorted(set(topics))
  gradients = []
  for name in names:
    rows = np.arange(len(topics)) if name == "all" and s.aggregate == "mean" else np.flatnonzero(topics == name)
    stream = bench.stream(bench.batcher("eval", chosen.tree, chosen.params, rows), "evaluation gradient")
    gradients.append(chosen.problem.mean_gradient(stream))
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *gradients), names


def score(bench: Workbench, s: Settings, chosen: Chosen) -> Scored:
  """Losses, query gradients, inverse Hessian product and scores."""
  clock = Clock()
  train = bench.batcher("train", chosen.tree, chosen.params)
  bench.batcher("eval", chosen.tree, chosen.params)
  clock.lap("boundary")
  v, names = queries(bench, s, chosen)
  clock.lap("query gradients")
  result = solve(bench, s, chosen, v)
  _announce(result)
  clock.lap("solver")
  stream = bench.stream(train, "losses and scores")
  loss, raw = chosen.problem.losses_and_scores(stream, len(train), result.solution, s.score_path)
  clock.lap("scores")
  total = coreset.aggregate(raw, names, s.aggregate, bench.parts["train"].ids)
  return Scored(total, loss, result, clock.seconds)


def solve(bench: Workbench, s: Settings, chosen: Chosen, v) -> ihvp.SolveResult:
  """The inverse Hessian product, with LiSSA's progress shown."""
  source = curvature_data(bench, s, chosen)
  if s.solver != "lissa":
    return influence.solve(chosen.problem, v, solver_settings(s), source)
  log.info("lissa: estimating the largest eigenvalue on %d examples", s.curvature_examples)
  with Progress(s.depth * s.repeat, "lissa", "steps") as progress:

    def show(state: ihvp.LissaState) -> None:
      progress.update(state.done + state.step - progress.count, residual=float(np.max(state.curve[-1][1])))

    return influence.solve(chosen.problem, v, solver_settings(s), source, on_state=show)


def _announce(result: ihvp.SolveResult) -> None:
  facts = {k: (f"{v:.4g}" if isinstance(v, float) else v) for k, v in result.info.items()}
  log.info("solver: %s", ", ".join(f"{name}={value}" for name, value in facts.items()))
  if np.all(np.isfinite(result.residual)):
    log.info("solver: relative residual %.3g after %d steps", float(np.max(result.residual)), result.steps)


def sketch_inputs(bench: Workbench, s: Settings, params) -> dict:
  """Projected gradients as `coreset.PolicyInputs` takes them: of the N training examples, of the queries, their topics.

  Evaluation examples without a response have no gradient and are left out.
  """
  sketched = adapters.add_sketch(params, s.sketch_size, jax.random.key(s.seed))
  chosen = choose(bench, sketched, s.layers, "sketch")
  found = []
  for part in ("train", "eval"):
    batcher = bench.batcher(part, chosen.tree, params)  # a sketch changes no hidden state
    stream = bench.stream(batcher, f"projected gradients ({part})")
    found.append(chosen.problem.adapter_features(stream, len(batcher)))
  evals = bench.parts["eval"]
  keep = np.flatnonzero(evals.num_response_tokens)
  return {"features": found[0], "target": found[1][keep], "query_topics": [evals.topics[row] for row in keep]}


def policy_inputs(bench: Workbench, s: Settings, params, scored: Scored) -> coreset.PolicyInputs:
  """All that the policies choose from; features only where the policy needs them."""
  train = bench.parts["train"]
  sketched = sketch_inputs(bench, s, params) if s.policy in coreset.FEATURE_POLICIES else {}
  return coreset.PolicyInputs(
    scored.influence,
    scored.loss,
    train.num_tokens,
    train.num_response_tokens,
    train.topics,
    train.ids,
    **sketched,
  )


def budget_of(s: Settings) -> coreset.Budget:
  """The budget that the flags ask for."""
  if s.num_examples and s.token_budget:
    raise UserError(f"--num_examples={s.num_examples} and --token_budget={s.token_budget}: give one of the two")
  if s.num_examples:
    return coreset.Budget(num_examples=s.num_examples)
  if s.token_budget:
    return coreset.Budget(token_budget=s.token_budget)
  return coreset.Budget(fraction=s.fraction)


def query_scores(bench: Workbench, s: Settings, chosen: Chosen) -> np.ndarray:
  """Scores of every evaluation example with every training example, float32 [Q, N], `--query_block` at a time."""
  size, train = len(bench.parts["eval"]), bench.batcher("train", chosen.tree, chosen.params)
  block, blocks = min(s.query_block, size), []
  for start in range(0, size, block):
    rows = np.minimum(np.arange(start, start + block), size - 1)  # a filled last block compiles nothing new
    batcher = bench.batcher("eval", chosen.tree, chosen.params, rows)
    v = jax.tree.map(jnp.asarray, chosen.problem.gradients(bench.stream(batcher), len(rows)))
    result = solve(bench, s, chosen, v)
    what = f"scores of evaluation examples {start}..{rows[-1]} of {size}"
    found = chosen.problem.scores(bench.stream(train, what), len(train), result.solution, s.score_path)
    blocks.append(found[: size - start])
  return np.concatenate(blocks)


def run(settings: Settings, bench: Workbench | None = None) -> str:
  """Scores, selects, writes; returns the run folder. Returns at once when the folder holds this very run."""
  s = settings
  bench = bench or Workbench(s)
  budget = budget_of(s)
  params = bench.checkpoint_params(s.checkpoint)
  chosen = choose(bench, params, s.layers, s.modules)
  train = bench.parts["train"]
  budget.limit(train.num_tokens[train.num_response_tokens > 0])  # what cannot be met is told before the work
  identity = bench.identity("select", s, ("data", "model", "select", "run"), ("train", "eval"))
  identity["flags"].pop("checkpoint")
  identity["checkpoint"] = artifacts.hash_of(_checkpoint_identity(s.checkpoint))
  run_dir = artifacts.RunDir.open(s.run_dir, identity, overwrite=s.overwrite)
  if run_dir.file("summary.json").exists():
    log.info("%s is finished already", run_dir.path)
    return str(run_dir.path)
  log.info("\n%s", data.format_summary(bench.summary))
  run_dir.write_json("data_summary.json", bench.summary)
  run_dir.write_flags("flags.txt", s.as_flags(), ["python -m experiments.select --flagfile=THIS"])
  log.info("influence of layers %s: %s numbers", chosen.tree.layers, f"{subtree.count(chosen.problem.sub):,}")
  scored = score(bench, s, chosen)
  clock = Clock()
  inputs = policy_inputs(bench, s, params, scored)
  rows = coreset.select_rows(s.policy, inputs, budget, s.seed)
  clock.lap("selection")
  if s.per_query:
    _write_query_scores(run_dir, bench, query_scores(bench, s, chosen))
    clock.lap("per query")
  warnings = coreset.selection_warnings(rows, inputs, s.seed)
  for warning in warnings:
    log.warning("%s", warning)
  write_results(run_dir, bench, s, dataclasses.replace(scored, seconds=scored.seconds | clock.seconds), rows, warnings)
  kept, size = inputs.num_response_tokens[rows].sum(), inputs.num_response_tokens.sum()
  log.info(
    "selected %d of %d examples by %s, %.0f %% of the response tokens: %s",
    len(rows),
    len(inputs.ids),
    s.policy,
    100 * kept / size,
    run_dir.path / "coreset.jsonl",
  )
  return str(run_dir.path)


def _checkpoint_identity(folder: str) -> dict:
  return finetune.checkpoint_meta(folder) if folder else {}


def _write_query_scores(run_dir, bench: Workbench, scores: np.ndarray) -> None:
  evals, train = bench.parts["eval"].ids, bench.parts["train"].ids
  run_dir.write_parquet(
    "query_scores.parquet",
    {
      "query": np.repeat(np.array(evals, dtype=object), len(train)),
      "example": np.tile(np.array(train, dtype=object), len(evals)),
      "influence": scores.reshape(-1),
    },
  )


def ranks(values: np.ndarray) -> np.ndarray:
  """1 for the highest influence; ties by row."""
  order = np.argsort(-values, kind="stable")
  rank = np.empty(len(values), np.int64)
  rank[order] = np.arange(1, len(values) + 1)
  return rank


def write_results(
  run_dir, bench: Workbench, s: Settings, scored: Scored, rows: np.ndarray, warnings: list[str]
) -> None:
  """coreset.jsonl, scores.parquet, plots, report.md, and at the very end summary.json, which marks the run as done."""
  train = bench.parts["train"]
  selected = np.zeros(len(train), bool)
  selected[rows] = True
  columns = {
    "example_id": np.array(train.ids, dtype=object),
    "influence": np.asarray(scored.influence, np.float32),
    "rank": ranks(scored.influence),
    "selected": selected,
    "loss": np.asarray(scored.loss, np.float32),
    "num_tokens": train.num_tokens,
    "num_response_tokens": train.num_response_tokens,
    "topic": np.array(train.topics, dtype=object),
  }
  run_dir.write_text("coreset.jsonl", "".join(train.records[row].raw + "\n" for row in np.sort(rows)))
  run_dir.write_parquet("scores.parquet", columns)
  result = scored.result
  images = {"Influence of the training examples": "plots/scores.png"}
  plots = run_dir.folder("plots")
  histogram = report.score_histogram_plot(scored.influence, selected)
  artifacts.write_bytes(plots / "scores.png", report.figure_bytes(histogram))
  if len(result.curve) > 1:
    steps, residuals = [step for step, _ in result.curve], [r for _, r in result.curve]
    figure = report.residual_plot(residuals, s.solver, steps)
    artifacts.write_bytes(plots / "residual.png", report.figure_bytes(figure))
    images["Residual of the solver on examples that it has not seen"] = "plots/residual.png"
  solver = {k: v for k, v in result.info.items() if isinstance(v, str | int | float | bool)}
  residual = float(np.max(result.residual)) if np.all(np.isfinite(result.residual)) else None
  empty = [train.ids[row] for row in np.flatnonzero(train.num_response_tokens == 0)]
  summary = {
    "sign": "positive influence = proponent: more weight on the example lowers the evaluation loss",
    "unit": _unit(s),
    "divided_by_number_of_examples": False,
    "loss_reduction": s.loss_reduction,
    "policy": s.policy,
    "examples": len(train),
    "selected": int(selected.sum()),
    "response_tokens": int(train.num_response_tokens.sum()),
    "selected_response_tokens": int(train.num_response_tokens[selected].sum()),
    "without_response": empty,
    "solver": solver,
    "solver_steps": result.steps,
    "solver_residual": residual,
    "solver_curve": [[step, np.asarray(r).tolist()] for step, r in result.curve],
    "warnings": warnings,
    "seconds": scored.seconds,
    "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    "identity": run_dir.identity,
    "versions": artifacts.package_versions(),
    "devices": artifacts.device_summary(),
  }
  sections = {
    "Solver": solver | {"steps": result.steps, "residual": residual},
    "Data": _flat(bench.summary),
    "Seconds": scored.seconds,
  }
  texts = [shown(record) for record in train.records]
  run_dir.write_text("report.md", report.select_report_markdown(columns, texts, sections, warnings, images))
  run_dir.write_json("summary.json", summary)


def _unit(s: Settings) -> str:
  """What a score is a number of."""
  if s.aggregate == "topic_max":
    return "none: each evaluation topic's scores are divided by their root mean square, then the largest is taken"
  if s.aggregate == "topic_quota":
    return "none: a priority, the number of examples for the first choice down to 1 for the last"
  loss = f"loss: {s.loss_reduction} over response tokens, in nats"
  if s.solver == "identity":
    return f"loss^2 per squared parameter, an inner product of gradients ({loss})"
  return f"loss, the first-order change of the evaluation loss per unit of weight on the example, times -1 ({loss})"


def shown(record: data.Record) -> str:
  """A conversation in one string, for reports."""
  return " ".join(f"[{message['role']}] {message['content']}" for message in record.messages)


def _flat(summary: dict, prefix: str = "") -> dict:
  flat = {}
  for name, value in summary.items():
    if isinstance(value, dict) and name != "topics":
      flat |= _flat(value, f"{prefix}{name} ")
    elif isinstance(value, int | float | str):
      flat[f"{prefix}{name}"] = value
  return flat


def main(_) -> None:
  """Entry point."""
  run(flags.read())


if __name__ == "__main__":
  flags.define(run_dir="runs/select")
  cli.run(main)
