"""Fine-tunes the model on the training set: on all of it, or on the examples of a coreset."""

import dataclasses
import logging
from typing import Any

import jax
import numpy as np

from in2core_jax.data import packing
from in2core_jax.data.records import weights_of
from in2core_jax.errors import how_many
from in2core_jax.model.objective import make_objective
from in2core_jax.params import adapters, subtree
from in2core_jax.pipeline import phases, shapes
from in2core_jax.pipeline.advice import spares_nothing
from in2core_jax.pipeline.session import Session, open_session
from in2core_jax.pipeline.settings import TRAINED, Settings
from in2core_jax.runs import run_folder, stopping
from in2core_jax.runs.progress import Progress
from in2core_jax.training import train_loop
from in2core_jax.training.recipe import Recipe, steps_for

log = logging.getLogger(__name__)


def recipe_of(settings: Settings, num_examples: int) -> Recipe:
  """The recipe that the flags ask for; every compared training takes the steps of `num_examples`, the full set."""
  steps = settings.steps or steps_for(num_examples, settings.batch_size, settings.epochs)
  return Recipe(
    steps,
    settings.batch_size,
    settings.learning_rate,
    settings.warmup_ratio,
    settings.weight_decay,
    settings.max_grad_norm,
    settings.seed,
  )


def start_params(session: Session, settings: Settings):
  """(parameters at the start, chosen subtree): with LoRA factors when they are what is trained."""
  params, modules, layers = session.model.params, settings.trainable_modules, settings.trainable_layers
  if settings.trainable == "lora":
    with_lora = adapters.add_lora(params, settings.lora_rank, jax.random.key(settings.seed))
    params, modules = session.model.place(with_lora), "lora"
  return params, subtree.make_subtree(params, layers, modules, TRAINED)


def trainable_rows(session: Session):
  """Rows of the training set that have a response: the others teach nothing."""
  return session.splits["train"].num_response_tokens.nonzero()[0]


_DEPENDS_ON = ("data", "model", "finetune", "run"), ("train",)  # groups of settings, parts of the data


def identity_of(session: Session, settings: Settings) -> dict:
  """What a fine-tuned checkpoint depends on."""
  return session.identity("finetune", settings, *_DEPENDS_ON)


@dataclasses.dataclass(frozen=True)
class Task:
  """What a run does, settled before there is a folder.

  Attributes:
    settings: the flags.
    session: examples and model.
    rows: int [S], the training examples with a response.
    params: parameters at the start.
    tree: what of them is trained.
    recipe: how.
  """

  settings: Settings
  session: Session
  rows: np.ndarray
  params: Any
  tree: subtree.Subtree
  recipe: Recipe


def run(settings: Settings, session: Session | None = None) -> str:
  """Fine-tunes on the full training set; returns the checkpoint folder. Resumes, or returns at once when it is done."""
  run_folder.RunDir.refuse_held(settings.run_dir)  # before the work that comes before the folder is opened
  session = session or open_session(settings, pairs=True, weighted=True)
  session.check_folder("finetune", settings, *_DEPENDS_ON)
  # Wrong flags are told before there is a folder of theirs, which the corrected command could not use.
  task = prepare(settings, session)
  run_dir = run_folder.RunDir.open(settings.run_dir, identity_of(session, settings), overwrite=settings.overwrite)
  session.splits.write_skipped(run_dir)
  folder = run_dir.file(run_folder.CHECKPOINT)
  sub, frozen = subtree.split(task.params, task.tree)
  if run_dir.is_whole("finetune.json") and train_loop.is_finished(folder, task.recipe.steps, sub):
    log.info("%s is finished already", run_dir.path)
  else:
    result = train(task, run_dir, sub, frozen)
    write(task, run_dir, result)
  return str(folder)


# ---- the steps -----------------------------------------------------------------------


def prepare(s: Settings, session: Session) -> Task:
  """Refuses what cannot be trained, then reads the model."""
  shapes.trained_shapes(session.model.config, s)
  rows = trainable_rows(session)
  params, tree = start_params(session, s)
  return Task(s, session, rows, params, tree, recipe_of(s, len(rows)))


def packer_of(task: Task) -> packing.Packer:
  """The training examples with a response, in batches of one shape."""
  session, recipe, rows = task.session, task.recipe, task.rows
  shape = packing.training_shape([session.packer("train", rows=rows)], recipe.batch_size, [recipe.seed])
  # Hidden states of the base model: fresh LoRA factors change none.
  return session.packer("train", task.tree, session.model.params, rows, [shape], weights_of_rows(session, rows))


def weights_of_rows(session: Session, rows: np.ndarray) -> np.ndarray | None:
  """How much the losses of some training examples count, f64 [rows], as the records say; None: all alike."""
  every = weights_of(session.splits["train"].records)
  return None if every is None else every[rows]


def train(task: Task, run_dir: run_folder.RunDir, sub: Any, frozen: Any) -> train_loop.TrainResult:
  """Trains with checkpoints in the run folder; SIGTERM ends it after a step, which is kept."""
  s, session, recipe = task.settings, task.session, task.recipe
  lasting = how_many(recipe.steps, "step"), how_many(recipe.batch_size, "example")
  words = "training %s numbers in layers %s for %s of %s"
  log.info(words, f"{subtree.count(sub):,}", s.trainable_layers, *lasting)
  for line in spares_nothing(s, task.params, task.tree):
    log.warning("%s", line)
  packer, meta = packer_of(task), meta_of(task, run_dir)
  weights = weights_of_rows(session, task.rows)
  if weights is not None:
    low, high = (bound / weights.mean() for bound in (weights.min(), weights.max()))
    log.info("training examples have weights, %.3g to %.3g where their mean is 1; others' losses have none", low, high)
  run_dir.write_flags("flags.txt", s.as_flags(), ["python -m experiments.finetune --flagfile=THIS"])
  folder, objective = run_dir.file(run_folder.CHECKPOINT), make_objective(session.model.config, task.tree)
  trainer = train_loop.Trainer(objective, recipe, session.batching.place, session.model.place)
  with Progress(recipe.steps, phases.TRAINING, "steps") as progress, stopping.finish_on_sigterm() as stop_requested:
    report = lambda step, steps, loss, rate: progress.update(  # noqa: E731
      step - progress.count, loss=round(loss, 3), tokens_per_s=int(rate)
    )
    kept = train_loop.TrainLog(folder, run_dir, s.checkpoint_every, s.keep_checkpoints, meta, report, stop_requested)
    return trainer.train(sub, frozen, packer, log=kept)


def meta_of(task: Task, run_dir: run_folder.RunDir) -> dict:
  """What a checkpoint says of itself."""
  s, model, date = task.settings, task.session.model, task.session.splits.template_date
  return {
    "model": s.model,
    "model_hash": model.hash,
    "subtree": train_loop.subtree_meta(task.tree),
    "lora_rank": s.lora_rank if s.trainable == "lora" else 0,
    "seed": s.seed,
    "steps": task.recipe.steps,
    "recipe": dataclasses.asdict(task.recipe),
    "checkpoint_every": s.checkpoint_every,
    "identity": run_dir.identity_sha256,
    **({"template_date": date} if date else {}),
    **({"frozen_weights": s.frozen_weights} if s.is_set("frozen_weights") else {}),
  }


def write(task: Task, run_dir: run_folder.RunDir, result: train_loop.TrainResult) -> None:
  """finetune.json, which marks the run as done."""
  window = max(1, min(10, task.recipe.steps // 2))
  summary = {
    "steps": task.recipe.steps,
    "examples": len(task.rows),
    "trained_tokens": result.trained_tokens,
    "trained_response_tokens": result.trained_response_tokens,
    "first_loss": float(result.losses[:window].mean()),
    "last_loss": float(result.losses[-window:].mean()),
    "seconds": round(result.seconds, 1),
  }
  run_dir.write_json("finetune.json", summary)
  first, last = summary["first_loss"], summary["last_loss"]
  log.info("finetune: loss %.3f -> %.3f, checkpoint in %s", first, last, run_dir.file(run_folder.CHECKPOINT))
