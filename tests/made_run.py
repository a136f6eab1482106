"""A made-up `select` run for the tests of its report: every number is drawn, nothing is trained."""

import numpy as np

from in2core_jax.data import summaries, tokenizing
from in2core_jax.data.records import Record
from in2core_jax.report.facts import SelectRun

TOPICS = ("letters", "numbers", "")


def make_record(number: int, prompt: str, response: str, topic: str = "") -> Record:
  messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": response})
  return Record(f"example-{number}", messages, topic, "{}", "made.jsonl", number + 1)


def words(rng: np.random.Generator, count: int) -> str:
  return " ".join(f"w{word}" for word in rng.integers(0, 10_000, count))


def make_records(count: int, seed: int = 0, length: int = 30) -> list[Record]:
  """Prompts of 8 words, responses of 1 to `length`; example `i` says "number i" so that a search finds it."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, length + 1, count)
  text = words(rng, int(lengths.sum()) + 8 * count).split(" ")
  records, at = [], 0
  for i, size in enumerate(lengths.tolist()):
    prompt, response, at = text[at : at + 8], text[at + 8 : at + 8 + size], at + 8 + size
    records.append(make_record(i, f"number {i} " + " ".join(prompt), " ".join(response), TOPICS[i % 3]))
  return records


def make_run(records: list[Record], /, num_queries: int = 0, **changes) -> SelectRun:
  """Scores of a heavy tail, the top half selected; with `num_queries` also layers and scores of each query."""
  rng = np.random.default_rng(1)
  size = len(records)
  influence = rng.standard_t(4, size).astype(np.float32)
  rank = np.empty(size, np.int64)
  rank[np.argsort(-influence, kind="stable")] = np.arange(1, size + 1)
  responses = np.array([len(record.messages[-1]["content"].split()) for record in records], np.int32)
  columns = {
    "example_id": np.array([record.example_id for record in records], dtype=object),
    "influence": influence,
    "rank": rank,
    "selected": rank <= size // 2,
    "loss": rng.random(size).astype(np.float32),
    "num_tokens": responses + 12,
    "num_response_tokens": responses,
    "topic": np.array([record.topic for record in records], dtype=object),
  }
  queries = make_records(num_queries, seed=2)
  tokens = tuple(np.zeros(n + 12, np.int32) for n in responses.tolist())
  masks = tuple(np.arange(n + 12) >= 12 for n in responses.tolist())
  truncated = np.arange(size) % 7 == 0
  train = tokenizing.TokenizedDataset("train", tuple(records), tokens, masks, truncated)
  parts = {"train": train}
  if num_queries:
    parts["eval"] = tokenizing.TokenizedDataset(
      "eval", tuple(queries), tokens[:num_queries], masks[:num_queries], truncated[:num_queries]
    )
  given = {
    "columns": columns,
    "records": records,
    "truncated": truncated,
    "data": summaries.data_summary(parts),
    "summary": make_summary(),
    "layers": {"layer 3": 0.25 * influence, "layer 4": 0.75 * influence} if num_queries else None,
    "query_records": queries,
    "queries": (influence + rng.standard_normal((num_queries, size))).astype(np.float32) if num_queries else None,
  }
  return SelectRun(**(given | changes))


def make_summary(**changes) -> dict:
  """The parts of summary.json that the report reads, and two that it must not show."""
  summary = {
    "policy": "proponents",
    "unit": "loss",
    "solver": {"solver": "lissa", "damping": 0.1, "converged": False},
    "solver_steps": 30,
    "solver_residual": 0.2,
    "solver_curve": [[1, [0.9]], [10, [0.5]], [30, [0.2]]],
    "warnings": ["Topic 'x' is almost dropped."],
    "seconds": {"scores": 123.456},
    "devices": {"machine": "some-machine"},
    "identity": {
      "flags": {"seed": 0, "damping": None, "train_data": "jsonl:made.jsonl"},
      "model_hash": "ab" * 32,
      "data": {"train": "cd" * 32, "eval": "ef" * 32},
      "version": "0.3.0",
    },
  }
  return summary | changes
