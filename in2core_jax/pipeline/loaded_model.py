"""The model that a session works with: its shape and tokenizer at once, its weights when they are first needed."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax

from in2core_jax.errors import UserError
from in2core_jax.model import peft_folder, weights
from in2core_jax.model.config import ModelConfig
from in2core_jax.parallel import sharding
from in2core_jax.params import adapters, quantisation, subtree
from in2core_jax.pipeline.settings import Settings
from in2core_jax.runs import adapter_folder
from in2core_jax.training import train_loop

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedModel:
  """A model on its devices.

  Attributes:
    name: as --model names it.
    dtype: of the weights, float32 or bfloat16.
    config: its shape.
    tokenizer: its tokenizer.
    mesh: the devices.
    load: gives (parameters, hash of the weights); called once, when they are first asked for.
    kept: what its matrices of layers are kept in, a word of --frozen_weights.
  """

  name: str
  dtype: str
  config: ModelConfig
  tokenizer: Any
  mesh: Any
  load: Callable[[], tuple[Any, str]]
  kept: str = quantisation.FULL

  @functools.cached_property
  def _weights(self) -> tuple[Any, str]:
    params, digest = self.load()
    return self.place(params), digest

  @property
  def params(self) -> Any:
    """The base model's parameters, on the devices."""
    return self._weights[0]

  @property
  def hash(self) -> str:
    """Names the base weights."""
    return self._weights[1]

  def place(self, params: Any) -> Any:
    """Puts parameters, or what is shaped like some of them, onto the devices; what is there already stays."""
    return sharding.place_params(params, self.mesh)

  def on(self, mesh: Any) -> "LoadedModel":
    """The same weights on other devices."""
    return dataclasses.replace(self, mesh=mesh, load=lambda: self._weights)

  def at_checkpoint(self, folder: str, step: int | None = None, template_date: str | None = None) -> Any:
    """The base model's parameters with a checkpoint's subtree put in, or with a PEFT adapter's factors beside them.

    Args:
      folder: of checkpoints, or of an adapter.
      step: which of them; the newest when None.
      template_date: that the chat template prints in the examples at hand.

    Raises:
      UserError: no checkpoint there, one of another model or date, or one that is not finished.
    """
    meta = train_loop.checkpoint_meta(folder)
    if adapter_folder.is_adapter(folder):
      check_template_date(folder, meta, template_date)
      return self.place(peft_folder.read_adapter(folder, self.config).beside(self.params))
    theirs = meta.get("frozen_weights", self.kept)  # full weights are not named, nor were others by older versions
    if theirs != self.kept:
      raise UserError(
        f"--checkpoint={folder} was trained with --frozen_weights={theirs}, not {self.kept}: give "
        f"--frozen_weights={theirs}"
      )
    if meta["model_hash"] != self.hash:
      raise UserError(
        f"--checkpoint={folder} was trained from model {meta['model']} (hash {meta['model_hash'][:12]}), but --model="
        f"{self.name} has hash {self.hash[:12]}: give the model that the checkpoint started from, with the same "
        f"--frozen_weights (here {self.kept})"
      )
    if meta["step"] < meta["steps"]:
      done = f"{meta['step']} of {meta['steps']}"
      raise UserError(f"--checkpoint={folder} stopped at step {done}: run that finetune command again first")
    check_template_date(folder, meta, template_date)
    params = self.params
    if meta["lora_rank"]:
      params = self.place(adapters.add_lora(params, meta["lora_rank"], jax.random.key(meta["seed"])))
    saved = meta["subtree"]
    chosen = subtree.Subtree(
      tuple(saved["layers"]), self.config.num_layers, tuple(saved["paths"]), tuple(saved["extras"])
    )
    sub, frozen = subtree.split(params, chosen)
    return subtree.merge(train_loop.load_sub(folder, sub, step), frozen, chosen)


def open_model(s: Settings, described: tuple[ModelConfig, Any], mesh: Any) -> LoadedModel:
  """The model of --model, whose weights are read when they are first asked for.

  Args:
    s: --model, --dtype, --seed, --frozen_weights.
    described: its (config, tokenizer), of `weights.describe_model`.
    mesh: the devices.
  """

  def load() -> tuple[Any, str]:
    log.info("loading model %s", s.model)
    _, params, _, digest = weights.load_model(s.model, s.dtype, s.seed, mesh, s.frozen_weights)
    return params, digest

  return LoadedModel(s.model, s.dtype, *described, mesh, load, s.frozen_weights)


def check_template_date(folder: str, meta: dict, ours: str | None) -> None:
  """Refuses a checkpoint that was trained on conversations of another date.

  Args:
    folder: of the checkpoint.
    meta: what it says of itself.
    ours: the date that the chat template prints in the examples at hand; None where it prints none.
  """
  theirs = meta.get("template_date")
  if ours and theirs and ours != theirs:
    raise UserError(
      f"--checkpoint={folder} was trained on conversations in which the chat template prints {theirs}, not "
      f"--template_date={ours}: give --template_date={theirs}"
    )
  if ours and not theirs:
    log.warning(
      "the chat template prints a date, and --checkpoint=%s does not say which date it was trained with: "
      "--template_date=%s may be another one; train it again to be sure",
      folder,
      ours,
    )
