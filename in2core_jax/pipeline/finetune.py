"""Stage 3: fine-tunes the model on the training set (all of it, or the examples of a coreset).

python -m experiments.finetune --run_dir=runs/full --trainable_layers=last:4
"""

import dataclasses
import logging

import jax

from in2core_jax.data import packing
from in2core_jax.model.objective import make_objective
from in2core_jax.params import adapters, subtree
from in2core_jax.pipeline.session import Workbench
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


def start_params(bench: Workbench, settings: Settings):
  """(parameters at the start, chosen subtree): with LoRA factors when they are what is trained."""
  params, modules, layers = bench.params, settings.trainable_modules, settings.trainable_layers
  if settings.trainable == "lora":
    with_lora = adapters.add_lora(params, settings.lora_rank, jax.random.key(settings.seed))
    params, modules = bench.place_params(with_lora), "lora"
  return params, subtree.make_subtree(params, layers, modules, TRAINED)


def trainable_rows(bench: Workbench):
  """Rows of the training set that have a response: the others teach nothing."""
  return bench.parts["train"].num_response_tokens.nonzero()[0]


def identity_of(bench: Workbench, settings: Settings) -> dict:
  """What a fine-tuned checkpoint depends on."""
  return bench.identity("finetune", settings, ("data", "model", "finetune", "run"), ("train",))


def run(settings: Settings, bench: Workbench | None = None) -> str:
  """Fine-tunes on the full training set; returns the checkpoint folder. Resumes, or returns at once when it is done."""
  run_folder.RunDir.refuse_held(settings.run_dir)  # before the work that comes before the folder is opened
  bench = bench or Workbench(settings)
  identity = identity_of(bench, settings)
  # Wrong flags are told before there is a folder of theirs, which the corrected command could not use.
  rows = trainable_rows(bench)
  (params, chosen), recipe = start_params(bench, settings), recipe_of(settings, len(rows))
  run_dir = run_folder.RunDir.open(settings.run_dir, identity, overwrite=settings.overwrite)
  bench.write_skipped(run_dir)
  folder = run_dir.file(run_folder.CHECKPOINT)
  sub, frozen = subtree.split(params, chosen)
  if run_dir.is_whole("finetune.json") and train_loop.is_finished(folder, recipe.steps, sub):
    log.info("%s is finished already", run_dir.path)
    return str(folder)
  log.info(
    "training %s numbers in layers %s for %d steps of %d examples",
    f"{subtree.count(sub):,}",
    settings.trainable_layers,
    recipe.steps,
    recipe.batch_size,
  )
  shape = packing.training_shape([bench.packer("train", rows=rows)], recipe.batch_size, [recipe.seed])
  packer = bench.packer("train", chosen, bench.params, rows, [shape])  # fresh LoRA factors change no hidden state
  meta = {
    "model": settings.model,
    "model_hash": bench.model_hash,
    "subtree": train_loop.subtree_meta(chosen),
    "lora_rank": settings.lora_rank if settings.trainable == "lora" else 0,
    "seed": settings.seed,
    "steps": recipe.steps,
    "recipe": dataclasses.asdict(recipe),
    "checkpoint_every": settings.checkpoint_every,
    "identity": run_dir.identity_sha256,
  } | ({"template_date": bench.template_date} if bench.template_date else {})
  run_dir.write_flags("flags.txt", settings.as_flags(), ["python -m experiments.finetune --flagfile=THIS"])
  with Progress(recipe.steps, "finetune", "steps") as progress, stopping.finish_on_sigterm() as stop_requested:
    report = lambda step, steps, loss, rate: progress.update(  # noqa: E731
      step - progress.count, loss=round(loss, 3), tokens_per_s=int(rate)
    )
    train_log = train_loop.TrainLog(
      folder,
      run_dir,
      settings.checkpoint_every,
      settings.keep_checkpoints,
      meta,
      report,
      stop_requested,
    )
    trainer = train_loop.Trainer(make_objective(bench.config, chosen), recipe, bench.place, bench.place_params)
    result = trainer.train(sub, frozen, packer, log=train_log)
  window = max(1, min(10, recipe.steps // 2))
  summary = {
    "steps": recipe.steps,
    "examples": len(rows),
    "trained_tokens": result.trained_tokens,
    "trained_response_tokens": result.trained_response_tokens,
    "first_loss": float(result.losses[:window].mean()),
    "last_loss": float(result.losses[-window:].mean()),
    "seconds": round(result.seconds, 1),
  }
  run_dir.write_json("finetune.json", summary)
  log.info("finetune: loss %.3f -> %.3f, checkpoint in %s", summary["first_loss"], summary["last_loss"], folder)
  return str(folder)
