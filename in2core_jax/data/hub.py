"""Data sets and models of the Hugging Face Hub: their files in the library's own cache, fetched where that is allowed.

Nothing is fetched unless HF_HUB_OFFLINE=0 is set: `run.sh` sets 1. Cache, token and endpoint are the library's
(HF_HOME, HF_TOKEN, HF_ENDPOINT). No code of a repository is run.
"""

from __future__ import annotations

import functools
import logging
import pathlib
import re
from collections.abc import Iterable, Sequence

from in2core_jax.data.file_kinds import DataFile, check_data_file
from in2core_jax.data.folders import DATA_PATTERNS, found_in, split_of, words_of_split
from in2core_jax.errors import UserError, how_many, one_line, printable

log = logging.getLogger(__name__)

_REPO = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?P<words>(?:/[^/@]+)*)(?:@(?P<revision>.+))?")
_MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
_SHARD = re.compile(r"[-_.]?(?P<number>\d+)(?:-of-(?P<count>\d+))?$")
_FETCH = "HF_HUB_OFFLINE=0 in front of the command fetches it"


def hub_data(place: str) -> list[DataFile]:
  """The files of a data set, or of a part of it.

  Args:
    place: `ORG/NAME[/CONFIG][/SPLIT][@REVISION]`: words that name a folder, a file or a split.

  Raises:
    UserError: not in the cache and not to be fetched, no data files, or several sets of them.
  """
  repo, words, revision = _taken_apart(f"hub:{place}", place)
  patterns = [f"*{word}{end}" for word in (words_of_split(words[-1]) if words else [""]) for end in DATA_PATTERNS]
  folder = _snapshot(f"hub:{place}", repo, "dataset", revision, tuple(patterns))
  files, _ = found_in(folder)
  relative = {file.relative_to(folder): file for file in files}
  chosen = list(relative)
  for word in words:
    chosen = _of_word(chosen, word)
  sets = sorted({_set_of(path) for path in chosen})
  if not sets:
    there = ", ".join(sorted({_set_of(path) for path in relative})[:8])
    what = f"no files of {'/'.join(words)}; it has {there}" if there else "no data files; no code of a data set is run"
    raise UserError(printable(f"hub:{place} has {what}"))
  if len(sets) > 1:
    named = ", ".join(sets[:8]) + (", ..." if len(sets) > 8 else "")
    raise UserError(printable(f"hub:{place} holds several sets of files: {named}; name one: hub:{repo}/{sets[0]}"))
  _check_shards(place, chosen)
  shown = f"hub:{repo}@{folder.name}"
  return [check_data_file(relative[path], f"{shown}/{path}") for path in sorted(chosen)]


def hub_model(place: str) -> pathlib.Path:
  """The folder of a model, `ORG/NAME[@REVISION]`; raises as `hub_data`."""
  repo, words, revision = _taken_apart(f"--model=hub:{place}", place)
  if words:
    raise UserError(f"--model=hub:{place}: write hub:ORG/NAME or hub:ORG/NAME@REVISION")
  folder = _snapshot(f"--model=hub:{place}", repo, "model", revision, _MODEL_FILES)
  if not (folder / "config.json").exists():
    raise UserError(f"--model=hub:{place} has no config.json; for GGUF files, fetch one and give gguf:FILE")
  return folder


def _taken_apart(shown: str, place: str) -> tuple[str, list[str], str | None]:
  found = _REPO.fullmatch(place)
  if not found:
    raise UserError(f"{shown} is no name on the Hub; write hub:ORG/NAME, for data also hub:ORG/NAME/SPLIT")
  return found["repo"], [word for word in found["words"].split("/") if word], found["revision"]


@functools.cache
def _snapshot(shown: str, repo: str, kind: str, revision: str | None, patterns: tuple[str, ...]) -> pathlib.Path:
  """The folder of one commit; a moving name such as `main` is resolved once in a process."""
  import huggingface_hub
  from huggingface_hub import errors

  try:
    found = huggingface_hub.snapshot_download(repo, repo_type=kind, revision=revision, allow_patterns=list(patterns))
  except errors.HFValidationError as error:
    raise UserError(f"{shown} is no name on the Hub ({_line(error)})") from error
  except errors.GatedRepoError as error:
    raise UserError(f"{shown} is gated: accept its terms on the Hub, and set HF_TOKEN to your token") from error
  except errors.RepositoryNotFoundError as error:
    raise UserError(f"{shown}: no such {kind}, or a private one: mend the name, or set HF_TOKEN") from error
  except errors.RevisionNotFoundError as error:
    raise UserError(f"{shown}: it has no revision {revision!r}; leave it out for the newest one") from error
  except errors.IncompleteSnapshotError as error:
    raise UserError(f"{shown} is in the Hub's cache only in part; {_FETCH}") from error
  except errors.LocalEntryNotFoundError as error:
    raise UserError(f"{shown} is not in the Hub's cache ({_cache()}); {_FETCH}") from error
  except OSError as error:
    raise UserError(f"{shown} cannot be fetched ({_line(error)})") from error
  folder = pathlib.Path(found)
  log.info("%s is commit %s", printable(shown), folder.name)
  return folder


def commits_of(sources: Iterable[str]) -> list[str]:
  """`hub:ORG/NAME@COMMIT` of each data set that records are of, by their `Record.source`."""
  found = (re.match(r"hub:[\w.-]+/[\w.-]+@\w+", source) for source in set(sources))
  return sorted({match[0] for match in found if match})


def _cache() -> str:
  from huggingface_hub import constants

  return constants.HF_HUB_CACHE


def _line(error: Exception) -> str:
  return printable(one_line(error))


def _set_of(path: pathlib.PurePath) -> str:
  """The files that belong together: a path without the number of its shard and, where that is all, its name."""
  stem = _SHARD.sub("", path.name.partition(".")[0])
  return str(path.parent / stem) if stem else str(path.parent)


def _of_word(paths: Sequence[pathlib.PurePath], word: str) -> list[pathlib.PurePath]:
  """The paths that a word names, by the first of these that names any: file, folder, name without shard, split."""
  by_rule = (
    [path for path in paths if path.name == word],
    [path for path in paths if word in path.parts[:-1]],
    [path for path in paths if pathlib.PurePath(_set_of(path)).name == word],
    [path for path in paths if split_of(path) and split_of(path) == split_of(pathlib.PurePath(word))],
  )
  return next(filter(None, by_rule), [])


def _check_shards(place: str, paths: Sequence[pathlib.PurePath]) -> None:
  """Refuses a set of which files are missing, as their names tell."""
  found = [_SHARD.search(path.name.partition(".")[0]) for path in paths]
  counts = {int(shard["count"]) for shard in found if shard and shard["count"]}
  if counts and counts != {len(paths)}:
    raise UserError(
      f"hub:{place}: {how_many(len(paths), f'of {max(counts)} files [is|are]')} in the Hub's cache; {_FETCH}"
    )
