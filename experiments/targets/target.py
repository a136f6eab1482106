"""What examples are wanted for: sources or topics of a pool, with their queries and test examples."""

import dataclasses
import pathlib

import numpy as np

from in2core_jax.data import tokenizing
from in2core_jax.data.sources import name_of


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
  """What examples are wanted for.

  Attributes:
    name: sources or topics, joined by +.
    queries: int, rows of the evaluation set.
    tests: int, rows of the test set.
    mine: bool [N], which training examples are of it.
  """

  name: str
  queries: np.ndarray
  tests: np.ndarray
  mine: np.ndarray


def labels_of(record: tokenizing.Record) -> set[str]:
  """The names by which a target may ask for a record: its topic, and its source without folder and ending."""
  return {record.topic, label_of(name_of(record))} - {""}


def label_of(source: str) -> str:
  """A source's name, of a file without folder and ending."""
  return pathlib.PurePath(source).name.partition(".")[0]


def size_of(budget: float, examples: int) -> int:
  """How many examples a budget, a share of the pool, is."""
  return max(1, round(budget * examples))
