"""Stage 5: retrains from the base model on each selection with one recipe and compares perplexities on the test set.

python -m experiments.evaluate --select_runs=runs/a,runs/b --policies=full,random,opponents --seeds=0,1,2
python -m experiments.evaluate --select_runs=runs/a --fractions=0.05,0.1,0.25,0.5,0.75 --equal=steps,epochs
"""

import logging

import numpy as np

from in2core_jax.data.records import raw_lines
from in2core_jax.evaluation import statistics
from in2core_jax.pipeline.checks import check_budget
from in2core_jax.pipeline.compared import kept_candidates, plan_of
from in2core_jax.pipeline.evaluate_results import Group, write_tables
from in2core_jax.pipeline.judging import judged, tell_size
from in2core_jax.pipeline.retraining import Candidate, Judge, equal_steps
from in2core_jax.pipeline.session import Workbench
from in2core_jax.pipeline.settings import Settings
from in2core_jax.runs import run_folder
from in2core_jax.selection import coreset
from in2core_jax.training import train_loop

log = logging.getLogger(__name__)


class Trainings:
  """The retrained models of a run folder: a file for each, and a judge where one is missing."""

  def __init__(self, run_dir: run_folder.RunDir, bench: Workbench, s: Settings, chosen: list[Candidate]):
    self._run_dir, self._bench, self._settings, self._chosen = run_dir, bench, s, chosen
    self._judge: Judge | None = None

  @property
  def judge(self) -> Judge:
    """Made when it is first needed: a finished run compiles nothing."""
    if self._judge is None:
      self._judge = Judge(self._bench, self._settings, [candidate.rows for candidate in self._chosen])
    return self._judge

  def base_losses(self) -> np.ndarray:
    """Of the base model on the test set, float64 [N]."""
    if not self._run_dir.holds("base.json"):
      self._run_dir.write_json("base.json", {"losses": self.judge.losses(self.judge.sub).tolist()})
    return np.array(self._run_dir.read_json("base.json")["losses"])

  def row(self, candidate: Candidate, steps: int, label: str) -> statistics.RetrainRow:
    """The candidate's training over so many steps, done now unless it was."""
    name = [candidate.policy, candidate.seed, candidate.fraction, steps]
    file = f"trainings/{run_folder.hash_of(name)[:12]}.json"
    rows = run_folder.hash_of(candidate.rows.tolist())
    if not self._run_dir.holds(file) or self._run_dir.read_json(file).get("rows_sha256", rows) != rows:
      row = self.judge.retrain(candidate, label, steps)
      self._run_dir.write_json(file, row.as_json() | {"rows_sha256": rows})
      log.info("%s, %d steps: test perplexity %.3f", candidate, steps, row.perplexity)
    return judged(self._bench.parts["test"], statistics.RetrainRow.from_json(self._run_dir.read_json(file)))


def run(settings: Settings, bench: Workbench | None = None) -> str:
  """Retrains, compares, writes; returns the run folder. Finished trainings are kept, also when the run is killed."""
  s = settings
  run_folder.RunDir.refuse_held(s.run_dir)  # before the work that comes before the folder is opened
  bench = bench or Workbench(s)
  plan = plan_of(bench, s)
  identity = bench.identity("evaluate", s, ("data", "model", "finetune", "evaluate", "run"), ("train", "eval", "test"))
  of_policies = ("fraction", "num_examples", "token_budget", "layers", "sketch_size")
  of_policies += ("aggregate", "matching_target", "matching_shrink")
  chosen_by = s.identity("select")
  identity["flags"] |= {name: chosen_by[name] for name in of_policies}
  if s.checkpoint and {policy for policy, _ in plan.policies} & set(coreset.GRADIENT_POLICIES):
    identity["checkpoint"] = train_loop.checkpoint_hash(s.checkpoint)
  identity["select_runs"] = {
    name: run_folder.hash_of([columns[part].tolist() for part in ("influence", "loss", "selected")])[:16]
    for name, columns in plan.runs
  }
  check_budget(s, bench.parts["train"])  # told before there is a run folder
  tell_size(bench.parts["test"])
  run_dir = run_folder.RunDir.open(s.run_dir, identity, overwrite=s.overwrite)
  bench.write_skipped(run_dir)
  run_dir.write_flags("flags.txt", s.as_flags(), ["python -m experiments.evaluate --flagfile=THIS"])
  chosen = kept_candidates(run_dir, bench, s, plan)
  for candidate in chosen:
    run_dir.write_text(f"coresets/{candidate.file_name}.jsonl", raw_lines(bench.parts["train"].records, candidate.rows))
  trainings = Trainings(run_dir, bench, s, chosen)
  base, groups = trainings.base_losses(), []
  for number, equal in enumerate(plan.equal):
    rows = {}
    for place, candidate in enumerate(chosen):
      label = f"train {number * len(chosen) + place + 1}/{len(plan.equal) * len(chosen)}: {candidate}"
      rows[candidate.name] = trainings.row(candidate, equal_steps(bench, s, candidate.rows, equal), label)
    for fraction in plan.fractions or (None,):
      ours = [rows[candidate.name] for candidate in chosen if candidate.fraction in (None, fraction)]
      groups.append(Group(equal, fraction, ours))
  return write_tables(run_dir, bench, s, groups, base)
