"""A small model and a coreset of ours in TRL: is the loss of its first step ours?

The model is random, with weights large enough that every token has a loss of its own: one that is masked otherwise, or
cut elsewhere, would show. It goes out by `export`, the coreset by `select`; TRL reads both.
"""

import contextlib
import json
import logging
import pathlib
import subprocess
from typing import Any

import jax
import numpy as np

from experiments.interop import environment
from experiments.settings import InteropFlags
from in2core_jax.data.assets import asset_path
from in2core_jax.errors import UserError, how_many, one_line
from in2core_jax.model import decoder, weights
from in2core_jax.model.tokenizer import tokenizer_from_gguf
from in2core_jax.pipeline import export, select
from in2core_jax.pipeline.settings import Settings
from in2core_jax.report.table_text import markdown_table
from in2core_jax.runs import run_folder

log = logging.getLogger(__name__)

RTOL = 1e-5
_STEP = pathlib.Path(__file__).with_name("trl_step.py")
_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}


def run(s: InteropFlags) -> bool:
  """Prints versions and both losses; whether they are equal to 1e-5 of their size, and the token ids all the same."""
  identity = {"stage": "interop", "seed": s.seed, "requirements": environment.REQUIREMENTS.read_text(encoding="utf-8")}
  run_dir = run_folder.RunDir.open(s.run_dir, identity, overwrite=s.overwrite or _is_interop(s.run_dir))
  python = environment.python()
  folder = pathlib.Path(run_dir.folder("parts")).absolute()
  log.info("a small random model, and a coreset of 8 examples")
  with _quiet():
    coreset, ours = our_loss(folder, s.seed)
    exported = export.run(Settings(model=f"hf:{folder / 'source'}", overwrite=True), str(folder / "exported"))
  theirs = trl_loss(python, pathlib.Path(exported), coreset, folder / "trl.json")
  error = abs(theirs["loss"] / ours - 1)
  same = error <= RTOL and theirs["same_ids"] and theirs["batches"] == 1
  result = {"ours": ours, "theirs": theirs, "relative_error": error, "rtol": RTOL, "same": same}
  run_dir.write_json("interop.json", result)
  run_dir.write_text("interop.md", table(result))
  print(table(result), end="")
  return same


@contextlib.contextmanager
def _quiet():
  """Without what select and export tell: advice on a selection that nobody will use."""
  ours = logging.getLogger("in2core_jax")
  before = ours.level
  ours.setLevel(logging.ERROR)
  try:
    yield
  finally:
    ours.setLevel(before)


def make_model(folder: pathlib.Path, seed: int) -> None:
  """Writes a random model with the embedded tokenizer."""
  tokenizer = tokenizer_from_gguf(asset_path(weights.EMBEDDED_MODEL))
  config = decoder.ModelConfig(vocab_size=len(tokenizer), **_SIZES)
  params = jax.tree.map(np.asarray, decoder.init_params(config, jax.random.key(seed)))
  params |= {"embed": jax.tree.map(lambda leaf: 20 * leaf, params["embed"])}
  weights.save_hf_dir(folder, config, params, tokenizer)


def our_loss(folder: pathlib.Path, seed: int) -> tuple[pathlib.Path, float]:
  """(run folder of the selection, mean loss of all response tokens of its coreset, as `select` has computed it)."""
  make_model(folder / "source", seed)
  s = Settings(
    model=f"hf:{folder / 'source'}",
    run_dir=str(folder / "select"),
    train_data="chatterbot",
    train_limit=24,
    eval_limit=4,
    test_limit=4,
    layers="last:1",
    solver="identity",
    policy="proponents",
    budget="8",
    max_shapes=1,
    seed=seed,
    coreset_format="tokens",
  )
  chosen = run_folder.RunDir.load(select.run(s))
  columns = chosen.read_parquet("scores.parquet")
  kept = columns["selected"]
  tokens, losses = columns["num_response_tokens"][kept], columns["loss"][kept].astype(np.float64)
  return pathlib.Path(chosen.path), float((losses * tokens).sum() / tokens.sum())


def trl_loss(python: pathlib.Path, model: pathlib.Path, coreset: pathlib.Path, out: pathlib.Path) -> dict[str, Any]:
  """What `trl_step.py` has found.

  Raises:
    UserError: it failed; with the last line that it wrote.
  """
  chat = coreset / "coreset_chat.jsonl"
  chat = chat if chat.exists() else coreset / "coreset.jsonl"
  command = [str(python), "-P", str(_STEP), str(model), str(coreset / "coreset_tokens"), str(chat), str(out)]
  variables = environment.clean_environment(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
  log.info("one step of TRL's SFTTrainer")
  done = subprocess.run(command, env=variables, capture_output=True, text=True)
  if done.returncode:
    said = one_line(RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1]), 300)
    raise UserError(f"the step of TRL has failed: {said}")
  return json.loads(out.read_text(encoding="utf-8"))


def table(result: dict[str, Any]) -> str:
  """Versions, losses, verdict."""
  theirs = result["theirs"]
  rows = [{"what": name, "value": version} for name, version in theirs["versions"].items()]
  rows += [
    {"what": "loss of TRL's first step", "value": f"{theirs['loss']:.7f}"},
    {"what": "loss of this project", "value": f"{result['ours']:.7f}"},
    {"what": f"relative difference (at most {result['rtol']:g})", "value": f"{result['relative_error']:.1e}"},
    {"what": "chat template and tokenizer make the same ids", "value": "yes" if theirs["same_ids"] else "NO"},
  ]
  verdict = "the same" if result["same"] else "NOT THE SAME"
  return f"{markdown_table(rows)}\n{how_many(theirs['examples'], 'example')} in one batch: {verdict}\n"


def _is_interop(folder: str) -> bool:
  """Whether an earlier check is there, which is done anew."""
  file = pathlib.Path(folder).expanduser() / run_folder.MANIFEST
  return file.exists() and run_folder.RunDir.load(folder).identity.get("stage") == "interop"
