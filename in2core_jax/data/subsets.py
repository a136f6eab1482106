"""Which records a part keeps: topics, limits, copies; and rows in an order that does not depend on reading."""

import hashlib
import logging
from collections.abc import Mapping, Sequence

import numpy as np

from in2core_jax.data import sources, tokenizing
from in2core_jax.data.ragged import taken
from in2core_jax.data.records import content_digests, firsts, ids_of, topics_of
from in2core_jax.errors import UserError, how_many

log = logging.getLogger(__name__)

PARTS = ("train", "eval", "test")


def refuse_empty(parts: Mapping[str, list], given: Mapping[str, list], how: str, judged_by: str) -> None:
  """Refuses a part that a split has left without a record.

  Args:
    parts: the records of each part.
    given: those that the part is split off from.
    how: they are split, in words.
    judged_by: the flag of the source of evaluation and test set.
  """
  for part in PARTS:
    if not parts[part]:
      flag = judged_by if part != "train" else "--train_data"
      shared = [name for name in PARTS if given[name] is given[part] and parts[name]]
      others = ", ".join(f"{len(parts[name]):,} to {name}" for name in shared)
      if part == "train":
        own = "give more records, or another --split"
      elif judged_by == "--eval_data":  # it has two halves whatever --split is
        own = "give more of them, or --eval_data and --test_data both"
      else:
        own = f"give --{part}_data, more records, or another --split"
      raise UserError(
        f"the {part} set is empty: of the {how_many(len(given[part]), 'record')} of {flag} none went to it by {how} "
        f"({others}); {own}"
      )


def of_topics(records: Sequence, part: str, topics: list[str]) -> Sequence:
  """The records of some topics.

  Raises:
    UserError: a topic that none of them has.
  """
  found = topics_of(records)
  known = set(found)
  missing = [topic for topic in topics if topic not in known]
  if missing:
    there = ", ".join(sorted(known - {""}))
    there = f"its topics: {there}" if there else "its records have no topic, source or category"
    raise UserError(f"--eval_topics: the {part} set has nothing of {missing[0]!r}; {there}")
  return taken(records, np.flatnonzero([topic in topics for topic in found]))


def limited(records: Sequence, part: str, limit: int, block: int) -> Sequence:
  """The records of `limited_rows`."""
  rows = limited_rows(records, part, limit, block)
  return taken(records, rows) if len(rows) < len(records) else records


def limited_rows(records: Sequence, part: str, limit: int, block: int) -> np.ndarray:
  """A block of `limit` records in the order of their ids' hashes, in source order; all records if limit is 0.

  The same ones whatever the order of the file; of copies in several blocks, the first block keeps its own.

  Raises:
    UserError: there are no records left for this block.
  """
  if block and not limit:
    raise UserError(f"--limit_block={block} goes with --{part}_limit, how many examples a block has")
  if block and len(records) <= block * limit:
    raise UserError(
      f"--limit_block={block}: the {part} set has {how_many(len(records), 'example')}, which the blocks of "
      f"--{part}_limit={limit} before it use up; the last block is {max(0, (len(records) - 1) // limit)}"
    )
  if not limit or len(records) <= limit:
    return np.arange(len(records))
  digests = (hashlib.sha256(f"limit/{name}".encode()).digest() for name in ids_of(records))
  order = np.argsort(np.fromiter(digests, "S32", len(records)), kind="stable")
  kept = np.sort(order[block * limit : (block + 1) * limit])
  if not block:
    return kept
  # A copy of one of those before has an id of its own.
  before, content = order[: block * limit], content_digests(records)
  return kept[~np.isin(content[kept], content[before])]


def limit_sources(records: Sequence, limits: Sequence[int]) -> Sequence:
  """At most so many records of each source (--source_limits), drawn as `limited` draws them, in source order.

  Raises:
    UserError: not a number for each source of --train_data.
  """
  of = sources.names_of(records)
  names = list(dict.fromkeys(of))
  if len(limits) != len(names) or min(limits) < 0:
    given = ",".join(map(str, limits))
    raise UserError(
      f"--source_limits={given}: need {how_many(len(names), 'number')} of at least 0, one for each source that "
      f"training examples come from: {', '.join(names)}"
    )
  kept = []
  for name, limit in zip(names, limits, strict=True):
    own = np.flatnonzero([one == name for one in of])
    kept.append(own[limited_rows(taken(records, own), "train", limit, 0)])
  return taken(records, np.sort(np.concatenate(kept)))


def without_copies(records: Sequence) -> Sequence:
  """The first record of each set of messages, in source order; tells how many others there were."""
  distinct = taken(records, np.flatnonzero(firsts(records)))
  log.info(
    "--dedup: %s of the %s training examples repeat an earlier one and are left out",
    f"{len(records) - len(distinct):,}",
    f"{len(records):,}",
  )
  return distinct


def by_id(dataset: tokenizing.TokenizedDataset, kept: np.ndarray) -> np.ndarray:
  """The rows where `kept` (bool [N]) holds, in the order of their ids: what takes turns does not depend on reading."""
  ids = dataset.ids
  return np.array(sorted(np.flatnonzero(kept), key=lambda row: ids[row]), np.int64)


def distinct_points(points: tokenizing.TokenizedDataset) -> np.ndarray:
  """For each example the first one with the same tokens, as far as they are read: int [N]."""
  first: dict[bytes, int] = {}
  keys = (tokens.tobytes() + mask.tobytes() for tokens, mask in zip(points.tokens, points.response_mask, strict=True))
  return np.array([first.setdefault(key, row) for row, key in enumerate(keys)], np.int64)
