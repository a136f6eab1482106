"""All stages in one process, on the embedded model and data: fine-tune, score, select, retrain, judge.

./run.sh demo
"""

import logging
import time

from experiments import cli, dry_run, evaluate, finetune, flags, select
from experiments.workbench import Workbench

log = logging.getLogger(__name__)


def main(_) -> None:
  """Runs the chain; each stage writes a folder under --run_dir and is skipped when it is finished there."""
  began = time.perf_counter()
  settings = flags.read(tells_costs=True)
  if settings.dry_run:
    dry_run.run(settings, "demo")
    return
  root = settings.run_dir
  bench = Workbench(settings)
  checkpoint = finetune.run(settings.replace(run_dir=f"{root}/finetune"), bench)
  chosen = settings.replace(run_dir=f"{root}/select", checkpoint=checkpoint)
  selected = select.run(chosen, bench)
  # The scores of that run serve the paper's rule, one of --policies, too.
  judged = settings.replace(run_dir=f"{root}/evaluate", select_runs=selected, checkpoint=checkpoint)
  result = evaluate.run(judged, bench)
  log.info("done in %.0f s; open %s/evaluation.md and %s/report.html", time.perf_counter() - began, result, selected)


if __name__ == "__main__":
  flags.define(run_dir="runs/demo")
  cli.run(main)
