"""One step of TRL's SFTTrainer on CPU. Runs in an environment of its own, which has nothing of this project.

python trl_step.py MODEL TOKENS CHAT OUT.json

Takes what `export` and `select` wrote: the model's folder, the coreset as token ids, the coreset as conversations. OUT
gets the loss of the step, and whether the tokenizer and chat template of the folder make the same ids.
"""

import importlib.metadata
import json
import pathlib
import sys
import tempfile


def first_losses(model: str, examples) -> list[float]:
  """The loss of each batch of one step on all examples: of a single one, where they are one batch."""
  import trl

  losses = []

  class Trainer(trl.SFTTrainer):
    """Notes the loss before the log rounds it."""

    def compute_loss(self, *args, **kwargs):
      found = super().compute_loss(*args, **kwargs)
      losses.append(float(found[0] if isinstance(found, tuple) else found))
      return found

  with tempfile.TemporaryDirectory() as scratch:
    config = trl.SFTConfig(
      output_dir=scratch,
      max_steps=1,
      per_device_train_batch_size=len(examples),
      max_length=None,
      packing=False,
      bf16=False,
      use_cpu=True,
      gradient_checkpointing=False,
      model_init_kwargs={"dtype": "float32"},
      save_strategy="no",
      report_to="none",
      disable_tqdm=True,
    )
    Trainer(model=model, args=config, train_dataset=examples).train()
  return losses


def main(model: str, tokens: str, chat: str, out: str) -> None:
  """Trains one step on the whole coreset as one batch."""
  import datasets
  import transformers

  examples = datasets.load_from_disk(tokens)
  losses = first_losses(model, examples)
  tokenizer = transformers.AutoTokenizer.from_pretrained(model)
  conversations = [json.loads(line) for line in pathlib.Path(chat).read_text(encoding="utf-8").splitlines()]
  made = [tokenizer.apply_chat_template(one["messages"], return_dict=True)["input_ids"] for one in conversations]
  names = ("torch", "transformers", "trl", "datasets", "accelerate")
  found = {
    "loss": losses[0],
    "batches": len(losses),
    "examples": len(examples),
    "same_ids": made == examples["input_ids"][:],
    "versions": {name: importlib.metadata.version(name) for name in names},
  }
  pathlib.Path(out).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
  main(*sys.argv[1:])
