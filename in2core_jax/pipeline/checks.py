"""What stages could not do, `select` and what scores or chooses as it does above all: told before any work."""

from collections.abc import Iterable

from in2core_jax.data import tokenizing
from in2core_jax.errors import UserError
from in2core_jax.evaluation import statistics
from in2core_jax.ihvp import solvers
from in2core_jax.influence import projected
from in2core_jax.params import subtree
from in2core_jax.pipeline import shapes, target_weights
from in2core_jax.pipeline.phases import WHITENED, score_aggregate
from in2core_jax.pipeline.policy_inputs import OF_PAIRS, check_pairs
from in2core_jax.pipeline.session import Session
from in2core_jax.pipeline.settings import SelectSettings, Settings, seeds_of, words
from in2core_jax.pipeline.solver_inputs import solver_settings
from in2core_jax.runs import adapter_folder
from in2core_jax.selection import aggregation, coreset
from in2core_jax.selection.inputs import Budget
from in2core_jax.training import train_loop


def budget_of(s: SelectSettings) -> Budget:
  """The budget that the flags ask for."""
  return Budget.read(s.budget)


def policies_of(s: Settings) -> list[str]:
  """The words of --policies, told where one is unknown."""
  return words(s.policies, "policies", (statistics.FULL, *coreset.POLICIES), gone=coreset.GONE)


def check_budget(s: SelectSettings, train: tokenizing.TokenizedDataset) -> Budget:
  """The budget that the flags ask for; refuses one that the training examples with a response cannot meet."""
  budget = Budget.read(s.budget)
  budget.limit(train.num_tokens[train.num_response_tokens > 0])
  return budget


def check_policies(session: Session, policies: set[str]) -> None:
  """Refuses policies that the training set is too large for, or that cannot do with preference pairs."""
  views = sorted(policies & set(coreset.HIDDEN_POLICIES))
  pairs = [part for part in ("train", "eval") if session.splits[part].second is not None]
  if views and pairs:
    raise UserError(
      f"policy {views[0]} compares hidden states of conversations, and the {pairs[0]} set has preference pairs: take "
      "proponents, matching or whitened_cosine (--policy, or --policies of evaluate)"
    )
  if policies & set(OF_PAIRS):
    check_pairs(session)


def check_solvers(given: str, settings: Iterable[Settings]) -> None:
  """Refuses a solver of a list that does not go with the other flags, under the list's name.

  Args:
    given: the list, as --FLAG=VALUE.
    settings: the flags with each of its solvers in turn.

  Raises:
    UserError: names what was given.
  """
  try:
    for s in settings:
      solver_settings(s)
  except UserError as error:
    raise UserError(f"{given}: {error}") from error


def check_size(s: Settings, size: int, given: str, depth: str = "depth") -> None:
  """Refuses a solver that is not for a subtree of that size.

  Args:
    s: the solver and its depth.
    size: parameters of the subtree.
    given: what the user gave of it, for the message.
    depth: the flag that --depth is taken from.

  Raises:
    UserError: too many parameters for exact, too few for low_rank.
  """
  if s.solver == "low_rank" and s.depth > size:
    raise UserError(f"{given}: --{depth}={s.depth} vectors of a subtree of {size} parameters: lower --{depth}")
  if s.solver == "exact" and size > solvers.EXACT_LIMIT:
    raise UserError(
      f"{given}: the subtree has {size:,} parameters, more than {solvers.EXACT_LIMIT:,}: take another solver, such as "
      "cg, or, where they can be chosen, fewer layers or modules"
    )


def check_scores(s: Settings, params, trained: subtree.Subtree | None = None, layers: str = "--layers") -> None:
  """Refuses what `select` cannot score: first flags that contradict each other, then what the model does not have.

  Args:
    s: the flags of the scores.
    params: that are scored, arrays or shapes.
    trained: what a training changes that is still to come; None: --checkpoint tells, where there is one.
    layers: the flag that --layers is taken from, for messages.

  Raises:
    UserError: flags that contradict each other, or ask for what the model does not have.
  """
  solver_settings(s)
  _check_ways(s, s.checkpoint or trained)
  _check_solver(s)
  _check_aggregate(s)
  who = "the fine-tuning trains" if trained else f"{s.checkpoint} trained"
  _check_part(s, shapes.ScoredPart.of(s, params, trained, layers), who)


def _check_ways(s: Settings, checkpoint) -> None:
  """The way to the scores (projected, along a trajectory) and what does not go with it."""
  if s.score_path == "projected" and 0 < s.sketch_size < projected.MIN_SIZE:
    raise UserError(f"--score_path=projected needs --sketch_size of {projected.MIN_SIZE} or more, not {s.sketch_size}")
  other_ways = [name for name in ("write", "normalize") if s.is_set(name)]
  if (s.score_path == "projected" or s.trajectory != "none") and other_ways:
    way = "--score_path=projected" if s.trajectory == "none" else f"--trajectory={s.trajectory}"
    raise UserError(f"{s.as_flag(other_ways[0])} does not go with {way}: leave one of them out")
  if s.trajectory != "none" and (s.solver != "identity" or s.score_path == "projected"):
    raise UserError(
      f"--trajectory={s.trajectory} has no inverse and no store: give --solver=identity --score_path=auto"
    )
  if s.trajectory != "none" and not checkpoint:
    raise UserError(f"--trajectory={s.trajectory} adds up over a training: give its --checkpoint")
  if s.trajectory != "none" and adapter_folder.is_adapter(s.checkpoint):
    raise UserError(
      f"--trajectory={s.trajectory}: {s.checkpoint} is an adapter, the end of a training alone: give the checkpoint of "
      "a finetune run, or --trajectory=none"
    )


def _check_solver(s: Settings) -> None:
  """What needs a solver of its own."""
  if s.writes("self") or s.normalize in ("relatif", "theta_relatif"):
    wanted = "--write=self" if s.writes("self") else f"--normalize={s.normalize}"
    if s.solver not in ("ekfac", "identity"):
      raise UserError(
        f"{wanted} with --solver={s.solver}: an inverse product for every training example is affordable with "
        "--solver=ekfac or --solver=identity only"
      )
  if s.normalize == WHITENED and (s.solver != "identity" or s.writes("self")):
    given = "--write=self" if s.solver == "identity" else f"--solver={s.solver}"
    raise UserError(f"--normalize={WHITENED} with {given}: it has its own inverse; give --solver=identity")


def _check_aggregate(s: Settings) -> None:
  """How scores of single evaluation examples become one."""
  how = score_aggregate(s)
  if how == "weighted_turns":
    raise UserError(
      f"--aggregate=weighted_turns is for policies by similarity, not for --policy={s.policy}: take --policy=hybrid, "
      "or --aggregate=round_robin"
    )
  if how in aggregation.BY_QUERY and s.normalize != WHITENED:
    other = f"--normalize={s.normalize}" if s.normalize != "none" else f"--score_path={s.score_path}"
    if s.normalize != "none" or s.score_path == "projected":
      raise UserError(
        f"--aggregate={s.aggregate} takes plain scores of single evaluation examples, not {other}: leave that out, or "
        f"give --policy=hybrid or --normalize={WHITENED}"
      )
  if (s.writes("layer") or s.writes("token")) and how != "mean":
    raise UserError(
      f"--write=layer and --write=token split the score of one query, not that of --aggregate={s.aggregate}"
    )


def _check_part(s: Settings, part: shapes.ScoredPart, who: str) -> None:
  """What the chosen layers and modules must be; LESS takes Adam's moments, which are of the numbers that were trained.

  Args:
    s: the flags.
    part: what is scored.
    who: begins what is told of the training.
  """
  if part.trained is not None and train_loop.subtree_meta(part.tree) != part.trained:
    raise UserError(
      f"--trajectory=less with --layers={s.layers} --modules={s.modules}: {who} layers {part.trained['layers']}, "
      f"{', '.join(part.trained['paths'])}; choose the same, Adam's moments are theirs"
    )
  missing = set(part.kernels) - set(part.tree.paths)
  if s.score_path == "projected" and missing:
    raise UserError(f"--score_path=projected covers all kernels of a layer, --modules={s.modules} lacks {min(missing)}")
  check_size(s, part.size, f"--solver={s.solver}")


def check_pair_solver(session: Session, s: Settings) -> None:
  """Refuses what takes a loss to be a sum over tokens, where the training set has preference pairs.

  Raises:
    UserError: EK-FAC, as a solver or a preconditioner.
  """
  named = next((name for name in ("solver", "precondition") if getattr(s, name) in ("ekfac", "diagonal")), None)
  if named and session.splits["train"].second is not None:
    raise UserError(
      f"{s.as_flag(named)} fits factors to losses of single tokens, and the training set has preference pairs, whose "
      "loss joins the tokens of both sides: take --solver=cg, lissa or low_rank without --precondition"
    )


def check_kinds(session: Session, s: Settings) -> None:
  """What `select` refuses because of the kind or number of examples, before any weight is read."""
  check_pair_solver(session, s)
  check_policies(session, {s.policy})
  target_weights.check(session, s, {s.policy})
  if s.writes("tokens") and session.splits["train"].second is not None:
    raise UserError(
      "--coreset_format=tokens: the training set has preference pairs, and a row of ids is one conversation: take "
      "coreset.jsonl, --coreset_format=parquet or hf"
    )


def check_select(session: Session, s: Settings, params) -> Budget:
  """What `select` refuses, by shapes and data alone; returns its budget.

  Args:
    session: the examples.
    s: the flags.
    params: that are scored, arrays or shapes.
  """
  check_kinds(session, s)
  check_scores(s, params)
  return check_budget(s, session.splits["train"])


def check_demo(session: Session, s: Settings) -> None:
  """What its `select` would refuse after the fine-tuning; what is trained is what is scored, LoRA factors among it."""
  check_scores(s, *shapes.trained_shapes(session.model.config, s))
  check_budget(s, session.splits["train"])
  made = shapes.num_checkpoints(session, s)
  if s.trajectory != "none" and 0 < s.keep_checkpoints < made:
    raise UserError(
      f"--trajectory={s.trajectory} adds up over all {made} checkpoints, of which --keep_checkpoints="
      f"{s.keep_checkpoints} leaves the newest: give --keep_checkpoints=0"
    )


def check_evaluate(session: Session, s: Settings) -> None:
  """What `evaluate` refuses by flags and data alone; select runs need not be there yet."""
  check_policies(session, set(policies_of(s)))
  target_weights.check(session, s, policies_of(s))
  seeds_of(s)
  check_budget(s, session.splits["train"])


def _check_select(session: Session, s: Settings) -> None:
  if s.index:
    raise UserError("--dry_run prices passes over the pool, and --index only reads its rows: leave one of them out")
  check_select(session, s, shapes.scored_params(session.model.config, s))


BEFORE = {"select": _check_select, "demo": check_demo, "evaluate": check_evaluate}  # stages, for --dry_run
