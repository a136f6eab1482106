"""The hidden states that a session keeps, by part and boundary: what enters the chosen layers is computed once."""

import dataclasses
import functools
import hashlib
import logging
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from in2core_jax import __version__ as version
from in2core_jax.errors import how_many
from in2core_jax.model import decoder, embeddings, hidden_cache
from in2core_jax.parallel import sharding
from in2core_jax.params import quantisation, subtree
from in2core_jax.pipeline import phases
from in2core_jax.pipeline.batching import Batching
from in2core_jax.pipeline.loaded_model import LoadedModel
from in2core_jax.pipeline.splits import Splits
from in2core_jax.runs import cache_folder, files, folder_files, kept_files, resumable, run_folder
from in2core_jax.runs.progress import track

log = logging.getLogger(__name__)

_WORTH_KEEPING = 1 << 24  # bytes: what is less is computed in seconds
_SHARE_OF_DISK = 0.1  # of what is free, or free but for such files: for all of them


@dataclasses.dataclass(frozen=True)
class Place:
  """Where hidden states are kept.

  Attributes:
    how: word of --boundary_cache.
    gigabytes: auto: so many are in memory where the disk has no room, more are on disk.
    run_dir: the run folder beside which files lie.
  """

  how: str
  gigabytes: float
  run_dir: str

  def serves(self, tree: subtree.Subtree) -> bool:
    """Whether hidden states below a subtree are kept."""
    return self.how != "off" and "embed" not in tree.extras

  def on_disk(self, size: int, base: bool = True) -> bool:
    """Whether so many bytes go to disk.

    Args:
      size: bytes.
      base: whether the layers below are the base model's, so that other commands can use them.
    """
    return self._asks_for_disk(size) or (self.how == "auto" and base and self._serves_others(size))

  def _asks_for_disk(self, size: int) -> bool:
    """Whether they go there whatever the room: by the flag, or as there are too many for the memory."""
    return self.how == "disk" or (self.how == "auto" and size > self.gigabytes * 1e9)

  def _serves_others(self, size: int) -> bool:
    """Whether hidden states are worth keeping for the next command, and a small part of the disk takes them."""
    if size < _WORTH_KEEPING or run_folder.is_remote(self.run_dir) or jax.process_count() > 1:
      return False
    if not self._is_writable:
      log.info("hidden states are not kept for the next command: %s cannot be written", self.folder)
      return False
    return size <= self._room()

  @property
  def _is_writable(self) -> bool:
    # Where they would lie: a run folder may be a disk of its own, and the folder above it somebody else's.
    return folder_files.is_writable(folder_files.nearest_of(self.folder))

  def _room(self) -> float:
    """Bytes that all hidden states together may take where they lie."""
    return _SHARE_OF_DISK * (files.disk_free(str(self.folder)) + kept_files.held_bytes(self.folder))

  @property
  def folder(self) -> pathlib.Path:
    """Beside the run folder, or on the local disk when that is gs://: they are read at random."""
    if run_folder.is_remote(self.run_dir):
      return cache_folder.cache_folder() / "boundary"
    return pathlib.Path(os.fspath(run_folder.beside(self.run_dir, "boundary")))

  def file(self, stem: str, code: str, size: int, base: bool = True) -> tuple[pathlib.Path | None, bool]:
    """Where hidden states are, or are to be kept; what nobody reads any more and what is in the way is removed.

    A file that is there is read whatever the room is now. Files are memory-mapped, and every process of a job has one
    of its own, with all examples.

    Args:
      stem: names the part, and what the numbers depend on.
      code: names the programs that make them.
      size: bytes.
      base: whether the layers below are the base model's.

    Returns:
      (file, or None: in memory; whether it is written where it is not there, or not whole).
    """
    if self.how in ("off", "memory"):
      return None, False
    alone = jax.process_count() == 1
    end = kept_files.SUFFIX if alone else f"-{jax.process_index()}of{jax.process_count()}{kept_files.SUFFIX}"
    file = self.folder / f"{stem}-{code}{end}"
    asked = self._asks_for_disk(size)
    if folder_files.is_writable(self.folder):
      self._remove_outdated(file, stem)
    if alone and file.exists():
      return file, self.on_disk(size, base)
    if not self.on_disk(size, base):
      return None, False
    room = self._room()
    self._told(kept_files.make_room(self.folder, size, room, asked), "used longest ago")
    if not asked and kept_files.held_bytes(self.folder) + size > room:
      return None, False  # what takes the room is in use
    self.folder.mkdir(parents=True, exist_ok=True)
    return file, True

  def _remove_outdated(self, file: pathlib.Path, stem: str) -> None:
    """Removes what other programs have made of the same, and files by the names of older versions."""
    end = r"(-\d+of\d+)?" + re.escape(kept_files.SUFFIX)
    ours = re.compile(rf"({re.escape(stem)}-[0-9a-f]{{8}}|(train|eval|test)-[0-9a-f]{{16}}){end}")
    found = [old for old in self.folder.iterdir() if ours.fullmatch(old.name) and old.name != file.name]
    # Files of other processes of the same job have the same code.
    code = file.name.removeprefix(f"{stem}-")[:8]
    removed = kept_files.remove(old for old in found if not old.name.startswith(f"{stem}-{code}"))
    self._told(removed, "made by other versions of the programs")

  def _told(self, removed: list[tuple[pathlib.Path, int]], why: str) -> None:
    if removed:
      size = sum(size for _, size in removed) / 1e9
      told = how_many(len(removed), "file")
      log.info("hidden states: %s (%.2f GB) removed from %s, %s", told, size, self.folder, why)


@dataclasses.dataclass(frozen=True, eq=False)
class HiddenCache:
  """Hidden states of examples, made when they are first asked for.

  Attributes:
    splits: the examples.
    model: the base model; other parameters are given with each request.
    batching: how examples are packed.
    where: in memory or on disk.
    rows: part -> the only rows of it that are handed out.
    kept: (part, boundary, hash of the weights below) -> hidden states of all examples of the part.
    embedded: part -> pooled last hidden states of the base model.
  """

  splits: Splits
  model: LoadedModel
  batching: Batching
  where: Place
  rows: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  kept: dict = dataclasses.field(default_factory=dict)
  embedded: dict = dataclasses.field(default_factory=dict)

  def with_eval(self, splits: Splits) -> "HiddenCache":
    """The same after a change of the evaluation set, whose hidden states are forgotten."""
    kept = {key: hidden for key, hidden in self.kept.items() if key[0] != "eval"}
    pooled = {part: found for part, found in self.embedded.items() if part != "eval"}
    return dataclasses.replace(self, splits=splits, kept=kept, embedded=pooled)

  def with_rows(self, part: str, rows: np.ndarray) -> "HiddenCache":
    """A view of some rows of a part: an example's hidden states do not depend on the others."""
    return dataclasses.replace(self, rows={**self.rows, part: rows})

  def of_rows(self, splits: Splits, rows: Mapping[str, np.ndarray]) -> "HiddenCache":
    """For a session of some rows of some parts: what there is of these, and nothing is made of the others.

    Args:
      splits: the examples, `rows` alone where there are any.
      rows: part -> rows of it.
    """

    def own(part: str) -> np.ndarray | slice:
      view = self.rows.get(part)
      if part not in rows:
        return slice(None) if view is None else view
      return rows[part] if view is None else view[rows[part]]

    parts = {part: own(part) for part in splits}
    whole = lambda part: isinstance(parts[part], slice)  # noqa: E731
    kept = {key: found if whole(key[0]) else found.take(parts[key[0]]) for key, found in self.kept.items()}
    pooled = {
      part: {name: values[parts[part]] for name, values in found.items()} for part, found in self.embedded.items()
    }
    return dataclasses.replace(self, splits=splits, rows={}, kept=kept, embedded=pooled)

  def holds(self, part: str, tree: subtree.Subtree, params: Any) -> bool:
    """Whether `below` has nothing to compute, by what this process has made."""
    return (
      not self.where.serves(tree) or (part, tree.boundary, _below_hash(params, tree, self.model.params)) in self.kept
    )

  def below(self, part: str, tree: subtree.Subtree, params: Any) -> hidden_cache.BoundaryCache | None:
    """Hidden states of a part that enter a subtree's lowest layer; None where they are not kept.

    Args:
      part: train, eval or test.
      tree: the subtree whose boundary counts.
      params: parameters that the layers below the boundary have.
    """
    if not self.where.serves(tree):
      return None
    digest = _below_hash(params, tree, self.model.params)
    key = (part, tree.boundary, digest)
    if key not in self.kept:
      for old in [one for one in self.kept if one[-1] not in ("base", digest)]:
        del self.kept[old]  # of another trained model: one is in use at a time
      self.kept[key] = self._compute(key, tree, params)
    found = self.kept[key]
    return found.take(self.rows[part]) if part in self.rows else found

  def _compute(self, key: tuple[str, int, str], tree: subtree.Subtree, params: Any) -> hidden_cache.BoundaryCache:
    part, boundary, _ = key
    dataset, dtype = self.splits[part], self.model.dtype
    size = hidden_cache.cache_bytes(dataset.num_tokens, self.model.config.hidden_size, jnp.dtype(dtype))
    stem = f"{part}-{run_folder.hash_of([key, self.model.hash, self.splits.identity(part), dtype])[:16]}"
    file, keep = self.where.file(stem, run_folder.hash_of([version, _code()])[:8], size, key[2] == "base")
    if file is not None:
      told = "read from" if file.exists() else "kept for the next command in"
      log.info("hidden states (%s): %.2f GB, %s %s", part, size / 1e9, told, file.parent)
    # The layers below do not depend on which modules are chosen above: one program and one cache for all of them.
    above = subtree.Subtree(tuple(range(boundary, tree.num_layers)), tree.num_layers, ())
    job = self._job(above, params, phases.hidden(boundary, part))
    return hidden_cache.compute_boundary(job, dataset, file, keep)

  def _job(self, tree: subtree.Subtree, params: Any, what: str) -> hidden_cache.BoundaryJob:
    """How the layers below a boundary are run over packed rows, with progress shown."""
    return hidden_cache.BoundaryJob(
      self.model.config,
      tree,
      params,
      self.batching.batch_tokens,
      jnp.dtype(self.model.dtype),
      lambda rows: sharding.place_batch(rows, self.batching.mesh),
      self.batching.groups,
      lambda source, total: track(source, total, what),
    )

  def pooled(self, part: str, pooling: str = "mean") -> np.ndarray:
    """Pooled last hidden states of a part's examples at the base model, float32 [N, D].

    Args:
      part: train, eval or test.
      pooling: a word of `embeddings.POOLINGS`; all are made in one pass.
    """
    if part not in self.embedded:
      # What scoring keeps at the base model need not be run again.
      kept = {key[1]: hidden for key, hidden in self.kept.items() if key[0] == part and key[2] == "base"}
      below = (kept[max(kept)], max(kept)) if kept else None
      tree = embeddings.above_all(self.model.config.num_layers)
      job = self._job(tree, self.model.params, phases.embedded(part))
      self.embedded[part] = embeddings.pooled(job, self.splits[part], below)
    found = self.embedded[part][pooling]
    return found[self.rows[part]] if part in self.rows else found

  def pooled_rows(self, part: str, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Pooled last hidden states of some examples of a part at the base model, all layers run and nothing kept."""
    job = self._job(embeddings.above_all(self.model.config.num_layers), self.model.params, "")
    quiet = dataclasses.replace(job, track=lambda source, _: source)
    return embeddings.pooled(quiet, self.splits[part].take(rows))


@functools.cache
def _code() -> str:
  """Names the programs that make hidden states: between two versions what they compute may have been mended."""
  digest = hashlib.sha256()
  for module in (decoder, quantisation):  # their rooms
    for file in sorted(pathlib.Path(module.__file__).parent.glob("*.py")):
      digest.update(f"{file.name} {files.file_sha256(file)}\n".encode())
  return digest.hexdigest()


def _below_hash(params: Any, tree: subtree.Subtree, base: Any) -> str:
  """Names the weights under the boundary: "base" when they are the base model's, else their hash."""
  if params is base:
    return "base"
  first = lambda layers: quantisation.tree_map(lambda leaf: leaf[: tree.boundary], layers)  # noqa: E731
  below = lambda whole: [whole["embed"], first(whole["layers"])]  # noqa: E731
  ours, theirs = jax.tree.leaves(below(params)), jax.tree.leaves(below(base))
  if len(ours) == len(theirs) and all(bool(jnp.array_equal(a, b)) for a, b in zip(ours, theirs, strict=True)):
    return "base"
  return resumable.tree_sha256(ours)
