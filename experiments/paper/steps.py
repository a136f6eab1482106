"""The experiments of `paper`: which command each is, with which flags, and what it shows."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Step:
  """One experiment.

  Attributes:
    name: of its folder, and in --only.
    module: in experiments/.
    table: name of its files without ending; it is finished when the .md is there. Empty: a fine-tuning that
      only other steps read; nothing of it is published.
    flagfile: in experiments/flags/.
    about: what it shows, in a line.
    changes: flags that come after the flagfile's; {alpaca} stands for the path of --alpaca, {runs} for --run_dir;
      {runs}/NAME in one of them says that the step reads what another one made.
    full: flags that come after paper-full.flags, which comes after `changes`.
    by_name: whether it is run only where --only names it: it takes many hours on two cores.
  """

  name: str
  module: str
  table: str
  flagfile: str
  about: str
  changes: tuple[str, ...] = ()
  full: tuple[str, ...] = ()
  by_name: bool = False

  @property
  def marker(self) -> str:
    """The file that a finished run has."""
    return f"{self.table}.md" if self.table else "finetune.json"

  @property
  def needs_alpaca(self) -> bool:
    """Whether it reads the file of --alpaca."""
    return any("{alpaca}" in change for change in self.changes)

  def by_default(self, alpaca: str) -> bool:
    """Whether it is run where --only names nothing."""
    return not self.by_name and (bool(alpaca) or not self.needs_alpaca)

  @property
  def reads(self) -> tuple[str, ...]:
    """Names of the steps whose results it reads."""
    return tuple(dict.fromkeys(re.findall(r"\{runs\}/([\w-]+)", " ".join(self.changes))))


_TUNED = "--checkpoint={runs}/tuned/checkpoint"
_FOUR_SOURCES = ("--train_data=chatterbot+jsonl:{alpaca}", "--with_siblings")
STEPS = (
  Step("tuned", "finetune", "", "sweep.flags", "the model that was fine-tuned on all examples of the sweep"),
  Step("scores", "select", "report", "sweep.flags", "scores of the training examples, who is kept", (_TUNED,)),
  Step(
    *("sweep", "evaluate", "evaluation", "sweep.flags"),
    "how much data is enough, by policy, at equal steps and at equal epochs",
    (_TUNED, "--select_runs={runs}/scores"),
  ),
  Step(
    *("study-chatterbot", "study", "study", "study.flags", "rules of selection on a redundant corpus"),
    ("--variants=proponents; proponents, cg; opponents; matching; longest; random, copies last",),
  ),
  Step("layers-tuned", "finetune", "", "ablate_layers.flags", "the model whose gradients the next step takes"),
  Step(
    *("layers", "ablate_layers", "ablate_layers", "ablate_layers.flags", "how many layers are enough"),
    # At the base model all layers' own highest scores lose to random sets, so that agreeing with them says little.
    ("--checkpoint={runs}/layers-tuned/checkpoint",),
  ),
  Step(
    *("fidelity", "fidelity", "fidelity", "fidelity.flags", "do scores predict what retraining gives (LDS)"),
    # Hundreds of models are retrained on halves. With more examples each of them moves a loss by less than the noise.
    full=("--train_limit=128", "--lds_every=true", "--lds_at=full,base", "--cg_steps=100"),
  ),
  Step("coverage", "coverage", "coverage", "coverage.flags", "which test points the training set does not cover"),
  Step(
    *("transfer", "transfer", "transfer", "transfer.flags", "one model selects, another one is trained"),
    # At SmolLM2's rate Gemma learns the training examples by heart: its evaluation loss ends where it began.
    ("--score_models=smollm2;truncated:smollm2:15;gemma3", "--model_rates=3e-4;3e-4;3e-5"),
  ),
  Step(
    *("study-alpaca", "study", "study", "study.flags"),
    "rules of selection on Alpaca, for an evaluation set of its own kind",
    (
      *("--train_data=jsonl:{alpaca}", "--test_limit=600"),
      "--variants=auto; proponents, cg; matching; hybrid; longest; length-matched random",
    ),
    ("--train_limit=10000", "--eval_limit=1000", "--test_limit=2000"),
  ),
  Step(
    *("targeted", "targets", "targets", "targeted.flags"),
    "small parts of a pool of four sources, chosen for one of them, and what recommend answers",
    _FOUR_SOURCES,
    ("--source_limits=0,0,0,0", "--recommend_minutes=60"),
    by_name=True,
  ),
  Step(
    *("targeted-lora", "targets", "targets", "targeted.flags"),
    "the same with LoRA factors in all layers trained",
    (*_FOUR_SOURCES, "--trainable=lora", "--trainable_layers=all"),
    ("--source_limits=0,0,0,0", "--recommend_minutes=60"),
    by_name=True,
  ),
  Step(
    *("study-mixed", "study", "study", "study.flags"),
    "rules of selection on a mixed pool with an evaluation set of one topic",
    (
      *("--train_data=chatterbot:trivia,ai,coding,psychology,emotion,literature+jsonl:{alpaca}",),
      *("--split=0.5,0.25,0.25", "--train_limit=600", "--eval_topics=trivia", "--equal=steps,tokens"),
      "--variants=auto; proponents; proponents, cg; matching; matching, base model; embedding; rds",
    ),
  ),
)
