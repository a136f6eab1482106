"""From sources to the three parts: train, eval, test."""

import collections.abc
import contextlib
import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from in2core_jax.data import sources, summaries, tokenizing
from in2core_jax.data.records import BadRecords, Raws, first_pair, first_weighted
from in2core_jax.data.subsets import PARTS, limit_sources, limited, of_topics, refuse_empty, without_copies
from in2core_jax.errors import UserError, how_many
from in2core_jax.model import hidden_cache, rotary
from in2core_jax.model.config import ModelConfig
from in2core_jax.pipeline.lists import in_order
from in2core_jax.pipeline.settings import Settings, integers, listed
from in2core_jax.runs import run_folder
from in2core_jax.runs.progress import Progress

log = logging.getLogger(__name__)

_MANY = 20_000  # records that take so long to tokenise that progress is shown


@dataclasses.dataclass(frozen=True, eq=False)
class Splits(collections.abc.Mapping):
  """Records and tokens of the training, evaluation and test set: a mapping from `PARTS`.

  Attributes:
    datasets: part -> its examples.
    skipped: the records that could not be used; None where nothing was read.
    halved: whether evaluation and test set are the halves of --eval_data, which the summary says.
  """

  datasets: Mapping[str, tokenizing.TokenizedDataset]
  skipped: BadRecords | None = None
  halved: bool = False

  def __getitem__(self, part: str) -> tokenizing.TokenizedDataset:
    return self.datasets[part]

  def __iter__(self) -> Iterator[str]:
    return iter(self.datasets)

  def __len__(self) -> int:
    return len(self.datasets)

  def with_parts(self, **datasets: tokenizing.TokenizedDataset) -> "Splits":
    """The same with other examples in some parts."""
    return dataclasses.replace(self, datasets={**self.datasets, **datasets})

  @functools.cached_property
  def summary(self) -> dict:
    """Counts of every part, duplicates, overlap, and what of the data is not used; hashes every record."""
    summary = summaries.data_summary(self.datasets)
    if self.halved:
      halves = " and ".join(f"{len(self[part]):,} of them are the {part} set" for part in ("eval", "test"))
      summary["halved"] = f"--eval_data is cut in two, because there is no --test_data: {halves}"
    return summary | ({"skipped_records": self.skipped.summary()} if self.skipped else {})

  def write_skipped(self, run_dir: run_folder.RunDir) -> None:
    """Writes the records that --skip_bad_records has left out into a run folder, where there are some."""
    if self.skipped:
      run_dir.write_text("skipped_records.jsonl", self.skipped.lines())

  @property
  def template_date(self) -> str | None:
    """The date that the chat template prints; None where it prints none."""
    return next((part.template["date"] for part in self.values() if "date" in part.template), None)

  def identity(self, *names: str) -> dict[str, str]:
    """Hashes of the parts that results depend on."""
    return {name: self._hash_of(name) for name in names}

  @functools.cached_property
  def _hash_of(self) -> Callable[[str], str]:
    return functools.cache(lambda name: _dataset_hash(self[name]))  # stages ask for it one after another


def _dataset_hash(dataset: tokenizing.TokenizedDataset) -> str:
  digest = hashlib.sha256(hidden_cache.data_hash(dataset).encode())
  texts = zip(dataset.ids, dataset.topics, Raws(dataset.records), dataset.response_mask, strict=True)
  for name, topic, raw, mask in texts:
    # The raw record and the topic too: they end up in coreset.jsonl and in quotas.
    named = "\0".join((name, topic, raw, "")).encode("utf-8", "surrogatepass")
    digest.update(named + np.packbits(mask).tobytes())
  return digest.hexdigest()


# ---- reading -------------------------------------------------------------------------


def read_records(s: Settings) -> tuple[dict[str, list[tokenizing.Record]], BadRecords]:
  """(the records of the three parts, as topics, copies and limits leave them; those that could not be read).

  Raises:
    UserError: whatever is wrong with flags or sources.
  """
  topics, limits = (
    listed(s.eval_topics),
    integers(",".join(in_order(s.source_limits, "source_limits")), "source_limits"),
  )
  records, bad = split_sources(s)
  for part in PARTS:
    if part != "train" and s.eval_topics:
      records[part] = of_topics(records[part], part, topics)
    if part == "train" and s.dedup:
      records[part] = without_copies(records[part])
    if part == "train" and s.source_limits.strip():
      records[part] = limit_sources(records[part], limits)
    records[part] = limited(records[part], part, getattr(s, f"{part}_limit"), s.limit_block)
  return records, bad


def refuse_pairs(records: Mapping[str, list[tokenizing.Record]]) -> None:
  """Refuses preference pairs, for commands that know perplexity alone.

  Raises:
    UserError: names the first pair.
  """
  for part in PARTS:
    pair = first_pair(records[part])
    if pair is not None:
      raise UserError(
        f"the {part} set has preference pairs ({pair.place}), which this command has no measure for: run finetune, "
        "select and evaluate, or name one answer with --data_fields, for example messages=chosen"
      )


def refuse_weights(records: Mapping[str, list[tokenizing.Record]]) -> None:
  """Refuses weights of training examples, for commands that would pass them over.

  Raises:
    UserError: names the first example with a weight.
  """
  found = first_weighted(records["train"])
  if found is not None:
    raise UserError(
      f"the train set has weights ({found.place} weighs {found.weight:g}), which only finetune follows: remove the "
      "key, or fine-tune on it"
    )


def tokenized_splits(
  s: Settings, config: ModelConfig, tokenizer, records: Mapping[str, list[tokenizing.Record]], bad: BadRecords
) -> Splits:
  """Tokenises the records of the three parts, and warns of what their summary finds.

  Raises:
    UserError: a record that cannot be rendered, or a part without an example or a response.
  """
  bad.looked_at = sum(map(len, records.values()))
  made = {part: tokenized(s, config, tokenizer, part, records[part], bad) for part in PARTS}
  bad.raise_if_any()
  for part, dataset in made.items():
    if not len(dataset):
      raise UserError(f"the {part} set is empty: none of its records can be used; look at the data")
    if not np.any(dataset.num_response_tokens):
      raise UserError(
        f"the {part} set has no response token within --max_length={s.max_length}: raise it or look at the data"
      )
  splits = Splits(made, bad, bool(s.eval_data and not s.test_data))
  for line in summaries.told_lines(splits.summary):
    log.warning("%s", line)
  return splits


def tokenized(
  s: Settings,
  config: ModelConfig,
  tokenizer,
  part: str,
  records: list[tokenizing.Record],
  bad: BadRecords | None = None,
) -> tokenizing.TokenizedDataset:
  """Records as a part, by the flags' template and lengths; arguments and errors of `tokenizing.tokenize`."""
  more = {"name": part, "vocab_size": config.vocab_size, "date": s.template_date, "bad": bad}
  sides = 1 + (first_pair(records) is not None)
  with contextlib.ExitStack() as shown:
    if len(records) >= _MANY:
      progress = shown.enter_context(Progress(sides * len(records), f"tokenise ({part})", "texts"))
      more["on_chunk"] = progress.update
    dataset = tokenizing.tokenize(records, tokenizer, s.max_length, s.system_prompt, **more)
  rotary.check_length(config, dataset.longest, f"the {part} set")
  return dataset


def split_sources(s: Settings) -> tuple[dict[str, list[tokenizing.Record]], BadRecords]:
  """(records of the three parts, those that could not be read and are left out by --skip_bad_records).

  What has no source of its own is split off by a hash of the content.

  Raises:
    UserError: whatever is wrong with the flags or the sources, or a part that gets nothing.
  """
  shares, bad = _split_shares(s), BadRecords(s.skip_bad_records)
  named = [spec for spec in (s.train_data, s.eval_data, s.test_data) if spec]
  some = any(sources.has_columns(spec) for spec in named)  # else --data_fields is refused, not ignored
  fields = {spec: s.data_fields if sources.has_columns(spec) or not some else None for spec in named}
  sources.check_fields(s.data_fields, named)
  read = functools.cache(lambda spec: tokenizing.load_records(spec, fields[spec] or None, bad))
  train = read(s.train_data)
  given, how = {"train": train}, ""
  if s.eval_data and s.test_data:
    parts = {"train": train, "eval": read(s.eval_data), "test": read(s.test_data)}
  elif s.eval_data:
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
  bad.raise_if_any()  # first: a part may be empty because of them
  if how:
    refuse_empty(parts, given, how, "--eval_data" if s.eval_data else "--train_data")
  return parts, bad


def _split_shares(s: Settings) -> tuple[float, ...]:
  """The shares of train, eval and test.

  Raises:
    UserError: --split does not have them.
  """
  try:
    shares = tuple(float(part) for part in s.split.split(","))
  except ValueError:
    raise UserError(f"--split={s.split} is not a list of three shares such as 0.7,0.15,0.15") from None
  if len(shares) != 3:
    raise UserError(f"--split={s.split} has {how_many(len(shares), 'share')}, not three (train, eval, test)")
  if not min(shares) >= 0 or not abs(sum(shares) - 1) <= 1e-6:
    raise UserError(f"--split={s.split}: the three shares must be at least 0 and add up to 1, such as 0.7,0.15,0.15")
  return shares
