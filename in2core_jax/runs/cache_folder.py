"""Where compiled programs and other things that may be lost are kept."""

from __future__ import annotations

import os
from pathlib import Path

from in2core_jax.errors import UserError


def cache_folder() -> Path:
  """A place on a local disk for what can be made again: IN2CORE_CACHE, or ~/.cache/in2core_jax.

  Raises:
    UserError: this user has no home folder.
  """
  given = os.environ.get("IN2CORE_CACHE")
  try:
    return Path(given).expanduser() if given else Path.home() / ".cache" / "in2core_jax"
  except RuntimeError as error:
    raise UserError("this user has no home folder: set IN2CORE_CACHE to a folder that can be written") from error
