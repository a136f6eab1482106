"""A fitted EK-FAC on disk: plain arrays with a checksum (`shards.pack`), tied to what it was fitted from by a hash."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from in2core_jax.errors import UserError
from in2core_jax.ihvp import ekfac
from in2core_jax.ihvp.ekfac import FIELDS, Ekfac, EkfacSettings, Factor, Source
from in2core_jax.parallel import processes
from in2core_jax.runs import files, resumable, shards

log = logging.getLogger(__name__)

FORMAT = "in2core_jax ekfac 2"
_MAGIC = f"{FORMAT} ".encode()


def identity_of(source: Source, key: jax.Array, settings: EkfacSettings, data: Mapping[str, Any]) -> str:
  """sha256 of everything that a fit depends on: settings, label key, all parameters bit for bit, and the data.

  Args:
    source: parameters; its functions and batches are not hashed.
    key: PRNG key given to `fit`.
    settings: given to `fit`.
    data: what names model and examples, with a JSON form: model config, subtree, hash of the data file, example ids.
  """
  return files.hash_of(
    {
      "format": FORMAT,
      "settings": dataclasses.asdict(settings),
      "key": np.asarray(jax.random.key_data(key)),
      "parameters": resumable.tree_sha256((source.sub, source.frozen)),
      "data": dict(data),
    }
  )


def save(path: epath.PathLike, fitted: Ekfac, identity: str) -> None:
  """Writes a fit, whole or not at all; the same fit gives the same bytes. Collective: the writer writes."""
  arrays = {f"{leaf}|diagonal": processes.to_host(values) for leaf, values in fitted.diagonals.items()}
  for leaf, factor in fitted.factors.items():
    arrays |= {f"{leaf}|{name}": processes.to_host(getattr(factor, name)) for name in FIELDS}
  if not processes.is_writer():
    return
  files.write_bytes(path, shards.pack(_MAGIC, {"identity": identity, "info": fitted.info}, arrays))


def load(path: epath.PathLike, identity: str) -> Ekfac:
  """Reads a fit again.

  Args:
    path: file of `save`.
    identity: hash of what the fit must have been made from (`identity_of`).

  Raises:
    UserError: no such file, a damaged or foreign one, or one that was fitted from something else.
  """
  try:
    header, arrays = shards.unpack(_MAGIC, epath.Path(path).read_bytes())
  except (OSError, shards.DamagedError) as error:
    raise UserError(f"{path} is no readable EK-FAC file ({error}): remove it and fit again") from error
  if header["identity"] != identity:
    raise UserError(
      f"{path} was fitted from other weights, data or settings (hash {header['identity'][:12]}, "
      f"wanted {identity[:12]}): remove it and fit again"
    )
  parts: dict[str, dict[str, jax.Array]] = {}
  for name, values in arrays.items():
    leaf, _, field = name.rpartition("|")
    parts.setdefault(leaf, {})[field] = jnp.asarray(values)
  diagonals = {leaf: part["diagonal"] for leaf, part in parts.items() if "diagonal" in part}
  factors = {leaf: Factor(**part) for leaf, part in parts.items() if "diagonal" not in part}
  return Ekfac(factors, diagonals, header["info"])


def stored_fit(folder: epath.PathLike, data: Mapping[str, Any]) -> Callable[[Source, jax.Array, EkfacSettings], Ekfac]:
  """An `ekfac.fit` that keeps its results in a folder and takes them from there, by identity.

  A damaged or foreign file is never trusted: it is told in a warning, fitted again and replaced.

  Args:
    folder: of files IDENTITY.ekfac; made when needed.
    data: names model and examples, as in `identity_of`.
  """

  def fit(source: Source, key: jax.Array, settings: EkfacSettings) -> Ekfac:
    identity = identity_of(source, key, settings, data)
    path = epath.Path(folder) / f"{identity[:16]}.ekfac"
    fitted = None
    if processes.from_writer(path.exists()):
      try:
        fitted = load(path, identity)
      except UserError as error:
        log.warning("EK-FAC is fitted again: %s", error)
    if processes.all_true(fitted is not None):  # fitting is a collective: all do it, or none
      log.info("EK-FAC: factors of an earlier fit, %s", path)
      return fitted
    fitted = ekfac.fit(source, key, settings)
    save(path, fitted, identity)
    return fitted

  return fit
