"""Export: a model, with a fine-tuned checkpoint merged into it, as a folder that transformers and vLLM load.

./run.sh export --checkpoint=runs/mine/finetune/checkpoint --to=exported
"""

import logging
import pathlib
import shutil
from typing import Any

import numpy as np

from in2core_jax import __version__ as version
from in2core_jax.errors import UserError
from in2core_jax.model import hf_folder, peft_writer, weights
from in2core_jax.parallel import sharding
from in2core_jax.pipeline.loaded_model import LoadedModel, open_model
from in2core_jax.pipeline.settings import Settings
from in2core_jax.runs import adapter_folder, files
from in2core_jax.training import train_loop

log = logging.getLogger(__name__)

NOTE = "in2core-export.json"  # in a folder that is not finished: what it is of


def run(s: Settings, to: str, adapter: bool = False) -> str:
  """Writes the folder `to`; returns it. A stopped export goes on where it was.

  Args:
    s: --model and --frozen_weights (those of the checkpoint where they are not set), --checkpoint (empty: the base
      model), --dtype, --seed, --overwrite.
    to: a local folder; its parent is made when missing.
    adapter: write the LoRA factors of the checkpoint alone, as a PEFT folder, and no model.

  Raises:
    UserError: a folder with other files, no factors for `adapter`, a checkpoint of another model, a model that no
      known type expresses.
  """
  meta = train_loop.checkpoint_meta(s.checkpoint) if s.checkpoint else {}
  if meta and not s.is_set("model"):
    its_own = adapter_folder.is_adapter(s.checkpoint)
    s = s.replace(model=adapter_folder.base_of(s.checkpoint) if its_own else meta["model"])
  if meta.get("frozen_weights") and not s.is_set("frozen_weights"):
    s = s.replace(frozen_weights=meta["frozen_weights"])
  if adapter and not meta.get("lora_rank"):
    raise UserError(f"--adapter: --checkpoint={s.checkpoint} has no LoRA factors; fine-tune with --trainable=lora")
  target = check_target(to, s.overwrite)
  described = weights.describe_model(s.model)
  model = open_model(s, described, sharding.make_mesh(s.mesh))
  params = model.at_checkpoint(s.checkpoint) if s.checkpoint else model.params
  note = {"version": version, "model": model.hash, "checkpoint": meta.get("weights_sha256", ""), "dtype": s.dtype}
  note |= {} if not meta else {"steps": meta["step"]}
  unfinished = _unfinished(target, note | ({"adapter": True} if adapter else {}))
  told = write_adapter(unfinished, model, params) if adapter else write(unfinished, model, params)
  (unfinished / NOTE).unlink()
  _put_into_place(unfinished, target)
  _tell(target, s, meta, told, adapter)
  return str(target)


def check_target(to: str, overwrite: bool) -> pathlib.Path:
  """The folder that is to be written.

  Raises:
    UserError: no name, no local folder, a file; a folder that holds something, unless it is an export and `overwrite`.
  """
  if not to.strip():
    raise UserError("--to= is empty: give the folder that is to be written, such as --to=exported")
  if files.is_remote(to):
    raise UserError(f"--to={to}: an export is written to a local folder; copy it from there")
  target = pathlib.Path(files.absolute(to))
  if target.is_symlink() or (target.exists() and not target.is_dir()):
    raise UserError(f"--to={to}: is there and is no folder; give a new one")
  if not target.is_dir() or not any(target.iterdir()):
    return target
  if not overwrite:
    raise UserError(f"--to={to}: the folder holds files; give a new one, or --overwrite to replace an earlier export")
  foreign = hf_folder.foreign_files(target)
  if foreign:
    raise UserError(
      f"--to={to}: --overwrite replaces an earlier export, and {foreign[0]} is not one of its files; give a new folder"
    )
  return target


def write(folder: pathlib.Path, model: LoadedModel, params: Any) -> list[str]:
  """Writes weights, configuration and what belongs to them; returns what is to be told.

  Args:
    folder: of an unfinished export of these very weights.
    model: the base model.
    params: its parameters, with the checkpoint's; LoRA factors are folded in.
  """
  kind, place = weights.source_of(model.name)
  own = kind != "hf"  # no files of a tokenizer are there: ours is written
  weights.save_hf_dir(folder, model.config, params, model.tokenizer if own else None, resume=True)
  if own:
    config = folder / "tokenizer_config.json"
    # Of its two names the one that transformers 4 knows too.
    hf_folder.write_json(config, files.read_json(config) | {"tokenizer_class": "PreTrainedTokenizerFast"})
    what = "dequantised from a GGUF file" if kind == "gguf" else "random"
    return [f"the weights are {what}; config.json and the tokenizer's files are made from what is known of them"]
  values = hf_folder.copied_config(place, model.config, np.dtype(params["embed"]["embedding"].dtype).name)
  if values is not None:
    hf_folder.write_json(folder / "config.json", values)
  copied = hf_folder.copy_beside(place, folder)
  if values is not None:
    return [f"copied from {place}: {', '.join(['config.json', *copied])}"]
  anew = "config.json is new, as the source's would mean another model"
  return [f"{anew}; copied from {place}: {', '.join(copied) or 'nothing'}"]


def write_adapter(folder: pathlib.Path, model: LoadedModel, params: Any) -> list[str]:
  """Writes the LoRA factors as a PEFT folder with the tokenizer of their model; returns what is to be told.

  Args:
    folder: of an unfinished export of these very factors.
    model: the base model.
    params: its parameters, with factors beside kernels.
  """
  word, _, rest = weights.full_spec(model.name).partition(":")
  kind, place = weights.source_of(model.name)
  known = word in ("hf", "hub") and not adapter_folder.is_adapter(rest)
  base, _, revision = rest.partition("@") if word == "hub" else (str(place) if known else model.name, "", "")
  peft_writer.write_adapter(folder, model.config, params, base, revision or None)
  if kind == "hf":
    hf_folder.copy_beside(place, folder)
  else:
    model.tokenizer.save_pretrained(folder)
  if known:
    return [f"LoRA factors alone, for the base model {base}"]
  return [f"LoRA factors alone, for {base}, which PEFT does not know: export that model, and load the factors onto it"]


def _unfinished(target: pathlib.Path, note: dict[str, Any]) -> pathlib.Path:
  """The folder beside the target that is written first: that of a stopped export of the same weights, or a new one."""
  folder = target.with_name(target.name + hf_folder.PARTIAL)
  if folder.is_dir() and any(folder.iterdir()):
    if not (folder / NOTE).is_file():
      raise UserError(f"{folder}: is there and is of no export; remove it, or give another --to")
    if files.read_json(folder / NOTE) == note:
      log.info("going on with %s", folder)
      return folder
    shutil.rmtree(folder)
  folder.mkdir(parents=True, exist_ok=True)
  files.write_json(folder / NOTE, note)
  return folder


def _put_into_place(folder: pathlib.Path, target: pathlib.Path) -> None:
  """Gives a whole export its name; an earlier one goes when the new one is there."""
  old = target.with_name(target.name + ".old")
  if target.is_dir() and any(target.iterdir()):
    if old.exists():
      raise UserError(f"{old}: is in the way of the export that is to be replaced; remove it")
    target.rename(old)
  folder.rename(target)
  if old.exists() and not hf_folder.foreign_files(old):
    shutil.rmtree(old)


def _tell(target: pathlib.Path, s: Settings, meta: dict[str, Any], told: list[str], adapter: bool) -> None:
  size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
  trained = "the base model"
  if meta:
    trained = f"step {meta['step']} of {s.checkpoint}"
    trained += f", LoRA factors of rank {meta['lora_rank']} merged" if meta["lora_rank"] and not adapter else ""
  log.info("%s: %s (%s, %.2f GB), %s", target, s.model, s.dtype, size / 1e9, trained)
  for line in told:
    log.info("%s", line)
  if s.is_set("frozen_weights"):
    rounded = f"matrices of layers are rounded to {s.frozen_weights}, and written in full"
    beside = f"the factors were trained beside matrices in {s.frozen_weights}: quantise those of the base model alike"
    log.info("%s", beside if adapter else rounded)
  if adapter:
    log.info("load it with PeftModel.from_pretrained(base_model, %r)", str(target))
    return
  log.info("load it with AutoModelForCausalLM.from_pretrained(%r), or: vllm serve %s", str(target), target)
