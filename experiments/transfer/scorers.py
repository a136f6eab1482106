"""The models that select, and what their choices are held against."""

import dataclasses

# What a choice is held against beside full data and random sets: what length or dropped copies alone would give.
AS_LONG = "random, as long"


COPIES_LAST = "random, copies last"


LONGEST = "longest"


@dataclasses.dataclass(frozen=True)
class Scorer:
  """A model that selects.

  Attributes:
    model: word of --model.
    layers: word of --layers, of its own layers.
    trains: word of --trainable_layers, for the training before it scores.
    rate: --learning_rate of that training.
  """

  model: str
  layers: str
  trains: str
  rate: float
