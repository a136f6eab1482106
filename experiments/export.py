"""Writes a model, a fine-tuned checkpoint merged into it, as a Hugging Face folder that transformers and vLLM load.

./run.sh export --checkpoint=runs/mine/finetune/checkpoint --to=exported
"""

from experiments import cli, flags
from experiments.settings import ExportFlags
from in2core_jax.pipeline import export


def main(_) -> None:
  """Entry point."""
  settings = flags.read(ExportFlags)
  export.run(settings, settings.to, settings.adapter)


if __name__ == "__main__":
  flags.define(ExportFlags)
  cli.run(main, alone=True)
