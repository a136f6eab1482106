"""`solvers --dense`: every solver against the dense inverse of each curvature, on a small transformer in float64.

./run.sh solvers --dense=400 --run_dir=runs/solvers-dense
"""

import dataclasses
import logging
import time
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.solvers.settings import SolversSettings
from in2core_jax.data import packing
from in2core_jax.data.batches import Batcher, Shape
from in2core_jax.errors import UserError
from in2core_jax.ihvp import solvers, tree_math
from in2core_jax.influence.kernels import CompiledObjective
from in2core_jax.influence.solve import CurvatureData, SolverSettings, even_draw, solve
from in2core_jax.model import decoder
from in2core_jax.model.objective import make_objective, sample_labels_fn
from in2core_jax.params import subtree
from in2core_jax.pipeline.settings import refuse
from in2core_jax.report import table_text
from in2core_jax.runs import run_folder
from in2core_jax.runs.result_cache import ResultCache

log = logging.getLogger(__name__)

CONFIG = decoder.ModelConfig(
  vocab_size=29, hidden_size=8, intermediate_size=12, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=4
)
EXAMPLES, LENGTH, PROMPT, STEPS = 96, 12, 5, 300
RATIOS = (1e-1, 1e-2, 1e-3)
CURVATURES = ("ggn", "fisher", "hessian")
# Row of the table -> what it changes of `SolverSettings`. LiSSA's minibatches hold a quarter of the examples.
SOLVERS = {
  "lissa": {"solver": "lissa"},
  "lissa, last iterate": {"solver": "lissa", "average": 0.0},
  "lissa, momentum": {"solver": "lissa", "acceleration": "momentum"},
  "lissa, chebyshev": {"solver": "lissa", "acceleration": "chebyshev"},
  "cg": {"solver": "cg", "tol": 1e-10},
  "cg, ekfac": {"solver": "cg", "tol": 1e-10, "precondition": "ekfac"},
  "low_rank, 64": {"solver": "low_rank", "depth": 64},
  "ekfac": {"solver": "ekfac"},
  "datainf": {"solver": "datainf"},
  "identity": {"solver": "identity"},
  "exact": {"solver": "exact"},
}


@dataclasses.dataclass(frozen=True)
class Case:
  """A small fine-tuned decoder with a rule to learn, its query and its curvature data."""

  problem: CompiledObjective
  v: dict
  data: CurvatureData
  full: CurvatureData  # LiSSA's minibatches hold all examples: no noise


def make_case(seed: int) -> Case:
  """Prompts of random tokens, answers that repeat them; trained until the rule is half learnt."""
  rng = np.random.default_rng(seed)
  prompts = rng.integers(0, CONFIG.vocab_size, (EXAMPLES + 16, PROMPT))
  tokens = [np.resize(prompt, LENGTH).astype(np.int32) for prompt in prompts]
  mask = np.arange(LENGTH) >= PROMPT
  part = lambda rows: types.SimpleNamespace(  # noqa: E731
    ids=[str(row) for row in rows], tokens=[tokens[row] for row in rows], response_mask=[mask] * len(rows)
  )
  params = decoder.init_params(CONFIG, jax.random.key(seed), jnp.float64)
  params = jax.tree.map(lambda leaf: 8 * leaf if leaf.ndim > 2 else leaf, params)
  tree = subtree.make_subtree(params, "last:2", "all")
  relabel = sample_labels_fn(CONFIG, tree)
  problem = CompiledObjective(make_objective(CONFIG, tree), *subtree.split(params, tree), 16, relabel)
  shape = Shape(LENGTH, LENGTH - PROMPT)
  train, evals = (Batcher(part(rows), [shape]) for rows in (range(EXAMPLES), range(EXAMPLES, EXAMPLES + 16)))
  stream = lambda: train.sequential(LENGTH * EXAMPLES)  # noqa: E731
  for _ in range(STEPS):
    step = problem.mean_gradient(stream)
    problem = problem.at(jax.tree.map(lambda leaf, d: leaf - 0.2 * d[0], problem.sub, step))
  v = problem.mean_gradient(lambda: evals.sequential(LENGTH * 16))
  pool = packing.Packer(part(range(EXAMPLES)))
  draw = even_draw(np.arange(EXAMPLES), EXAMPLES // 4, lambda rows: pool.sample(rows)[1])
  whole = lambda key: next(stream())[1]  # noqa: E731
  return Case(problem, v, CurvatureData(stream, stream, draw), CurvatureData(stream, stream, whole))


def measure(case: Case, curvature: str, ratio: float, name: str, dense: np.ndarray, s: SolversSettings) -> dict:
  """One row: error and residual against the dense inverse, steps, seconds of a second solve (nothing compiles)."""
  # The same absolute damping for all, also for DataInf, whose ratio has another rule.
  damping = ratio * float(np.linalg.eigvalsh(dense)[-1])
  changes = {"depth": s.dense, "tol": 1e-8, "curvature": curvature, "seed": s.seed}
  changes |= {"damping": damping, "damping_ratio": None} | SOLVERS[name]
  row = {"curvature": curvature, "damping ratio": ratio, "solver": name}
  try:
    settings = SolverSettings(**changes)
    solve(case.problem, case.v, settings, case.data)
    began = time.perf_counter()
    result = solve(case.problem, case.v, settings, case.data)
    seconds = time.perf_counter() - began
  except UserError as error:
    return row | {"refused": reason(error)}
  b, x = (tree_math.ravel(tree)[0] for tree in (case.v, result.solution))
  best = np.linalg.solve(dense + damping * np.eye(len(b)), b)
  return row | {
    "error": float(np.linalg.norm(x - best) / np.linalg.norm(best)),
    "cosine": float(x @ best / np.linalg.norm(x) / np.linalg.norm(best)),
    "residual": float(np.linalg.norm(dense @ x + damping * x - b) / np.linalg.norm(b)),
    "reported residual": float(result.residual[0]),
    "steps": result.steps,
    "seconds": round(seconds, 3),
  }


def reason(error: UserError) -> str:
  """Why a row has no error, in a few words for its cell.

  What neither diverges nor meets negative curvature is EK-FAC, whose factors cannot be those of an indefinite Hessian.
  """
  if isinstance(error, solvers.DivergenceError):
    return "diverged" if error.step is None else f"diverged at step {error.step}"
  return "met negative curvature" if isinstance(error, solvers.NegativeCurvatureError) else "not for this curvature"


def start(s: SolversSettings) -> str:
  """`run` in a process that computes in float64 from here on."""
  jax.config.update("jax_enable_x64", True)
  return run(s)


def run(s: SolversSettings) -> str:
  """Measures all rows and writes oracle.md, oracle.json; returns the run folder.

  Raises:
    UserError: flags that ask for another model or other data.
  """
  refuse(s, ("model", "train_data"), "--dense compares on a small model and data of its own")
  # The stage has the name that the command had, so that older folders go on.
  identity = {"stage": "oracle", "depth": s.dense, "seed": s.seed, "versions": run_folder.package_versions()}
  run_dir = run_folder.RunDir.open(s.run_dir, identity, overwrite=s.overwrite)
  case = make_case(s.seed)
  rows, spectra, cells = [], {}, ResultCache(run_dir)
  for curvature in CURVATURES:
    kernel = case.problem.curvature(curvature)
    dense = solvers.dense_matrix(solvers.fixed_matvec(kernel, lambda: (b for _, b in case.data.fixed())), case.v)
    dense = (dense + dense.T) / 2
    spectra[curvature] = np.linalg.eigvalsh(dense)[[0, -1]].tolist()
    for ratio in RATIOS:
      for name in SOLVERS:
        make = partial(measure, case, curvature, ratio, name, dense, s)
        rows.append(cells.get(make, curvature, ratio, name))
      noiseless = dataclasses.replace(case, data=case.full)
      make = partial(measure, noiseless, curvature, ratio, "lissa", dense, s)
      name = "lissa, all examples a step"
      rows.append(cells.get(make, curvature, ratio, name) | {"solver": name})
  write(run_dir, subtree.count(case.problem.sub), spectra, rows)
  return str(run_dir.path)


def write(run_dir: run_folder.RunDir, size: int, spectra: dict, rows: list[dict]) -> None:
  """oracle.md and, last, oracle.json."""
  number = lambda value: f"{value:.2g}" if isinstance(value, float) else value  # noqa: E731
  table = [
    {
      column: number(row.get(column, row.get("refused", "") if column == "error" else ""))
      for column in ("curvature", "damping ratio", "solver", "error", "cosine", "residual", "steps", "seconds")
    }
    for row in rows
  ]
  lines = [f"- {name}: eigenvalues {low:.3g} to {high:.3g}" for name, (low, high) in spectra.items()]
  text = "\n".join([f"{size:,} parameters, {EXAMPLES} examples", "", *lines, "", table_text.markdown_table(table), ""])
  run_dir.write_text("oracle.md", text)
  run_dir.write_json("oracle.json", {"parameters": size, "spectra": spectra, "rows": rows})
  log.info("%s", run_dir.path / "oracle.md")
