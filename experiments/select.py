"""Stage 4, the heart: influence of every training example on the evaluation set, and the coreset that follows from it.

python -m experiments.select --train_data=jsonl:mine.jsonl --layers=last:8 --fraction=0.5 --run_dir=runs/mine
"""

import dataclasses
import logging
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cli, flags
from experiments.flags import Settings
from experiments.scoring import (
  Projection,
  projected_scores,
  queries,
  trained_subtree,
  trajectory_scores,
  trajectory_weights,
)
from experiments.solving import announce, curvature_data, solve, solver_settings
from experiments.workbench import Chosen, Workbench, choose
from in2core_jax import (
  artifacts,
  breakdown,
  coreset,
  data,
  finetune,
  ihvp,
  influence,
  model,
  projected,
  records,
  report,
  subtree,
  variants,
)
from in2core_jax.errors import UserError

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
    self_influence: float64 [N], or None where nothing asked for it.
  """

  influence: np.ndarray
  loss: np.ndarray
  result: ihvp.SolveResult
  seconds: dict
  self_influence: np.ndarray | None = None


def score(bench: Workbench, s: Settings, chosen: Chosen) -> Scored:
  """Losses, query gradients, inverse Hessian product and scores."""
  clock = Clock()
  train = bench.packer("train", chosen.tree, chosen.params)
  bench.packer("eval", chosen.tree, chosen.params)
  clock.lap("boundary")
  itself = None
  if s.trajectory == "none":
    v, names = queries(bench, s, chosen)
    clock.lap("query gradients")
    result = solve(bench, s, chosen, v)
    clock.lap("solver")
  else:
    raw, v, names = trajectory_scores(bench, s)
    result = ihvp.identity(v)
  announce(result)
  if s.trajectory != "none":
    loss = chosen.problem.losses(bench.stream(train, "losses"), len(train))
  elif s.score_path == "projected":
    raw, facts = projected_scores(bench, s, chosen, result.solution)
    result = dataclasses.replace(result, info=result.info | facts)
    loss = chosen.problem.losses(bench.stream(train, "losses"), len(train))
  elif s.normalize != "none" or s.self_influence:
    found = measure(bench, s, chosen, result)
    raw, loss = _NORMALIZE[s.normalize](found), found.losses
    itself = found.self_influence if s.self_influence else None
  else:
    if influence.score_path(s.score_path, len(names)) == "vmap":  # which needs a row for each example
      train = bench.batcher("train", chosen.tree, chosen.params)
    stream = bench.stream(train, "losses and scores")
    loss, raw = chosen.problem.losses_and_scores(stream, len(train), result.solution, s.score_path)
  clock.lap("scores")
  total = coreset.aggregate(raw, names, s.aggregate, bench.parts["train"].ids)
  return Scored(total, loss, result, clock.seconds, itself)


_NORMALIZE = {
  "none": lambda found: found.scores,
  "cosine": variants.cosine,
  "relatif": variants.relatif,
  "theta_relatif": variants.theta_relatif,
}


def measure(bench: Workbench, s: Settings, chosen: Chosen, result: ihvp.SolveResult) -> variants.Measures:
  """Scores with each example's norms and influence on itself."""
  train = bench.batcher("train", chosen.tree, chosen.params)
  inverse = variants.IDENTITY
  if s.solver == "ekfac":  # the fit that `solve` has kept
    fitted = influence.fit_ekfac(chosen.problem, solver_settings(s), curvature_data(bench, s, chosen))
    inverse = variants.inverse_map("ekfac", fitted, result.info["damping"])
  stream = bench.stream(train, "scores and norms")
  return variants.measure(chosen.problem, stream, len(train), result.solution, inverse)


def check_settings(bench: Workbench, s: Settings, chosen: Chosen) -> None:
  """Refuses what cannot be done before there is a run folder, which the corrected command could not use.

  Raises:
    UserError: flags that contradict each other.
  """
  solver_settings(s)
  if s.score_path == "projected" and s.sketch_size < projected.MIN_SIZE:
    raise UserError(f"--score_path=projected needs --sketch_size of {projected.MIN_SIZE} or more, not {s.sketch_size}")
  other_ways = [name for name in ("self_influence", "per_query", "per_layer", "per_token") if getattr(s, name)]
  other_ways += ["normalize"] if s.normalize != "none" else []
  if (s.score_path == "projected" or s.trajectory != "none") and other_ways:
    way = "--score_path=projected" if s.trajectory == "none" else f"--trajectory={s.trajectory}"
    raise UserError(f"--{other_ways[0]} does not go with {way}: leave one of them out")
  if s.trajectory != "none" and (s.solver != "identity" or s.score_path == "projected"):
    raise UserError(
      f"--trajectory={s.trajectory} has no inverse and no store: give --solver=identity --score_path=auto"
    )
  if s.trajectory != "none" and not s.checkpoint:
    raise UserError(f"--trajectory={s.trajectory} adds up over a training: give its --checkpoint")
  if s.trajectory == "less":
    trained_subtree(bench, s)
  if s.score_path == "projected":
    missing = set(subtree.make_subtree(chosen.params, s.layers, "matrices").paths) - set(chosen.tree.paths)
    if missing:
      lacks = min(missing)
      raise UserError(f"--score_path=projected covers all kernels of a layer, --modules={s.modules} lacks {lacks}")
  size = subtree.count(chosen.problem.sub)
  if s.solver == "low_rank" and s.depth > size:
    raise UserError(f"--solver=low_rank: --depth={s.depth} vectors of a subtree of {size} parameters: lower --depth")
  if s.solver == "exact" and size > ihvp.EXACT_LIMIT:
    raise UserError(
      f"--solver=exact: the subtree has {size:,} parameters, more than {ihvp.EXACT_LIMIT:,}: choose fewer layers or "
      "modules, or --solver=cg"
    )
  if s.self_influence or s.normalize in ("relatif", "theta_relatif"):
    wanted = "--self_influence" if s.self_influence else f"--normalize={s.normalize}"
    if s.solver not in ("ekfac", "identity"):
      raise UserError(
        f"{wanted} with --solver={s.solver}: an inverse product for every training example is affordable with "
        "--solver=ekfac or --solver=identity only"
      )
  if (s.per_layer or s.per_token) and s.aggregate != "mean":
    raise UserError(f"--per_layer and --per_token take apart the score of one query, not of --aggregate={s.aggregate}")


def sketch_inputs(bench: Workbench, s: Settings, params) -> dict:
  """Projected gradients as `coreset.PolicyInputs` takes them: of the N training examples, of the queries, their topics.

  Evaluation examples without a response have no gradient and are left out.
  """
  projection = Projection(bench, s, params, s.seed)
  evals = bench.parts["eval"]
  keep = np.flatnonzero(evals.num_response_tokens)
  features, target = projection.store().features(), projection.features("eval")[keep]
  return {"features": features, "target": target, "query_topics": [evals.topics[row] for row in keep]}


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
  check_settings(bench, s, chosen)
  train = bench.parts["train"]
  budget.limit(train.num_tokens[train.num_response_tokens > 0])  # what cannot be met is told before the work
  identity = bench.identity("select", s, ("data", "model", "select", "run"), ("train", "eval"))
  identity["flags"].pop("checkpoint")
  identity["checkpoint"] = artifacts.hash_of(_checkpoint_identity(s.checkpoint))
  if s.trajectory != "none":
    identity["trajectory"] = {str(step): weight for step, weight in trajectory_weights(s.checkpoint).items()}
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
  if s.per_layer or s.per_token:
    _write_parts(run_dir, bench, s, chosen, scored.result)
    clock.lap("per layer and token")
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


def _write_parts(run_dir, bench: Workbench, s: Settings, chosen: Chosen, result: ihvp.SolveResult) -> None:
  """layer_scores.parquet and token_scores.parquet, which add up to the scores."""
  direction = jax.tree.map(lambda leaf: leaf[0], result.solution)
  train = bench.parts["train"]
  if s.per_layer:
    stream = bench.stream(bench.batcher("train", chosen.tree, chosen.params), "scores by layer")
    by_layer = breakdown.layer_scores(chosen.problem, chosen.tree, stream, len(train), direction, s.microbatch)
    run_dir.write_parquet("layer_scores.parquet", breakdown.layer_columns(train.ids, by_layer))
  if s.per_token:
    stream = bench.stream(bench.packer("train", chosen.tree, chosen.params), "scores by token")
    losses = model.token_losses_fn(bench.config, chosen.tree)
    by_token = breakdown.token_scores(chosen.problem, losses, stream, len(train), direction)
    columns = breakdown.token_columns(train, by_token, lambda token: bench.tokenizer.decode([token]))
    run_dir.write_parquet("token_scores.parquet", columns)


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


def ranks(values: np.ndarray, ids: np.ndarray) -> np.ndarray:
  """1 for the highest influence; ties by `example_id`, as in the selection."""
  order = np.lexsort((ids, -np.asarray(values, np.float64)))
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
    "rank": ranks(scored.influence, np.array(train.ids, dtype=np.str_)),
    "selected": selected,
    "loss": np.asarray(scored.loss, np.float32),
    "num_tokens": train.num_tokens,
    "num_response_tokens": train.num_response_tokens,
    "topic": np.array(train.topics, dtype=object),
  }
  if scored.self_influence is not None:
    columns["self_influence"] = np.asarray(scored.self_influence, np.float32)
  run_dir.write_text("coreset.jsonl", records.raw_lines(train.records, np.sort(rows)))
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
  if s.trajectory == "less":
    return "learning rate: a sum of cosines, each times the mean learning rate before its checkpoint"
  if s.trajectory == "tracin":
    return "loss, summed over the checkpoints: what steps along the example's gradient take off the evaluation loss"
  if s.normalize == "cosine":
    return "none: the cosine of the example's gradient and the direction that the solver made of the query's"
  if s.normalize != "none":
    return f"that of the influence, divided by the example's own length under the inverse (--normalize={s.normalize})"
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
