"""The rules of selection that are compared, by name: each changes one thing of another, or a few together."""

import dataclasses

from experiments.study.settings import RuleSettings
from in2core_jax.errors import UserError
from in2core_jax.pipeline.settings import Settings, listed, words


@dataclasses.dataclass(frozen=True)
class Variant:
  """A rule of selection.

  Attributes:
    policy: word of `coreset.POLICIES`.
    changes: flags that it changes.
    trained: scores and gradients at the model that was fine-tuned on all examples, not at the base model.
    copies_last: no example a second time while there is another text.
    rounds: of choosing a part and training on what is chosen so far, whose model chooses on.
    unrolled: scores are metagradients, through the training on all data.
    warm_up: gradients at so many checkpoints of a short training on a random part (matching); 0: not.
  """

  policy: str
  changes: tuple[tuple[str, object], ...] = ()
  trained: bool = False
  copies_last: bool = False
  rounds: int = 1
  unrolled: bool = False
  warm_up: int = 0

  @property
  def key(self) -> tuple:
    """Names it among what `study` keeps; False, 0.0 and 0 stand where older versions had more that could differ."""
    more = (self.rounds,) if self.rounds > 1 else ("unrolled",) if self.unrolled else ()
    more += ("warm-up", self.warm_up) if self.warm_up else ()
    return (self.policy, self.changes, self.trained, False, 0.0, 0, self.copies_last, *more)

  @property
  def order_key(self) -> tuple:
    """Names it among what `targets` keeps, as older versions did."""
    more = (self.copies_last, self.rounds, self.unrolled, self.warm_up)
    return (self.policy, self.changes, self.trained, False, 0, *more)


_OWN = {field.name for field in dataclasses.fields(Variant)}  # what of a variant is no flag


def make_variant(policy: str, **changes) -> Variant:
  """A rule: fields of `Variant`, and flags that it changes."""
  own = {name: changes.pop(name) for name in _OWN if name in changes}
  return Variant(policy, tuple(changes.items()), **own)


# Name -> what it is; the first of each family is the rule itself. The others change one thing of it, some a second with
# it: a solver has its damping.
VARIANTS = {
  "proponents": make_variant("proponents", trained=True),
  "proponents, base model": make_variant("proponents"),
  "proponents, no curvature": make_variant("proponents", trained=True, solver="identity"),
  "proponents, cg": make_variant("proponents", trained=True, solver="cg", damping_ratio=0.01),
  "random, copies last": make_variant("random", copies_last=True),
  "proponents, datainf": make_variant("proponents", trained=True, solver="datainf"),
  "proponents, quota": make_variant("topic_quota", trained=True),
  "opponents": make_variant("opponents", trained=True),
  "matching": make_variant("matching", trained=True),
  "matching, base model": make_variant("matching"),
  "matching, summed losses": make_variant("matching", trained=True, loss_reduction="sum"),
  # Scored on the first so many tokens of each example; trained on, and judged by, all that --max_length keeps.
  "matching, cut at 48": make_variant("matching", trained=True, max_length=48),
  "auto": make_variant("auto", trained=True),
  "auto, base model": make_variant("auto"),
  "hybrid": make_variant("hybrid", trained=True),
  "hybrid, base model": make_variant("hybrid"),
  "matching, hybrid, base model": make_variant("matching_hybrid"),
  "hybrid, nearest": make_variant("hybrid", aggregate="nearest"),
  "hybrid, weighted turns, base model": make_variant("hybrid", aggregate="weighted_turns"),
  "whitened cosine, base model": make_variant("whitened_cosine"),
  "whitened cosine, mean": make_variant("whitened_cosine", aggregate="mean"),
  "whitened embedding": make_variant("whitened_embedding"),
  "embedding": make_variant("embedding"),
  "embedding, in turns": make_variant("embedding", aggregate="round_robin"),
  "rds": make_variant("rds"),
  "bm25": make_variant("bm25"),
  "bm25, in turns": make_variant("bm25", aggregate="round_robin"),
  "matching per token, base model": make_variant("matching_per_token"),
  "matching in strata, base model": make_variant("matching_strata"),
  "matching, along a warm-up": make_variant("matching", warm_up=3),
  "influence distillation, base model": make_variant("distillation"),
  "matching, base model, 4 rounds": make_variant("matching", rounds=4),
  "hybrid, 4 rounds": make_variant("hybrid", rounds=4),
  "layer ranks": make_variant("layer_ranks"),
  "proponents, metagradient": make_variant("proponents", unrolled=True),
  "loss drop": make_variant("loss_drop"),
  "density": make_variant("density"),
  "length-matched random": make_variant("length_matched_random"),
  "longest": make_variant("longest"),
  "highest loss": make_variant("highest_loss", solver="identity"),
}

# What was a rule: name -> what to do instead.
GONE = {
  "matching, plain": "name 'matching' with --matching_target=examples --matching_shrink=false",
  "matching, unit gradients": "name 'whitened cosine, base model', which takes the lengths out and finds more",
  "matching, 16 queries": "name 'matching' with --eval_limit=16",
  "proponents, summed losses": "name 'proponents, no curvature'",
}


def settings_of(s: Settings, variant: Variant) -> Settings:
  """The flags with those of a variant in their place; no cut keeps more of an example than --max_length."""
  own = s.replace(policy=variant.policy, **dict(variant.changes))
  return own.replace(max_length=min(own.max_length, s.max_length))


def rules_of(name: str) -> list[str]:
  """The rules that one of that name changes, the nearest first: of "proponents, cg, copies last" two."""
  parts = name.split(", ")
  return [", ".join(parts[:stop]) for stop in range(len(parts) - 1, 0, -1)]


def variants_of(s: RuleSettings) -> dict[str, Variant]:
  """The variants that the flags ask for.

  Raises:
    UserError: a name that is unknown.
  """
  for name in listed(s.variants, ";"):
    if name in GONE:
      raise UserError(f"--variants: {name!r} won nowhere and is gone: {GONE[name]}")
    rule = next((rule for rule in rules_of(name) if rule in VARIANTS), None)
    if name not in VARIANTS and rule is not None:
      raise UserError(f"--variants: there is no rule {name!r}: name {rule!r}, and change its flags on the command line")
  wanted = words(s.variants, "variants", VARIANTS, ";") or list(VARIANTS)
  if s.variants.strip() and not s.variants.strip(" ;"):
    raise UserError(f"--variants={s.variants} names no rule: leave it empty for all, or name some, joined by ;")
  return {name: VARIANTS[name] for name in wanted}
