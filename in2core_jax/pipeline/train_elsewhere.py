"""train_with.md of a run that chooses, and the file of conversations that it names."""

import math
import pathlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from in2core_jax.data.record_tables import chat_line, is_chat_line
from in2core_jax.data.sources import names_of
from in2core_jax.data.tokenizing import TokenizedDataset
from in2core_jax.errors import how_many
from in2core_jax.model import weights
from in2core_jax.pipeline.session import Session
from in2core_jax.pipeline.settings import Settings
from in2core_jax.report import train_with
from in2core_jax.runs.run_folder import RunDir
from in2core_jax.training import train_loop

_OF_FLAGS = ("batch_size", "learning_rate", "warmup_ratio", "weight_decay", "max_grad_norm", "seed")
CHAT = "coreset_chat.jsonl"  # there only where coreset.jsonl says something else


_WEIGHTED = (
  "- coreset.jsonl says in `weight` how much each example's loss counts. `./run.sh finetune` follows it. Trainers that "
  "do not know the key train on the same examples with equal weights; coreset_chat.jsonl and coreset_tokens/ have no "
  "weights."
)


def write_train_with(
  run_dir: RunDir,
  session: Session,
  s: Settings,
  rows: np.ndarray,
  recipe: tuple[dict[str, Any], int],
  here: tuple[str, str] = ("select", ""),
  weighted: bool = False,
) -> None:
  """Writes train_with.md and, where coreset.jsonl does not hold conversations, coreset_chat.jsonl.

  Args:
    run_dir: of the run.
    session: its examples and model.
    s: the flags.
    rows: int [S], the coreset.
    recipe: of `recipe_elsewhere`.
    here: the command that chose, and the line that trains on it with this project, or "".
    weighted: whether coreset.jsonl has weights.
  """
  train = session.splits["train"]
  few, usable = train.take(np.sort(rows)), _usable(session)
  recipe, rank = recipe
  model, about = _model_elsewhere(s)
  training = train_with.Training(
    model=model,
    about_model=about,
    chat=write_chat(run_dir, few, s.system_prompt),
    examples=len(rows),
    truncated=int(few.truncated.sum()),
    max_length=s.max_length,
    system_prompt=s.system_prompt,
    template_date=session.splits.template_date,
    loss_reduction=s.loss_reduction,
    epochs=recipe["steps"] * recipe["batch_size"] / usable if s.checkpoint or s.steps else s.epochs,
    full_steps=recipe["steps"],
    recipe={name: value for name, value in recipe.items() if name != "steps"},
    lora_rank=rank,
    sources=len(set(names_of(train.records))),
    notes=(*_notes(few, s), *([_WEIGHTED] if weighted else [])),
    beta=None if train.second is None else s.beta,
    command=here[0],
    line=here[1],
  )
  run_dir.write_text("train_with.md", train_with.page(training))


def write_chat(run_dir: RunDir, few: TokenizedDataset, system_prompt: str) -> str:
  """The file that trainers read as turns: coreset.jsonl, or one of its own where that has another shape."""
  system = system_prompt if system_prompt not in ("default", "none") else ""
  if few.second is None and all(is_chat_line(record, system) for record in few.records):
    return "coreset.jsonl"

  def write(stream: BinaryIO) -> None:
    for record in few.records:
      stream.write(chat_line(record, system).encode("utf-8", errors="backslashreplace") + b"\n")

  run_dir.write_streamed(CHAT, write)
  return CHAT


def recipe_elsewhere(s: Settings, session: Session) -> tuple[dict[str, Any], int]:
  """(recipe of the checkpoint that is scored, or of the flags; rank of its LoRA factors or 0); collective."""
  if s.checkpoint:
    meta = train_loop.checkpoint_meta(s.checkpoint)
    if "recipe" in meta:  # an adapter of PEFT does not tell how it was trained
      return meta["recipe"], meta["lora_rank"]
  # No `Recipe`: what it refuses is no reason to fail when the scores are there.
  found = {name: getattr(s, name) for name in _OF_FLAGS}
  found["steps"] = s.steps or max(1, math.ceil(_usable(session) * s.epochs / s.batch_size))
  return found, s.lora_rank if s.trainable == "lora" else 0


def _usable(session: Session) -> int:
  """How many training examples have a response."""
  return int(np.count_nonzero(session.splits["train"].num_response_tokens))


def _model_elsewhere(s: Settings) -> tuple[str, str]:
  """(what a trainer loads, what is to be done before)."""
  kind, place = weights.source_of(s.model)
  if kind == "hf" and not s.model.startswith("truncated:"):
    return str(pathlib.Path(place).absolute()), ""
  return "exported", f"first: `./run.sh export --model={s.model} --to=THIS_FOLDER/exported`".replace("|", "")


def _notes(few: TokenizedDataset, s: Settings) -> Iterator[str]:
  """What trainers cannot repeat from conversations."""
  if s.system_prompt == "none":
    yield (
      "- This run has no system prompt. A chat template that adds one by itself does so elsewhere too: the token ids "
      "are without it."
    )
  left_out = sum(not message.get("train", True) for record in few.records for message in record.messages)
  if left_out:
    yield (
      f"- {how_many(left_out, 'response[s] of the conversations [is|are]')} out of the loss (`train: false`). Axolotl "
      "knows the key; other trainers would learn them: take the token ids."
    )
  layers, modules = s.trainable_layers, s.trainable_modules
  if (layers, modules) != ("all", "all"):
    yield f"- Trainings of this project with these flags change layers {layers} and modules {modules} alone."
