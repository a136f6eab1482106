"""Fine-tuning of a subtree: AdamW with warm-up and cosine decay on response tokens, resumable to the same bytes.

The training loss of a batch is the mean over its examples of `loss(z)`, the loss whose gradients also select the data.
The batches of step s depend on (seed, epoch) alone; parameters, optimiser state and step number are checkpointed with
Orbax, so a killed run started again ends with the same numbers.
"""

import dataclasses
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from etils import epath

from in2core_jax import gradients
from in2core_jax.data.batches import Batch
from in2core_jax.data.packing import Packer
from in2core_jax.errors import UserError
from in2core_jax.parallel import processes
from in2core_jax.params.subtree import Subtree
from in2core_jax.runs import adapter_folder, files
from in2core_jax.runs.run_folder import RunDir
from in2core_jax.training import checkpoints
from in2core_jax.training.recipe import Recipe, make_optimizer, make_schedule

log_ = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


@dataclasses.dataclass(frozen=True)
class TrainResult:
  """A trained subtree and what it took.

  Attributes:
    sub: trained parameters of the subtree.
    losses: float64 [steps], mean loss of each step's examples.
    trained_tokens: token positions seen, padding left out, repeats counted.
    trained_response_tokens: response tokens seen, repeats counted.
    seconds: wall time of this call.
  """

  sub: Any
  losses: np.ndarray
  trained_tokens: int
  trained_response_tokens: int
  seconds: float


class Trainer:
  """One compiled training step, shared by any number of trainings with the same optimiser.

  Compiles once per batch shape; data, starting point, seed and number of steps may differ between calls of `train`.
  """

  def __init__(
    self,
    objective: gradients.Objective,
    recipe: Recipe,
    place: Callable[[Batch], Batch] = lambda batch: batch,
    place_params: Callable[[Any], Any] = lambda tree: tree,
  ):
    """Prepares the step.

    Args:
      objective: the loss.
      recipe: how to train; its seed is only the default of `train`.
      place: puts a batch onto the devices.
      place_params: puts parameters and the optimiser's state onto the devices.
    """
    self.recipe, self.place, self.place_params = recipe, place, place_params
    self.optimizer = make_optimizer(recipe)

    def step(sub, state, frozen, batch, rate):
      def loss_fn(s):
        losses = gradients.per_example_losses(objective, s, frozen, batch)
        return jnp.sum(losses) / jnp.maximum(jnp.sum(batch.valid), 1)

      loss, gradient = jax.value_and_grad(loss_fn)(sub)
      # The rate is an argument: a schedule of another length is the same program.
      optimizer = make_optimizer(recipe, lambda count: rate)
      updates, state = optimizer.update(gradients.widen(gradient), state, sub)
      return optax.apply_updates(sub, updates), state, loss

    self._step = jax.jit(step, donate_argnums=(0, 1))

  def init(self, sub):
    """Copies the start (the step donates its inputs) and makes the optimiser's state, both in float32 at least.

    Half-precision weights are trained as a float32 copy, which the model casts down where it uses it: an update of
    1e-4 would vanish in the rounding of a bfloat16 weight.
    """
    wide = jax.tree.map(jnp.array, gradients.widen(sub))
    return self.place_params((wide, self.optimizer.init(wide)))

  def train(
    self, sub, frozen, batcher: Packer, seed: int | None = None, log: "TrainLog | None" = None, steps: int = 0
  ) -> TrainResult:
    """Trains from `sub`, walking through the data as many times as that takes.

    Args:
      sub: start.
      frozen: everything else.
      batcher: of the training examples, with hidden states when the boundary cache is in use.
      seed: of the data order; the recipe's when None.
      log: checkpoints, metrics and progress; none when None.
      steps: of the optimiser; the recipe's when 0.

    Raises:
      UserError: the loss is not finite; names the step and the examples in it.
    """
    recipe = dataclasses.replace(self.recipe, steps=steps or self.recipe.steps)
    seed = recipe.seed if seed is None else seed
    rates = np.asarray(jax.vmap(make_schedule(recipe))(np.arange(recipe.steps)), np.float32)
    log = log or TrainLog()
    began = time.perf_counter()
    sub, state = self.init(sub)
    first, sub, state, losses = log.restore(sub, state)
    pending: list = []
    tokens = responses = 0
    for step, (places, batch) in enumerate(itertools.islice(stream(batcher, recipe, seed), recipe.steps)):
      rows = places[places >= 0]
      seen = int(np.sum([len(batcher.dataset.tokens[row]) for row in rows]))
      answered = int(np.count_nonzero(batch.weight))
      tokens, responses = tokens + seen, responses + answered
      if step < first:
        log.was_done(step + 1, losses[step], seen)
        continue
      sub, state, loss = processes.settle(self._step(sub, state, frozen, self.place(batch), rates[step]))
      pending.append((step, loss, seen, rows))
      if len(pending) > 2:  # keep two steps in flight: the host builds the next batch while the device works
        self._settle(pending.pop(0), recipe.steps, batcher, losses, log)
      stop = log.stop_requested()
      if stop or log.due(step + 1, recipe.steps):
        while pending:
          self._settle(pending.pop(0), recipe.steps, batcher, losses, log)
        log.save(step + 1, sub, state, losses)
      if stop:
        break
    while pending:
      self._settle(pending.pop(0), recipe.steps, batcher, losses, log)
    log.close()
    return TrainResult(sub, np.asarray(losses), tokens, responses, time.perf_counter() - began)

  def _settle(self, item, steps, batcher, losses, log) -> None:
    step, loss, seen, rows = item
    value = float(loss)
    if not np.isfinite(value):
      ids = ", ".join(batcher.dataset.ids[row] for row in rows[:4])
      raise UserError(
        f"training loss is {value} at step {step + 1} (examples {ids}, ...): lower --learning_rate, "
        "or look for extreme values in the weights"
      )
    losses.append(value)
    log.step(step + 1, steps, value, seen)


def stream(batcher: Packer, recipe: Recipe, seed: int) -> Iterator[tuple[np.ndarray, Batch]]:
  """Endless batches: epoch after epoch, each in an order that (seed, epoch) alone decides."""
  for epoch in itertools.count():
    yield from batcher.shuffled(recipe.batch_size, seed, epoch)


@dataclasses.dataclass
class TrainLog:
  """Where a training writes: Orbax checkpoints, a JSONL line per step, a progress display. All optional.

  Attributes:
    folder: of the checkpoints; None keeps nothing.
    run_dir: gets metrics.jsonl with step, loss, tokens, tokens_per_second: with every checkpoint and at the end.
    every: steps between checkpoints.
    keep: checkpoints that stay, the newest ones; 0: all.
    meta: stored beside the checkpoint: what it depends on and how to use it.
    on_step: called with (step, steps, loss, tokens_per_second).
    stop_requested: asked after every step; True ends the training there, with a checkpoint to go on from
      where there is a folder.
  """

  folder: epath.Path | None = None
  run_dir: RunDir | None = None
  every: int = 50
  keep: int = 2
  meta: dict = dataclasses.field(default_factory=dict)
  on_step: Callable[[int, int, float, float], None] | None = None
  stop_requested: Callable[[], bool] = lambda: False

  def __post_init__(self):
    self._manager = None
    self._lines: list[str] = []
    self._clock = time.perf_counter()
    if self.folder is not None:
      options = ocp.CheckpointManagerOptions(max_to_keep=self.keep or None, enable_async_checkpointing=False)
      self._manager = ocp.CheckpointManager(files.absolute(self.folder), options=options)

  def restore(self, sub, state):
    """(steps done, sub, state, losses) of the newest checkpoint that is whole, or the start; others are named."""
    done, losses = 0, []
    for step in sorted(self._manager.all_steps(), reverse=True) if self._manager else ():
      found = self._read(step, {"sub": sub, "optimizer": state})
      if found is not None:
        done, (sub, state, losses) = step, found
        break
      self._manager.delete(step)  # it will be written again
    if done and self.run_dir is not None and self.run_dir.holds(METRICS) and processes.is_writer():
      # Lines after the checkpoint belong to work that is done again.
      lines = self.run_dir.read_bytes(METRICS).decode().splitlines()
      self._lines = [line for line in lines if json.loads(line)["step"] <= done]
    return done, sub, state, losses

  def _read(self, step: int, like: dict) -> tuple[Any, Any, list[float]] | None:
    """(sub, optimiser's state, losses) of a checkpoint, or None where it is damaged, which is told.

    Raises:
      UserError: it is of another training.
    """
    note = found = None
    try:
      note = checkpoints.read_note(self.folder, step)
      found = checkpoints.restore(self.folder, step, like, note)
    except UserError as error:
      log_.warning("%s. The training continues from an older checkpoint, or from its start", error)
    if not processes.all_true(found is not None):
      return None
    stored, ours = ({**meta, "checkpoint_every": 0} for meta in (note.meta, json.loads(json.dumps(self.meta))))
    if stored != ours:  # how often it was saved changes no number
      raise UserError(f"{self.folder} holds a training with other settings; use --overwrite or another --run_dir")
    return found["sub"], found["optimizer"], list(note.losses)

  def was_done(self, step: int, loss: float, tokens: int) -> None:
    """Notes a step that an earlier process has done, where its line is lost; nobody knows how fast it was."""
    if len(self._lines) < step:
      self._lines.append(json.dumps({"step": step, "loss": loss, "tokens": tokens, "tokens_per_second": None}))

  def step(self, step: int, steps: int, loss: float, tokens: int) -> None:
    """Reports one finished step."""
    now = time.perf_counter()
    rate, self._clock = tokens / max(now - self._clock, 1e-9), now
    line = {"step": step, "loss": loss, "tokens": tokens, "tokens_per_second": round(rate, 1)}
    self._lines.append(json.dumps(line))
    if self.on_step:
      self.on_step(step, steps, loss, rate)

  def due(self, step: int, steps: int) -> bool:
    """Whether to save after this step."""
    return self._manager is not None and (step == steps or step % self.every == 0)

  def save(self, step: int, sub, state, losses) -> None:
    """Writes a checkpoint where there is a folder, each process its own part; Orbax puts it into place when whole."""
    if self._manager is None:
      return
    self._write_metrics()  # first: a checkpoint has the lines of all its steps
    checkpoints.save(self._manager, step, {"sub": sub, "optimizer": state}, self.meta, losses)

  def _write_metrics(self) -> None:
    if self.run_dir is not None:
      self.run_dir.write_text(METRICS, "".join(line + "\n" for line in self._lines))

  def close(self) -> None:
    """Waits for writes and closes files."""
    if self._manager:
      self._manager.wait_until_finished()
      self._manager.close()
    self._write_metrics()


def checkpoint_hash(folder: epath.PathLike) -> str:
  """Names the parameters that --checkpoint stands for, in identities; "" is the base model."""
  return files.hash_of(checkpoint_meta(folder) if folder else {})


def checkpoint_meta(folder: epath.PathLike) -> dict:
  """The `meta` of the newest checkpoint in a folder, with its step and what names its weights; of a PEFT adapter too.

  Raises:
    UserError: no checkpoint there, or a damaged one.
  """
  if adapter_folder.is_adapter(folder):
    return adapter_folder.checkpoint_meta(folder)
  step, note = checkpoints.newest(folder)
  return note.meta | {"step": step} | _named_weights(note)


def _named_weights(note: checkpoints.Note) -> dict[str, str]:
  """The hash of the trained weights; nothing where an older version has kept none."""
  return {"weights_sha256": note.sha256["sub"]} if note.sha256 else {}


def kept_steps(folder: epath.PathLike) -> list[int]:
  """Steps of the checkpoints in a folder, in order."""
  return checkpoints.steps(folder)


def steps_hash(folder: epath.PathLike, steps: Iterable[int]) -> str:
  """Names the parameters of several checkpoints of a training, in identities."""
  return files.hash_of({str(step): _named_weights(checkpoints.read_note(folder, step)) for step in steps})


def is_finished(folder: epath.PathLike, steps: int, like) -> bool:
  """Whether a training has saved its last step, and that is as it was written; what is not is named.

  Args:
    folder: of its checkpoints.
    steps: of the training.
    like: the trained subtree.
  """
  if kept_steps(folder)[-1:] != [steps]:
    log_.warning("%s: the checkpoint of step %d is missing; it is trained again", folder, steps)
    return False
  try:
    load_sub(folder, like)
  except UserError as error:
    log_.warning("%s. It is trained again", error)
    return False
  return True


def kept_weights(folder: epath.PathLike) -> dict[int, float]:
  """Mean learning rate of each checkpoint of a training that has kept all of them.

  Raises:
    UserError: some of them are gone.
  """
  meta, kept = checkpoint_meta(folder), kept_steps(folder)
  wanted = sorted({*range(meta["checkpoint_every"], meta["steps"] + 1, meta["checkpoint_every"]), meta["steps"]})
  if not set(wanted) <= set(kept):  # one more is there where SIGTERM stopped the training
    raise UserError(
      f"--trajectory: {folder} has checkpoints of steps {kept} out of {wanted}: fine-tune again with "
      "--keep_checkpoints=0 --overwrite"
    )
  return step_weights(meta["recipe"], wanted)


def step_weights(recipe: Mapping[str, Any], steps: list[int]) -> dict[int, float]:
  """Mean learning rate of the steps that led from the checkpoint before to each of `steps`: TracIn's eta_t."""
  schedule, before, weights = make_schedule(Recipe(**recipe)), 0, {}
  for step in steps:
    weights[step] = float(np.mean([schedule(done) for done in range(before, step)]))
    before = step
  return weights


def load_sub(folder: epath.PathLike, like, step: int | None = None) -> Any:
  """The subtree of a checkpoint, the newest unless told, shaped like `like` (the optimiser's state stays on disk).

  Raises:
    UserError: the checkpoint's subtree has other shapes, is damaged, or is of another training than the newest one.
  """
  restored = _restore(folder, step, {"sub": gradients.widen(like)})  # as it was trained and saved
  return jax.tree.map(lambda leaf, want: jnp.asarray(leaf, want.dtype), restored["sub"], like)


def load_state(folder: epath.PathLike, step: int, sub) -> Any:
  """The optimiser's state at a checkpoint of the training of `sub`."""
  state = jax.eval_shape(make_optimizer(Recipe(**checkpoint_meta(folder)["recipe"])).init, gradients.widen(sub))
  state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)
  return _restore(folder, step, {"optimizer": state})["optimizer"]


def _restore(folder: epath.PathLike, step: int | None, like: dict) -> dict:
  last, newest = checkpoints.newest(folder)
  step = last if step is None else step
  note = newest if step == last else checkpoints.read_note(folder, step)
  if note.meta != newest.meta:
    raise UserError(
      f"--checkpoint={folder}: step {step} is of another training than step {last}: fine-tune again with --overwrite"
    )
  return checkpoints.restore(folder, step, like, note)


def subtree_meta(subtree: Subtree) -> dict:
  """A subtree as plain JSON, for a checkpoint's meta."""
  return {"layers": list(subtree.layers), "paths": list(subtree.paths), "extras": list(subtree.extras)}
