"""Every number that a flag may be given: in its range, or refused in one line."""

import dataclasses
import itertools

import pytest
from absl import flags as absl_flags

from experiments import flags
from in2core_jax.errors import UserError
from in2core_jax.pipeline import ranges
from in2core_jax.pipeline.settings import Settings
from in2core_jax.training.recipe import steps_for

FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
NUMERIC = [name for name, field in FIELDS.items() if field.metadata["kind"] in (int, float)] + ["batch_tokens"]
EDGES = (
  *("inf", "-inf", "nan", "-1", "0", "1", "0.5", "1e400", "-0.0", "", "text", "1e-400"),
  *(str(2**power + more) for power in (31, 32, 53, 62, 63, 64) for more in (-1, 0)),
  "9" * 5000,
)


@pytest.fixture
def read(monkeypatch):
  """Parses a command line as a command does."""
  own = absl_flags.FlagValues()
  monkeypatch.setattr(absl_flags, "FLAGS", own)
  for name in ("DEFINE_enum", "DEFINE_bool", "DEFINE_integer", "DEFINE_float", "DEFINE_string"):
    make = getattr(absl_flags, name)
    monkeypatch.setattr(absl_flags, name, lambda *a, make=make, **k: make(*a, **k | {"flag_values": own}))
  flags.define()

  def parse(*line):
    own.unparse_flags()
    for name in FIELDS:
      own[name].unparse()
    own(["command", *line])
    return flags.read()

  return parse


def test_every_number_has_a_range_and_its_default_is_in_it():
  assert set(NUMERIC) == set(ranges.NUMBERS)
  ranges.check(dataclasses.asdict(Settings()))
  assert set(ranges.LISTS) | set(ranges.WORDS) <= set(FIELDS)


def test_what_is_accepted_is_in_the_range_and_the_rest_is_one_line(read):
  accepted = {}
  for name, text in itertools.product([*NUMERIC, *ranges.LISTS], EDGES):
    try:
      settings = read(f"--{name}={text}")
    except (UserError, absl_flags.Error) as error:
      assert name in str(error) and len(str(error)) < 6000, (name, text)
      continue
    accepted.setdefault(name, []).append(text)
    value = getattr(settings, name)
    if name in ranges.NUMBERS and not isinstance(value, str):
      assert ranges.NUMBERS[name].holds(value), (name, text)
  assert set(accepted) >= set(NUMERIC) - {"token_budget"}
  numbers = (text for texts in accepted.values() for text in texts)
  assert not {"inf", "-inf", "1e400", "9" * 5000} & set(numbers)
  assert {name for name, texts in accepted.items() if "nan" in texts} == {"damping", "scale"}
  assert {name for name, texts in accepted.items() if str(2**62) in texts} == {"scale"}  # a float is fine so large


@pytest.mark.parametrize(
  ("flag", "words"),
  [
    ("--damping=inf", "--damping=inf must be a number that is at least 0 and at most 1000000000"),
    (f"--seed={2**32}", f"--seed={2**32} must be a number that is at least 0 and at most {2**32 - 1}"),
    (f"--seed={2**63}", "--seed="),
    (f"--steps={2**62}", "at most 10000000"),
    (f"--seeds=0,{2**32}", f"'{2**32}' is wrong in this list of whole numbers"),
    ("--seeds=1,1", "a seed is given twice"),
    ("--fractions=0.5,nan", "'nan' is wrong in this list of numbers"),
    ("--fraction=0", "above 0 and at most 1"),
    (f"--mesh=data:{2**62}", "more than 9 digits"),
    (f"--layers=last:{'9' * 5000}", "more than 9 digits"),
    (f"--batch_tokens={2**62}", "--batch_tokens"),
    ("--run_dir=a\0b", r"a\\x00b holds a NUL"),
  ],
)
def test_the_message_has_name_value_and_range(read, flag, words):
  with pytest.raises(UserError, match=words):
    read(flag)


def test_learning_for_ever_is_refused():

  assert steps_for(100, 10, 2.0) == 20
  with pytest.raises(UserError, match="--epochs=1000000.0 of 1,000 examples are"):
    steps_for(1000, 1, 1e6)
