"""The rules that `recommend` tries, by name; what each needs, in words that a plan can price."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Rule:
  """A rule that looks at evaluation examples.

  Attributes:
    policy: word of --policy.
    about: what it takes, in a few words.
    trained: scores at the model that was fine-tuned on all data, not at the base model.
    gradients: whether it needs projected gradients of the pool.
    hidden: whether it needs last hidden states of the pool.
    solves: whether it needs inverse Hessian products.
  """

  policy: str
  about: str
  trained: bool = False
  gradients: bool = False
  hidden: bool = False
  solves: bool = False


# Order: how often a rule was best in docs/selection.md, then what it costs.
RULES = {
  "hybrid": Rule("hybrid", "similar gradients and hidden states", gradients=True, hidden=True),
  "bm25": Rule("bm25", "similar words"),
  "rds": Rule("rds", "similar hidden states, weighted by position", hidden=True),
  "matching": Rule("matching", "mean gradient like the evaluation set's", gradients=True),
  "whitened_cosine": Rule("whitened_cosine", "similar gradients", gradients=True),
  "embedding": Rule("embedding", "similar mean hidden states", hidden=True),
  "proponents": Rule("proponents", "highest influence", trained=True, solves=True),
}
ABOUT = {name: rule.about for name, rule in RULES.items()} | {
  "random": "drawn at random",
  "length_matched_random": "drawn at random, with the response lengths of the first rule's choice",
  "longest": "longest responses",
  "full": "all of the data",
  "full_deduplicated": "all of the data without exact duplicates",
}
