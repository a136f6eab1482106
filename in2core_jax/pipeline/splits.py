"""From sources to the three parts: train, eval, test."""

import functools
import hashlib
import logging

import numpy as np

from in2core_jax.data import sources, tokenizing
from in2core_jax.data.records import BadRecords, firsts
from in2core_jax.errors import UserError
from in2core_jax.pipeline.settings import Settings, integers

log = logging.getLogger(__name__)


PARTS = ("train", "eval", "test")


def split_sources(s: Settings, bad: BadRecords | None = None) -> dict[str, list[tokenizing.Record]]:
  """Records of the three parts; what has no source of its own is split off by a hash of the content.

  Args:
    s: the flags of the data.
    bad: gets the records that cannot be read; None: they are an error.

  Raises:
    UserError: whatever is wrong with the flags or the sources, or a part that gets nothing.
  """
  try:
    shares = tuple(float(part) for part in s.split.split(","))
  except ValueError:
    raise UserError(f"--split={s.split} is not a list of three shares such as 0.7,0.15,0.15") from None
  if len(shares) != 3:
    raise UserError(f"--split={s.split} has {len(shares)} shares, not three (train, eval, test)")
  if not min(shares) >= 0 or not abs(sum(shares) - 1) <= 1e-6:
    raise UserError(f"--split={s.split}: the three shares must be at least 0 and add up to 1, such as 0.7,0.15,0.15")
  named = [spec for spec in (s.train_data, s.eval_data, s.test_data) if spec]
  some = any(sources.has_columns(spec) for spec in named)  # else --data_fields is refused, not ignored
  fields = {spec: s.data_fields if sources.has_columns(spec) or not some else None for spec in named}
  sources.check_fields(s.data_fields, named)
  read = functools.cache(lambda spec: tokenizing.load_records(spec, fields[spec] or None, bad))
  train = read(s.train_data)
  given = {"train": train}
  if s.eval_data and s.test_data:
    return {"train": train, "eval": read(s.eval_data), "test": read(s.test_data)}
  if s.eval_data:
    whole = read(s.eval_data)
    _, first, second = tokenizing.split_records(whole, (0.0, 0.5, 0.5))
    parts, how = {"train": train, "eval": first, "test": second}, "its two halves, by a hash of the messages"
    given |= dict.fromkeys(("eval", "test"), whole)
  elif s.test_data:
    keep = shares[0] + shares[2]
    first, second, _ = tokenizing.split_records(train, (keep, 1 - keep, 0.0))
    parts, how = {"train": first, "eval": second, "test": read(s.test_data)}, f"--split={s.split}"
    given |= {"eval": train, "test": parts["test"]}
  else:
    parts, how = dict(zip(PARTS, tokenizing.split_records(train, shares), strict=True)), f"--split={s.split}"
    given = dict.fromkeys(PARTS, train)
  for part in PARTS:
    if not parts[part]:
      flag = "--eval_data" if s.eval_data and part != "train" else "--train_data"
      shared = [name for name in PARTS if given[name] is given[part] and parts[name]]
      others = ", ".join(f"{len(parts[name]):,} to {name}" for name in shared)
      own = f"give --{part}_data, or another --split" if part != "train" else "give another --split"
      raise UserError(
        f"the {part} set is empty: of the {len(given[part]):,} records of {flag} none went to it by {how} ({others}); "
        f"{own}"
      )
  return parts


def of_topics(records: list, part: str, topics: list[str]) -> list:
  """The records of some topics.

  Raises:
    UserError: a topic that none of them has.
  """
  known = {record.topic for record in records}
  missing = [topic for topic in topics if topic not in known]
  if missing:
    there = ", ".join(sorted(known - {""})) or "none"
    raise UserError(f"--eval_topics: the {part} set has nothing of {missing[0]!r}; its topics: {there}")
  return [record for record in records if record.topic in topics]


def limited(records: list, part: str, limit: int, block: int) -> list:
  """A block of `limit` records in the order of their ids' hashes, in source order; all records if limit is 0.

  The same ones whatever the order of the file; of copies in several blocks, the first block keeps its own.

  Raises:
    UserError: there are no records left for this block.
  """
  if block and not limit:
    raise UserError(f"--limit_block={block} goes with --{part}_limit, how many examples a block has")
  if block and len(records) <= block * limit:
    raise UserError(
      f"--limit_block={block}: the {part} set has {len(records)} examples, which the blocks of --{part}_limit={limit} "
      f"before it use up; the last block is {max(0, (len(records) - 1) // limit)}"
    )
  if not limit or len(records) <= limit:
    return records
  digests = [hashlib.sha256(f"limit/{record.example_id}".encode()).digest() for record in records]
  order = sorted(range(len(records)), key=digests.__getitem__)
  before = {records[i].content_key for i in order[: block * limit]}  # a copy of one of them has an id of its own
  kept = sorted(order[block * limit : (block + 1) * limit])
  return [records[i] for i in kept if records[i].content_key not in before]


def limit_sources(records: list, s: Settings) -> list:
  """At most as many records of each source as --source_limits says, drawn as `limited` draws them, in source order.

  Raises:
    UserError: not a number for each source of --train_data.
  """
  if not s.source_limits.strip():
    return records
  limits = integers(s.source_limits, "source_limits")
  names = list(dict.fromkeys(sources.name_of(record.source) for record in records))
  if len(limits) != len(names) or min(limits) < 0:
    raise UserError(
      f"--source_limits={s.source_limits}: need {len(names)} numbers of at least 0, one for each source that training "
      f"examples come from: {', '.join(names)}"
    )
  limit_of = dict(zip(names, limits, strict=True))
  kept = {
    id(record)
    for name in names
    for record in limited([one for one in records if sources.name_of(one.source) == name], "train", limit_of[name], 0)
  }
  return [record for record in records if id(record) in kept]


def without_copies(records: list) -> list:
  """The first record of each set of messages, in source order; tells how many others there were."""
  distinct = [record for record, first in zip(records, firsts(records), strict=True) if first]
  log.info(
    "--dedup: %s of the %s training examples repeat an earlier one and are left out",
    f"{len(records) - len(distinct):,}",
    f"{len(records):,}",
  )
  return distinct


def by_id(dataset: tokenizing.TokenizedDataset, kept: np.ndarray) -> np.ndarray:
  """The rows where `kept` (bool [N]) holds, in the order of their ids: what takes turns does not depend on reading."""
  return np.array(sorted(np.flatnonzero(kept), key=lambda row: dataset.ids[row]), np.int64)


def distinct_points(points: tokenizing.TokenizedDataset) -> np.ndarray:
  """For each example the first one with the same tokens, as far as they are read: int [N]."""
  first: dict[bytes, int] = {}
  keys = (tokens.tobytes() + mask.tobytes() for tokens, mask in zip(points.tokens, points.response_mask, strict=True))
  return np.array([first.setdefault(key, row) for row, key in enumerate(keys)], np.int64)
