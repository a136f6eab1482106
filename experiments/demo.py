"""All stages in one process, on the embedded model and data: fine-tune, score, select, retrain, judge, recommend.

./run.sh demo

Its flags are in experiments/flags/demo.flags; yours come after them. The defaults below are those of the stages. Writes
a folder for each stage into --run_dir; --dry_run tells time, memory and disk alone.
"""

import logging
import time

import numpy as np

from experiments import cli, flags
from experiments.settings import DemoFlags
from in2core_jax.errors import UserError
from in2core_jax.estimate import dry_run
from in2core_jax.pipeline import checks, evaluate, finetune, select
from in2core_jax.pipeline.compared import fractions_of
from in2core_jax.pipeline.judging import tell_size
from in2core_jax.pipeline.retraining import equal_of
from in2core_jax.pipeline.session import Session, open_session
from in2core_jax.pipeline.settings import Settings, refuse, seeds_of
from in2core_jax.recommendation import results
from in2core_jax.recommendation import run as recommend
from in2core_jax.recommendation.settings import FEW, in_little
from in2core_jax.recommendation.trial import Judged
from in2core_jax.runs import run_folder
from in2core_jax.selection import coreset

log = logging.getLogger(__name__)


def settled(s: Settings) -> Settings:
  """The flags as the stages take them: what --policy selects is compared anyway, and is left out of --policies.

  Raises:
    UserError: flags that would be passed over, a policy that there is not, or one whose sets differ from seed to seed;
      lists that the last stage could not read.
  """
  refuse(s, ("checkpoint", "select_runs"), "demo fine-tunes and selects by itself")
  seeds_of(s), equal_of(s), fractions_of(s)
  policies = checks.policies_of(s)
  if s.fractions or s.policy not in policies:  # a sweep takes the scores of the run only, and merges the names itself
    return s
  if s.policy in coreset.SEEDED_POLICIES:
    raise UserError(
      f"--policy={s.policy} --policies={s.policies}: the one set of --policy and those of each seed would have one "
      "name; select by another policy, or leave it out of --policies"
    )
  return s.replace(policies=",".join(name for name in policies if name != s.policy))


def recommended(s: Settings, session: Session, root: str) -> str:
  """The recommendation in little: one rule, one small budget, a few examples to judge by, trainings of a few steps.

  Returns:
    The sentence in which the demo ends.
  """
  few = {part: np.arange(min(FEW, len(session.splits[part]))) for part in ("eval", "test")}
  settings = in_little(s, f"{root}/recommend")
  session = session.of_rows(**few)
  try:
    Judged.of(session)
  except UserError as error:  # too small to be dealt into halves: the stages above are done all the same
    return f"There is no recommendation: {error}."
  folder = recommend.run(settings, session, full=f"{root}/finetune")
  return run_folder.RunDir.load(folder).load_json(results.FILE)["sentence"]


def main(_) -> None:
  """Runs the chain; each stage writes a folder under --run_dir and is skipped when it is finished there."""
  began = time.perf_counter()
  settings = settled(flags.read(DemoFlags, tells_costs=True))
  if settings.dry_run:
    dry_run.run(settings, "demo")
    return
  root = settings.run_dir
  run_folder.RunDir.refuse_held(root)
  session = open_session(settings)
  checks.check_demo(session, settings)
  lock = run_folder.hold(root)  # to the end: each stage reads what the ones before it have written
  tell_size(session.splits["test"])
  checkpoint = finetune.run(settings.replace(run_dir=f"{root}/finetune"), session)
  chosen = settings.replace(run_dir=f"{root}/select", checkpoint=checkpoint)
  selected = select.run(chosen, session)
  # The scores of that run serve the paper's rule, one of --policies, too.
  judged = settings.replace(run_dir=f"{root}/evaluate", select_runs=selected, checkpoint=checkpoint)
  result = evaluate.run(judged, session)
  sentence = recommended(settings, session, root)
  seconds = time.perf_counter() - began
  told = "done in %.0f s; open %s/evaluation.md and %s/report-select.html\n%s"
  log.info(told, seconds, result, result, sentence)
  lock.release()


if __name__ == "__main__":
  flags.define(DemoFlags)
  cli.run(main)
