"""train_with.md: ready lines for trainers, which match the run that chose the examples."""

import dataclasses
import json
import math
from typing import Any

import numpy as np

from in2core_jax.report.table_text import escape_markdown
from in2core_jax.report.templating import environment


@dataclasses.dataclass(frozen=True)
class Training:
  """What the lines say.

  Attributes:
    model: a folder or a name on the Hub that trainers load.
    about_model: what to do before, or "".
    chat: file of the conversations.
    examples: selected.
    truncated: how many of them are longer than `max_length`.
    max_length: tokens.
    system_prompt: default, none or a text.
    template_date: that the chat template prints, or None.
    loss_reduction: mean or sum.
    epochs, full_steps: passes, and steps that all of the data takes.
    recipe: batch_size, learning_rate, warmup_ratio, weight_decay, max_grad_norm, seed.
    lora_rank: 0 where the weights themselves are trained.
    sources: how many there are.
    notes: what the trainers cannot repeat, in sentences.
    beta: of the DPO loss of preference pairs; None: conversations.
    command: that chose the examples.
    line: that trains on them with this project, or "".
  """

  model: str
  about_model: str
  chat: str
  examples: int
  truncated: int
  max_length: int
  system_prompt: str
  template_date: str | None
  loss_reduction: str
  epochs: float
  full_steps: int
  recipe: dict[str, Any]
  lora_rank: int = 0
  sources: int = 1
  notes: tuple[str, ...] = ()
  beta: float | None = None
  command: str = "select"
  line: str = ""

  @property
  def steps(self) -> int:
    """Of so many epochs of the selected examples."""
    return max(1, math.ceil(self.examples * self.epochs / self.recipe["batch_size"]))


_SYSTEM = {"default": "what the chat template adds by itself", "none": "none, not even the chat template's own"}
_LOSS = {
  "mean": "here a mean over examples of each one's mean; these trainers take the mean over all tokens",
  "sum": "a sum over tokens",
}


def page(training: Training) -> str:
  """The text of train_with.md."""
  t, rank = training, training.lora_rank
  config = f'LoraConfig(r={rank}, lora_alpha={rank}, target_modules="all-linear")'
  # YAML reads 1e-05 as a text.
  told = {
    name: np.format_float_positional(value, trim="-") if isinstance(value, float) else value
    for name, value in (t.recipe | {"epochs": float(t.epochs)}).items()
  }
  name = "train_with.md.j2" if t.beta is None else "train_with_pairs.md.j2"
  return (
    environment(html=False)
    .get_template(name)
    .render(
      told
      | {
        "n": t.examples,
        "model": t.model.replace("`", ""),
        "model_json": json.dumps(t.model, ensure_ascii=False),
        "about_model": t.about_model,
        "template_date": t.template_date,
        "system": _SYSTEM.get(t.system_prompt)
        or f"in each conversation that has none: {escape_markdown(t.system_prompt)}",
        "about_loss": _LOSS[t.loss_reduction],
        "max_length": t.max_length,
        "truncated": t.truncated,
        "steps": t.steps,
        "full_steps": t.full_steps,
        "epochs_whole": max(1, math.ceil(t.epochs)),
        "warmup_steps": round(t.recipe["warmup_ratio"] * t.steps),
        "lora_rank": rank,
        "beta": t.beta,
        "chat": t.chat,
        "chat_json": json.dumps(t.chat),
        "notes": t.notes,
        "command": t.command,
        "line": t.line,
        "several": t.sources > 1,
        "trl_lora": f", peft_config={config}" if rank else "",
      }
    )
  )
