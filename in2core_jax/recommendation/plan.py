"""What fits into the minutes: examples, rules, budgets and seeds that are tried; what is left out, in a stated order.

The plan is made before the pass of all examples through the lower layers, which it prices. A pool that is too large is
tried on a part of it, drawn at random.

The trial halves the rules: all of them at one budget with one seed, the better half with a second seed, and so on. The
finalists are trained at every budget with all seeds. At the end the chosen set is trained for the test set, and random
sets with its response lengths for both.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from in2core_jax.errors import UserError, how_many
from in2core_jax.evaluation.tries import LONGEST, MATCHED

LEAST_SEEDS, LEAST_RULES, FINALISTS = 2, 1, 2
LEAST_POOL = 200  # examples: of a smaller part nobody would believe what it says of the whole
ORDER = (
  "seeds beyond 3, the second finalist, budgets beyond 2 (the largest first). Then the pool is halved, where all of "
  "these are tried again, and so on. If that is not enough, the same once more, from the whole pool on, also without "
  "the second budget, rules (the last first), the third seed"
)
_ALWAYS = (MATCHED, LONGEST)  # besides random sets and full data
_ROOM = 1.1  # seconds asked for over seconds expected


@dataclasses.dataclass(frozen=True)
class Pace:
  """Seconds that things take on this machine.

  Attributes:
    step: of the optimiser.
    judged: losses of one model on the evaluation set. tested: on the test set.
    shared: what several rules choose by, made once.
    chosen: rule -> what it needs beyond that, for the folds of one seed.
    spent: until now, and what is always needed once.
    hidden: of the pool's hidden states, made once.
    wholes: trainings on all data that are to be done: with every example, and with each text once.
  """

  step: float
  judged: float
  tested: float
  shared: float
  chosen: Mapping[str, float]
  spent: float
  hidden: float = 0.0
  wholes: int = 2

  def of_part(self, share: float) -> "Pace":
    """The same where a share of the pool takes part."""
    chosen = {rule: share * seconds for rule, seconds in self.chosen.items()}
    return dataclasses.replace(self, shared=share * self.shared, chosen=chosen, hidden=share * self.hidden)


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is tried.

  Attributes:
    rules: that look at evaluation examples, the most promising first.
    budgets: shares of the pool, growing.
    seeds: of the finalists.
    finalists: rules that are trained at every budget.
    seconds: expected, all in all.
    dropped: what was left out, in order, in words.
    screened: the budget at which all rules are tried; 0: the middle one, the smaller of two.
    examples: of the whole pool; 0: not known, and it is never cut.
    part: share of the pool that takes part.
    all_minutes: what the same would take on the whole pool; 0 where that takes part.
  """

  rules: tuple[str, ...]
  budgets: tuple[float, ...]
  seeds: int
  finalists: int
  seconds: float = 0.0
  dropped: tuple[str, ...] = ()
  screened: float = 0.0
  examples: int = 0
  part: float = 1.0
  all_minutes: float = 0.0

  @property
  def pool(self) -> int:
    """Examples that take part."""
    return max(1, round(self.part * self.examples))

  @property
  def tried(self) -> tuple[str, ...]:
    """All that is held against random sets."""
    return (*self.rules, *_ALWAYS)

  @property
  def screening(self) -> float:
    """The budget at which all rules are tried."""
    return self.screened or self.budgets[(len(self.budgets) - 1) // 2]

  @property
  def rungs(self) -> list[int]:
    """How many rules are left with 1, 2, ... seeds at the screening budget."""
    found = [len(self.tried)]
    while found[-1] > self.finalists and len(found) < self.seeds:
      found.append(max(self.finalists, math.ceil(found[-1] / 2)))
    return found

  @property
  def tries(self) -> int:
    """Rules that the answer is picked from; a rule's budgets are looked at in turn, which costs nothing."""
    return len(self.tried)

  @property
  def left_out(self) -> str:
    """`dropped` in a few words."""
    return "; ".join(_joined(self.dropped))

  def told(self) -> str:
    """The plan in a sentence or two."""
    shares = ", ".join(f"{100 * budget:g} %" for budget in self.budgets)
    finalists = f"the best {self.finalists}" if self.finalists > 1 else "the best one"
    pool = (
      how_many(self.pool, "example") if self.part == 1 else f"{self.pool:,} of {self.examples:,} examples, at random"
    )
    said = (
      f"plan: {how_many(len(self.tried), 'rule')} ({', '.join(self.tried)}) at {100 * self.screening:g} % of {pool}, "
      f"then {finalists} at {shares} with {how_many(self.seeds, 'seed')}, besides random sets and full data: "
      f"{how_many(self.tries, 'tr[y|ies]')}, about {_minutes(self.seconds)}"
    )
    left = f" Left out to keep the time: {self.left_out}." if self.dropped else ""
    more = f" On all examples the same takes --minutes={math.ceil(self.all_minutes)}." if self.all_minutes else ""
    return f"{said}.{left}{more}"

  def as_json(self) -> dict:
    """All of it as JSON values."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, stored: Mapping) -> "Plan":
    """Inverse of `as_json`."""
    lists = {name: tuple(stored[name]) for name in ("rules", "budgets", "dropped")}
    known = {field.name: stored[field.name] for field in dataclasses.fields(cls) if field.name in stored}
    return cls(**known | lists)


def closing_seconds(plan: Plan, pace: Pace, steps_of: Callable[[float], int]) -> float:
  """Of what comes after the decision: the chosen set on the test set, random sets of its lengths on both."""
  steps = steps_of(plan.budgets[-1])
  return plan.seeds * (4 * steps * pace.step + pace.judged + 2 * pace.tested)


def seed_seconds(plan: Plan, pace: Pace, steps_of: Callable[[float], int]) -> float:
  """Of one more seed of the finalists and of random sets, at every budget."""
  guided = sum(2 * steps_of(budget) * pace.step + pace.judged for budget in plan.budgets)
  random = sum(steps_of(budget) * pace.step + pace.judged + pace.tested for budget in plan.budgets)
  return plan.finalists * guided + random + sum(pace.chosen.get(rule, 0.0) for rule in plan.rules[: plan.finalists])


def rung_seconds(plan: Plan, pace: Pace, steps_of: Callable[[float], int]) -> float:
  """Until the finalists are known: what rules choose by, their choices, trainings at the screening budget."""
  one = 2 * steps_of(plan.screening) * pace.step + pace.judged
  chosen = [pace.chosen.get(rule, 0.0) for rule in plan.rules]
  choices = sum(chosen) + sum(sum(sorted(chosen)[-count:]) for count in plan.rungs[1:])
  return pace.shared + choices + sum(count * one for count in plan.rungs)


def rest_seconds(plan: Plan, pace: Pace, steps_of: Callable[[float], int]) -> float:
  """After that, to the end."""
  one = 2 * steps_of(plan.screening) * pace.step + pace.judged
  # What the first seeds have trained at the screening budget need not be trained again.
  finals = plan.seeds * seed_seconds(plan, pace, steps_of) - len(plan.rungs) * plan.finalists * one
  return max(finals, 0.0) + closing_seconds(plan, pace, steps_of)


def seconds_of(plan: Plan, pace: Pace, steps_of: Callable[[float], int]) -> float:
  """Expected, from beginning to end.

  Args:
    plan: what is tried.
    pace: of this machine.
    steps_of: (share, part=1.0) -> optimiser steps of a training on a share of that part of the pool.
  """
  pace, steps_of = on_part(plan, pace, steps_of)
  whole = steps_of(1.0) * pace.step + pace.judged + pace.tested
  rungs, rest = rung_seconds(plan, pace, steps_of), rest_seconds(plan, pace, steps_of)
  return pace.spent + pace.hidden + pace.wholes * whole + rungs + rest


def on_part(plan: Plan, pace: Pace, steps_of: Callable[..., int]) -> tuple[Pace, Callable[[float], int]]:
  """Pace and steps where the plan's part of the pool stands for all of it."""
  return (pace, steps_of) if plan.part == 1 else (pace.of_part(plan.part), functools.partial(steps_of, part=plan.part))


def shortened(plan: Plan, pace: Pace, steps_of: Callable[[float], int], seconds: float) -> Plan:
  """The largest plan whose rest fits, once the finalists are known; the least where none does.

  Args:
    plan: that was begun.
    pace: of this machine, as it turned out.
    steps_of: as in `seconds_of`.
    seconds: that are left.
  """
  begun = dataclasses.replace(plan, screened=plan.screening, examples=0)  # neither rules nor the pool change any more
  for found in _smaller(begun, len(plan.rules)):
    if rest_seconds(found, pace, steps_of) <= seconds:
      break
  return dataclasses.replace(found, examples=plan.examples)


def fitted(wanted: Plan, pace: Pace, steps_of: Callable[[float], int], seconds: float) -> Plan:
  """The largest plan that fits; what goes first is `ORDER`.

  Args:
    wanted: everything.
    pace: of this machine.
    steps_of: as in `seconds_of`.
    seconds: that there are.

  Raises:
    UserError: not even the least plan fits; says how many minutes it takes.
  """
  for plan in _smaller(wanted):
    needed = seconds_of(plan, pace, steps_of)
    if needed * _ROOM <= seconds:
      everyone = 0.0 if plan.part == 1 else seconds_of(dataclasses.replace(plan, part=1.0), pace, steps_of)
      return dataclasses.replace(plan, seconds=needed, all_minutes=everyone * _ROOM / 60)
  pool = "" if plan.part == 1 else f" of {plan.pool:,} of the {plan.examples:,} examples"
  raise UserError(
    f"--minutes={seconds / 60:g} is too short: one rule at {100 * plan.budgets[0]:g} %{pool} with {plan.seeds} seeds, "
    f"besides random sets and full data, takes about {_minutes(needed * _ROOM)} here. Give --minutes="
    f"{math.ceil(needed * _ROOM / 60)}, a smaller pool (--train_limit), fewer evaluation and test examples "
    "(--eval_limit, --test_limit), fewer --epochs or fewer --trainable_layers"
  )


def _smaller(wanted: Plan, least_rules: int = LEAST_RULES) -> Iterator[Plan]:
  """Plans from all that is wanted to the least, in the order in which they are tried (`ORDER`)."""
  parts = [wanted.part]
  while parts[-1] / 2 * wanted.examples >= LEAST_POOL:
    parts.append(parts[-1] / 2)
  every = len(wanted.rules)
  for budgets, rules, seeds in ((2, every, 3), (1, least_rules, LEAST_SEEDS)):
    for part in parts:
      lost = (f"{100 * (1 - part):.3g} % of the pool",) if part < wanted.part else ()
      first = dataclasses.replace(wanted, part=part, dropped=(*wanted.dropped, *lost))
      yield from _fewer(first, budgets, rules, seeds)


def _fewer(plan: Plan, budgets: int, rules: int, seeds: int) -> Iterator[Plan]:
  """The plan, and each smaller than the one before, down to so many budgets, rules and seeds."""

  def without(what: str, **changes) -> Plan:
    return dataclasses.replace(plan, **changes, dropped=(*plan.dropped, what))

  yield plan
  while plan.seeds > 3:
    yield (plan := without(f"seed {plan.seeds}", seeds=plan.seeds - 1))
  if plan.finalists > 1:
    yield (plan := without("the second finalist", finalists=1))
  while len(plan.budgets) > budgets and plan.budgets[-1] > plan.screened:
    yield (plan := without(f"the budget of {100 * plan.budgets[-1]:g} %", budgets=plan.budgets[:-1]))
  while len(plan.rules) > rules:
    yield (plan := without(f"the rule {plan.rules[-1]}", rules=plan.rules[:-1]))
  while plan.seeds > seeds:
    yield (plan := without(f"seed {plan.seeds}", seeds=plan.seeds - 1))


def _joined(dropped: Sequence[str]) -> list[str]:
  """Things of a kind in one part: "the budgets of 50 % and 25 %" would need a grammar, so commas do."""
  kinds: dict[str, list[str]] = {}
  for what in dropped:
    kind = next((kind for kind in ("seed ", "the budget of ", "the rule ") if what.startswith(kind)), "")
    kinds.setdefault(kind or what, []).append(what.removeprefix(kind) if kind else "")
  plural = {"seed ": "seeds ", "the budget of ": "the budgets of ", "the rule ": "the rules "}
  return [f"{plural[kind] if len(own) > 1 else kind}{', '.join(filter(None, own))}" for kind, own in kinds.items()]


def _minutes(seconds: float) -> str:
  if seconds < 90:
    return f"{seconds:.0f} s"
  return f"{seconds / 60:.1f} minutes" if seconds < 600 else f"{seconds / 60:.0f} minutes"
