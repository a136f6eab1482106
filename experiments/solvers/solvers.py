"""Compares the solvers on one model: residual against work, agreement of scores, and who finds mislabelled examples.

./run.sh solvers --flagfile=experiments/flags/solvers.flags
./run.sh solvers --dense=400 --run_dir=runs/solvers-dense     against dense inverses, on a small model

Writes solvers.md and pictures into --run_dir, with --dense oracle.md.
"""

import dataclasses
import functools
import logging
import time

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments import flags
from experiments.solvers import dense
from experiments.solvers.settings import SolversSettings
from in2core_jax.data import packing, tokenizing
from in2core_jax.data.record_shapes import is_learnt
from in2core_jax.errors import UserError, how_many
from in2core_jax.evaluation import statistics
from in2core_jax.ihvp import ekfac, solvers, tree_math
from in2core_jax.influence import normalize
from in2core_jax.influence.solve import fit_ekfac, solve
from in2core_jax.params import subtree
from in2core_jax.pipeline import scoring, solver_inputs
from in2core_jax.pipeline.finetune import recipe_of, start_params, trainable_rows
from in2core_jax.pipeline.session import BoundSubtree, Session, choose, make_session, open_session
from in2core_jax.pipeline.settings import listed
from in2core_jax.pipeline.splits import tokenized
from in2core_jax.report import table_text
from in2core_jax.report.plots import write_figure
from in2core_jax.runs import run_folder
from in2core_jax.runs.result_cache import ResultCache
from in2core_jax.training import train_loop

log = logging.getLogger(__name__)

REFERENCE = "cg"
# Estimator -> what it changes of the flags. Those with a curve are iterations over products.
ITERATIVE = {
  "lissa, last iterate": {"solver": "lissa", "average": 0.0},
  "lissa": {"solver": "lissa"},
  "lissa, momentum": {"solver": "lissa", "acceleration": "momentum"},
  "cg": {"solver": "cg"},
  "cg, ekfac": {"solver": "cg", "precondition": "ekfac"},
}
# Without a curve: LiSSA's own noise, and the closed forms.
DIRECT = {"lissa, other seed": {"solver": "lissa"}, "ekfac": {"solver": "ekfac"}, "low_rank": {"solver": "low_rank"}}
# Not of the damping that is compared: none, or a rule of its own.
FREE = {"datainf": {"solver": "datainf"}, "identity": {"solver": "identity"}}


class Comparison:
  """What all estimators share, made once: gradients of the queries, curvature, largest eigenvalue, fits."""

  def __init__(self, session: Session, s: SolversSettings, chosen: BoundSubtree | None = None):
    self.session, self.settings = session, s.replace(aggregate="mean")
    self.chosen = chosen or choose(session, session.checkpoint_params(s.checkpoint), s.layers, s.modules)
    self.problem = self.chosen.problem
    self.data = solver_inputs.curvature_data(session, s.replace(solver="ekfac"), self.chosen)
    self.curvature = self.problem.curvature(s.curvature)
    self.matvec = solvers.fixed_matvec(self.curvature, lambda: (batch for _, batch in self.data.fixed()))
    self.key = jax.random.key(s.seed)

  @functools.cached_property
  def v(self):
    """The aggregated query, leaves [1, ...]."""
    return scoring.queries(self.session, self.settings, self.chosen)[0]

  @functools.cached_property
  def lambda_max(self) -> float:
    """H's largest eigenvalue on the fixed set, as `solve.solve` estimates it."""
    power = solvers.power_iteration(self.matvec, self.v, jax.random.fold_in(self.key, 7), steps=10, tol=2e-2)
    return power.lambda_max

  @functools.cached_property
  def factors(self) -> ekfac.Ekfac:
    """EK-FAC, fitted or read."""
    return fit_ekfac(self.problem, solver_inputs.solver_settings(self.settings), self.data)

  @functools.cached_property
  def krylov(self) -> solvers.LowRank:
    """Eigenpairs on one Krylov space, for every damping."""
    options = solvers.LowRankSettings(self.settings.krylov)
    return solvers.fit_low_rank(self.matvec, self.v, jax.random.fold_in(self.key, 11), options)

  def examples(self, stream) -> int:
    """Examples that the batches of a stream count."""
    return int(sum(float(self.curvature.num_examples(batch)) for _, batch in stream()))

  def solve(self, name: str, damping: float, on_state=None) -> solvers.SolveResult:
    """(H + damping I)^-1 v by an estimator's name; as `solve.solve`, with the shared parts not made again."""
    s = self.settings
    changes = (ITERATIVE | DIRECT | FREE)[name]
    if changes["solver"] == "identity":
      return solvers.identity(self.v, self.matvec, damping)
    if changes["solver"] == "datainf":
      return solve(self.problem, self.v, solver_inputs.solver_settings(s.replace(**changes)), self.data)
    if changes["solver"] == "ekfac":
      return ekfac.ekfac(self.v, self.factors, damping, matvec=self.matvec)
    if changes["solver"] == "low_rank":
      return solvers.low_rank(self.v, self.krylov, damping, self.matvec)
    if changes["solver"] == "cg":
      fitted = ekfac.preconditioner(self.factors, damping) if "precondition" in changes else None
      options = solvers.CgSettings(damping=damping, tol=s.solver_tol, max_steps=s.cg_steps)
      return solvers.cg(self.matvec, self.v, options, precondition=fitted)
    options = solvers.LissaSettings(
      damping=damping,
      depth=s.depth,
      check_every=s.curve_every,
      tol=0.0,
      acceleration=changes.get("acceleration", "none"),
      average=changes.get("average", s.average),
      lambda_max=self.lambda_max,
      scale_probes=1,
    )
    key = jax.random.fold_in(self.key, 17) if name == "lissa, other seed" else self.key
    sampled = solvers.StochasticCurvature(self.curvature, self.data.draw, self.matvec)
    return solvers.lissa(sampled, self.v, key, options, on_state)

  def scores(self, solutions) -> np.ndarray:
    """Scores of the training examples along several solutions at once, float32 [Q, N]."""
    train = self.session.batcher("train", self.chosen.tree, self.chosen.params)
    directions = tree_math.concatenate(solutions)
    stream = self.session.stream(train, f"scores of {how_many(len(solutions), 'estimator')}")
    return self.problem.scores(stream, len(train), directions, "vmap")


def solved(shared: Comparison, cells: ResultCache, name: str, ratio: float | None, with_solution: bool = False) -> dict:
  """The cell of an estimator at a damping ratio: curve, residual, steps, products; its solution beside it.

  The solution is removed when its scores are stored; `with_solution` solves again where it is gone.
  """

  def make() -> dict:
    damping = (shared.settings.damping_ratio if ratio is None else ratio) * shared.lambda_max
    states: list = []
    began = time.perf_counter()
    _ = shared.factors if "ekfac" in name else shared.krylov if name == "low_rank" else None
    fit_seconds, began = round(time.perf_counter() - began, 2), time.perf_counter()
    try:
      result = shared.solve(name, damping, states.append)
    except solvers.DivergenceError as error:
      curve = list(states[-1].curve) if states else []
      return {"diverged": str(error), "curve": _plain(curve), "solver_seconds": time.perf_counter() - began}
    cells.write_array(tree_math.ravel(result.solution).astype(np.float32), name, ratio)
    return {
      "diverged": None,
      "curve": _plain(result.curve),
      "residual": float(np.max(result.residual)),
      "steps": result.steps,
      "damping": result.info.get("damping", damping),
      "info": {k: v for k, v in result.info.items() if isinstance(v, str | int | float | bool)},
      "fit_seconds": fit_seconds,  # 0 where an earlier cell has fitted already
      "solver_seconds": round(time.perf_counter() - began, 2),
    }

  return cells.get(make, name, ratio, with_array=with_solution)


def _plain(curve) -> list:
  return [[int(step), float(np.max(residual))] for step, residual in curve]


def agreement(shared: Comparison, cells: ResultCache, ratio: float) -> dict:
  """Scores of every estimator that did not diverge at one damping, and Spearman's correlation of all pairs."""

  def make() -> dict:
    names, solutions = [], []
    for name in (*ITERATIVE, *DIRECT, *FREE):
      own = None if name in FREE else ratio
      if solved(shared, cells, name, own)["diverged"]:
        continue
      solved(shared, cells, name, own, with_solution=True)
      names.append(name)
      solutions.append(tree_math.unravel(cells.read_array(name, own), shared.v))
    return {"scores": dict(zip(names, shared.scores(solutions).tolist(), strict=True))}

  return cells.get(make, "scores", ratio)


def spearman_interval(a: np.ndarray, b: np.ndarray, seed: int = 0, draws: int = 1000) -> statistics.Interval:
  """Spearman's correlation with its percentile bootstrap over examples: what other examples would have given."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  rng = np.random.default_rng(seed)
  drawn = [statistics.spearman(a[rows], b[rows]) for rows in rng.integers(0, len(a), (draws, len(a)))]
  low, high = np.nanquantile(drawn, [0.025, 0.975])
  return statistics.Interval(statistics.spearman(a, b), float(low), float(high), len(a))


def half_precision(shared: Comparison, cells: ResultCache, ratio: float, scores: dict) -> dict:
  """Spearman of the scores with bfloat16 weights against those with float32 weights, same examples and minibatches."""

  def make() -> dict:
    session = open_session(shared.session.settings.replace(dtype="bfloat16"), shared.session.batching.mesh)
    narrow = Comparison(session, shared.settings)
    solutions = [narrow.solve(name, ratio * narrow.lambda_max).solution for name in ("identity", "lissa")]
    found = dict(zip(("identity", "lissa"), narrow.scores(solutions), strict=True))
    rank = {name: dataclasses.asdict(spearman_interval(found[name], scores[name])) for name in found}
    return {"spearman": rank, "lambda_max": narrow.lambda_max}

  return cells.get(make, "bfloat16", ratio)


# ---- mislabelled examples ------------------------------------------------------------


def deal_answers(
  records: list[tokenizing.Record], rows: np.ndarray, seed: int
) -> tuple[list[tokenizing.Record], np.ndarray]:
  """Gives the last answer of each of the rows to another of them -> (records, bool [N] whose answer is another now)."""
  order = np.random.default_rng((seed, 23)).permutation(rows)
  last = lambda record: max(i for i, m in enumerate(record.messages) if is_learnt(m))  # noqa: E731
  dealt, wrong = list(records), np.zeros(len(records), bool)
  for to, source in zip(order, np.roll(order, 1), strict=True):
    answer = records[source].messages[last(records[source])]
    messages, place = list(records[to].messages), last(records[to])
    wrong[to] = messages[place] != answer
    messages[place] = answer
    dealt[to] = dataclasses.replace(records[to], messages=type(records[to].messages)(messages))
  return dealt, wrong


def with_wrong_answers(session: Session, s: SolversSettings) -> tuple[Session, np.ndarray]:
  """(the same with the answers of a share of the training examples dealt out among them, bool [N] which are wrong)."""
  train, model = session.splits["train"], session.model
  usable = np.flatnonzero(train.num_response_tokens)
  count = max(2, round(s.mislabelled * len(usable)))
  rows = np.random.default_rng((s.seed, 19)).choice(usable, count, replace=False)
  records, wrong = deal_answers(list(train.records), rows, s.seed)
  dealt = tokenized(s, model.config, model.tokenizer, "train", records)
  return make_session(s, session.splits.with_parts(train=dealt), model), wrong


def mislabelled(session: Session, s: SolversSettings, cells: ResultCache) -> dict:
  """ROC AUC with which signals find the mislabelled examples, after fine-tuning on the data that hold them."""

  def make() -> dict:
    own = s.replace(layers=s.mislabelled_layers, trainable_layers=s.mislabelled_layers, modules="all", trainable="full")
    wrong_session, wrong = with_wrong_answers(session, own)
    params, tree = start_params(wrong_session, own)
    rows = trainable_rows(wrong_session)
    problem, (sub, frozen) = wrong_session.kernels(tree), subtree.split(params, tree)
    trainer = train_loop.Trainer(problem.objective, recipe_of(own, len(rows)), wrong_session.batching.place)
    shape = packing.training_shape([wrong_session.packer("train", rows=rows)], own.batch_size, [own.seed])
    trained = trainer.train(sub, frozen, wrong_session.packer("train", tree, params, rows, [shape]), own.seed)
    shared = Comparison(wrong_session, own, BoundSubtree(tree, params, problem.at(trained.sub, frozen)))
    damping = s.damping_ratio * shared.lambda_max
    names = ["identity", "ekfac", "lissa"]
    directions = tree_math.concatenate(shared.solve(name, damping).solution for name in names)
    train = wrong_session.batcher("train", tree, params)
    inverse = normalize.inverse_map("ekfac", shared.factors, damping)
    stream = wrong_session.stream(train, "self-influence")
    found = normalize.measure(shared.problem, stream, len(train), directions, inverse)
    signals = {"loss": found.losses, "self-influence, identity": found.norms**2}
    signals["self-influence, ekfac"] = found.self_influence
    signals |= {f"opponents, {name}": -found.scores[row] for row, name in enumerate(names)}
    return {
      "auc": {
        name: dataclasses.asdict(statistics.roc_auc(signal[rows], wrong[rows])) for name, signal in signals.items()
      },
      "examples": len(rows),
      "wrong": int(wrong[rows].sum()),
      "steps": trainer.recipe.steps,
      "loss": {"wrong": float(found.losses[wrong].mean()), "others": float(found.losses[rows][~wrong[rows]].mean())},
    }

  return cells.get(make, "mislabelled")


# ---- report --------------------------------------------------------------------------


def residual_figure(curves: dict[float, dict[str, dict]], per_step: dict[str, int]) -> Figure:
  """Residual against steps (above) and against example products evaluated (below), one column for each damping."""
  figure = Figure(figsize=(3.4 * len(curves) + 0.6, 6.0), layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots(2, len(curves), sharey=True, squeeze=False)
  for column, (ratio, cells) in enumerate(curves.items()):
    for number, (name, cell) in enumerate(cells.items()):
      points = [(step, value) for step, value in cell["curve"] if value > 0]
      if not points:
        continue
      steps, values = np.array(points, float).T
      label = f"{name} (diverged)" if cell["diverged"] else name
      for row, unit in enumerate((1, per_step[name])):
        plot = axes[row, column]
        plot.plot(
          steps * unit, values, f"C{number}", marker="ovs^Dx"[number % 6], markersize=4, linewidth=1, label=label
        )
        if cell["diverged"]:
          plot.plot(steps[-1:] * unit, values[-1:], f"C{number}", marker="X", markersize=10)
    axes[0, column].set(title=f"damping ratio {ratio:g}", xlabel="steps")
    axes[1, column].set(xlabel="products of one example")
    axes[0, column].legend(frameon=False, fontsize=7)
  for plot in axes.flat:
    plot.set_yscale("log")
    plot.grid(alpha=0.3)
  for plot in axes[:, 0]:
    plot.set_ylabel("relative residual on the fixed set")
  return figure


def residual_rows(curves: dict[float, dict[str, dict]], per_step: dict[str, int]) -> list[dict]:
  """One row an estimator and damping."""
  return [
    {
      "damping ratio": ratio or "its own",
      "solver": name,
      "steps": cell.get("steps", cell["curve"][-1][0] if cell["curve"] else 0),
      "products of one example": per_step[name] * cell.get("steps", 0) if name in per_step else None,
      "residual": "diverged" if cell["diverged"] else cell["residual"],
      "seconds": cell["solver_seconds"],
      "seconds to fit": cell.get("fit_seconds") or None,
    }
    for ratio, cells in curves.items()
    for name, cell in cells.items()
  ]


def agreement_tables(scores: dict[str, list], ratio: float) -> tuple[str, list[dict]]:
  """(Markdown of the matrix and of the agreement with the reference, its rows)."""
  names = list(scores)
  matrix = [
    {"": name} | {other: round(statistics.spearman(scores[name], scores[other]), 3) for other in names}
    for name in names
  ]
  against = [
    {"estimator": name, f"Spearman with {REFERENCE}": str(spearman_interval(scores[name], scores[REFERENCE]))}
    for name in names
    if name != REFERENCE and REFERENCE in names
  ]
  text = f"### Damping ratio {ratio:g}\n\n{table_text.markdown_table(matrix)}\n\n{table_text.markdown_table(against)}\n"
  return text, matrix + against


def ratios(text: str, name: str) -> list[float]:
  """Reads a comma-separated list of positive numbers."""
  try:
    found = [float(part) for part in listed(text)]
  except ValueError:
    found = []
  if not found or not all(0 < value < np.inf for value in found) or len(set(found)) < len(found):
    raise UserError(f"--{name}={text} is not a list of different numbers above 0, such as 0.1,0.01")
  return found


def run(settings: SolversSettings, session: Session | None = None) -> str:
  """Compares, writes solvers.md, solvers.json, residuals.csv and plots; returns the run folder. Goes on if stopped."""
  s = settings
  compared, scored = ratios(s.compare_ratios, "compare_ratios"), ratios(s.agreement_ratios, "agreement_ratios")
  if not set(scored) <= set(compared):
    raise UserError(f"--agreement_ratios={s.agreement_ratios} must be among --compare_ratios={s.compare_ratios}")
  run_folder.RunDir.refuse_held(s.run_dir)  # before the work that comes before the folder is opened
  session = session or open_session(s)
  if s.mislabelled:  # which comes last
    subtree.make_subtree(session.model.params, s.mislabelled_layers, named=("--mislabelled_layers", "--modules"))
  identity = session.own_identity(
    "solvers", s, ("data", "model", "finetune", "select", "solvers", "run"), ("train", "eval")
  )
  for name in ("compare_ratios", "agreement_ratios", "compare_bfloat16"):  # they say which cells are shown
    identity["flags"].pop(name)
  run_dir = run_folder.RunDir.open(s.run_dir, identity, s.overwrite)
  session.splits.write_skipped(run_dir)
  run_dir.write_flags("flags.txt", s.as_flags(), ["python -m experiments.solvers --flagfile=THIS"])
  cells, shared = ResultCache(run_dir), Comparison(session, s)
  curves: dict = {}
  free = {name: solved(shared, cells, name, None) for name in FREE}
  scores: dict = {}
  for ratio in compared:
    names = [*ITERATIVE, *(DIRECT if ratio in scored else ())]
    curves[ratio] = {name: solved(shared, cells, name, ratio) for name in names}
    if ratio in scored:
      scores[ratio] = agreement(shared, cells, ratio)["scores"]
      for name in names:  # they are large, and their scores are stored
        cells.remove_array(name, ratio)
  narrow = half_precision(shared, cells, scored[0], scores[scored[0]]) if s.compare_bfloat16 else None
  found = mislabelled(session, s, cells) if s.mislabelled else None
  write(run_dir, shared, curves | {None: free}, scores, narrow, found)
  return str(run_dir.path)


def write(run_dir, shared: Comparison, curves: dict, scores: dict, narrow: dict | None, found: dict | None) -> None:
  """Tables and plots; solvers.json last."""
  s = shared.settings
  fixed, drawn = shared.examples(shared.data.fixed), solver_inputs.curvature_rows(shared.session, s).batch
  per_step = {name: fixed if name.startswith("cg") else drawn for name in ITERATIVE}
  iterative = {ratio: {name: cells[name] for name in ITERATIVE} for ratio, cells in curves.items() if ratio}
  write_figure(run_dir, "residuals", residual_figure(iterative, per_step))
  rows = residual_rows(curves, per_step)
  points = [
    {"damping_ratio": ratio, "solver": name, "step": step, "products": step * per_step[name], "residual": value}
    for ratio, cells in iterative.items()
    for name, cell in cells.items()
    for step, value in cell["curve"]
  ]
  run_dir.write_text("residuals.csv", table_text.csv_table(points))
  tables = {ratio: agreement_tables(each, ratio) for ratio, each in scores.items()}
  text = page(rows, curves, [table for table, _ in tables.values()], narrow, found)
  run_dir.write_text("solvers.md", text)
  run_dir.write_json(
    "solvers.json",
    {
      "lambda_max": shared.lambda_max,
      "fixed_examples": fixed,
      "minibatch_examples": drawn,
      "parameters": subtree.count(shared.problem.sub),
      "residuals": rows,
      "agreement": {f"{ratio:g}": table for ratio, (_, table) in tables.items()},
      "bfloat16": narrow,
      "mislabelled": found,
      "devices": run_folder.device_summary(),
    },
  )
  log.info("\n%s", text)


def page(rows: list[dict], curves: dict, agreements: list[str], narrow: dict | None, found: dict | None) -> str:
  """The text of solvers.md."""
  text = [f"# Solvers\n\n## Residuals\n\n![Residuals](plots/residuals.svg)\n\n{table_text.markdown_table(rows)}\n"]
  text += [
    f"- {name} at {ratio or 'its own'}: {cell['diverged']}\n"
    for ratio, cells in curves.items()
    for name, cell in cells.items()
    if cell["diverged"]
  ]
  text += ["## Agreement of the scores (Spearman)\n", *agreements]
  show = lambda interval: str(statistics.Interval(**{k: np.nan if v is None else v for k, v in interval.items()}))  # noqa: E731
  if narrow:
    lines = [{"estimator": name, "Spearman with float32": show(value)} for name, value in narrow["spearman"].items()]
    text.append(f"## bfloat16 weights\n\n{table_text.markdown_table(lines)}\n")
  if found:
    lines = [{"signal": name, "ROC AUC": show(value)} for name, value in found["auc"].items()]
    wrong = how_many(found["wrong"], f"of {found['examples']} examples [has|have] another's answer")
    what = f"{wrong}; {how_many(found['steps'], 'step')} of training."
    text.append(f"## Mislabelled examples\n\n{what}\n\n{table_text.markdown_table(lines)}\n")
  return "\n".join(text)


def main(_) -> None:
  """Entry point."""
  settings = flags.read(SolversSettings)
  (dense.start if settings.dense else run)(settings)
