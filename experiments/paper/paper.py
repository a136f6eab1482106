"""All experiments of the paper in one command, each from its flagfile; tables and pictures land in --results_dir.

./run.sh paper                                          2 cores, the embedded models and corpus
./run.sh paper --alpaca=alpaca.json                     also on Alpaca, and on a pool that mixes both
./run.sh paper --preset=full --mesh=data:8              an accelerator: all data, all layers
./run.sh paper --only=sweep                             and, where they are not finished, the steps that it reads

Every experiment is a run folder of its own in --run_dir and goes on where it was stopped. A finished one is not started
again while its flags, --alpaca and the files of --model are the same. Else its run folder decides: it goes on with what
is missing, or refuses other settings in one line, and --overwrite --only=NAME starts it anew. The next experiment
starts when the one before has ended, however it ended; one that fails is told at the end.

The experiments' flags are in experiments/flags/. Passed on to all of them, where given: --seed --mesh --boundary_cache
--boundary_cache_gb --batch_tokens --microbatch --shard_batches --model --dtype. Other flags are refused. --model is the
model that is trained and, but in transfer, scored: there the models that select stay those named in the experiment, and
--model joins them. Each experiment is one process, which works alone on the devices of this machine.
"""

import datetime
import logging
import pathlib
import time
from collections.abc import Collection

from absl import flags as command_line

from experiments import flags
from experiments.paper.job import Job
from experiments.paper.results import publish, write_index
from experiments.paper.settings import PASSED, PaperSettings
from experiments.paper.steps import STEPS
from in2core_jax.errors import UserError
from in2core_jax.pipeline.settings import listed
from in2core_jax.runs import run_folder

log = logging.getLogger(__name__)

_OWN = ("run_dir", "overwrite", "coordinator", "process_id", "num_processes", "preset", "alpaca", "only", "results_dir")


def jobs_of(s: PaperSettings, named: Collection[str] = ()) -> list[Job]:
  """The jobs that the flags ask for, each after those that it reads. With --only these too, where not finished.

  Raises:
    UserError: --only names a step that there is not, or one that needs --alpaca, which is no file.
  """
  known = {step.name: Job(step, s, tuple(named)) for step in STEPS}
  wanted = listed(s.only) or [name for name, job in known.items() if job.step.by_default(s.alpaca)]
  for name in wanted:
    if name not in known:
      raise UserError(f"--only={s.only}: there is no {name!r}; use {', '.join(known)}")
    if known[name].step.needs_alpaca and not s.alpaca:
      raise UserError(f"--only={s.only}: {name} needs --alpaca, the path of an Alpaca JSON file")
  if s.alpaca and not pathlib.Path(s.alpaca).is_file():
    raise UserError(f"--alpaca={s.alpaca}: there is no such file; give a JSON file with instruction, input, output")
  needed = set(wanted)
  for name, job in reversed(known.items()):
    if name in needed and (s.overwrite or not job.is_finished()):
      needed |= {other for other in job.step.reads if not known[other].is_finished()}
  return [job for name, job in known.items() if name in needed]


def check_settings(s: PaperSettings, named: Collection[str] = ()) -> None:
  """Refuses a flag that no experiment would get, and folders that are not local."""
  foreign = sorted(set(named) - {*PASSED, *_OWN})
  if foreign:
    raise UserError(
      f"--{foreign[0]} is not passed on to the experiments, which have their flags from experiments/flags/: leave it "
      f"out, or run the experiment alone with it; passed on are --{', --'.join(PASSED)}"
    )
  for name in ("run_dir", "results_dir"):
    place = pathlib.Path(getattr(s, name))
    if not getattr(s, name) or run_folder.is_remote(getattr(s, name)) or place.exists() and not place.is_dir():
      raise UserError(f"--{name}={getattr(s, name)}: give a local folder, which is made where there is none")


def run(s: PaperSettings, named: Collection[str] = ()) -> int:
  """Runs the experiments and publishes their results.

  Args:
    s: flags.
    named: names of the flags that were given on the command line.

  Returns:
    The exit code, 1 when an experiment failed.
  """
  check_settings(s, named)
  jobs = jobs_of(s, named)
  held = [run_folder.hold(s.run_dir), run_folder.hold(pathlib.Path(s.results_dir) / s.preset)]
  read = [job.step.name for job in jobs if not job.is_named]
  if read:
    log.info("--only=%s reads the results of %s, which are not finished: first these", s.only, ", ".join(read))
  failed, began = {}, time.monotonic()
  for number, job in enumerate(jobs, 1):
    log.info("=== %d of %d: %s, %s", number, len(jobs), job.step.name, job.step.about)
    reason = _run(job, failed)
    if reason:
      failed[job.step.name] = reason
    else:
      publish(job)
    write_index([Job(step, s) for step in STEPS])
    log.info("=== %s %s; %s in all", job.step.name, reason or "finished", _duration(time.monotonic() - began))
  if failed:
    told = ", ".join(f"{name} {reason}" for name, reason in failed.items())
    log.error("%s: the same command continues them, --overwrite --only=NAME starts one again", told)
  for lock in held:
    lock.release()
  return 1 if failed else 0


def _run(job: Job, failed: Collection[str]) -> str:
  """Runs an experiment that is not finished; why it failed, or nothing."""
  missing = [name for name in job.step.reads if name in failed]
  if missing:
    return f"was not started: it reads {missing[0]}, which failed"
  if not (job.settings.overwrite and job.is_named) and job.is_finished():
    log.info("%s is finished already", job.step.name)
    return ""
  code = job.run()
  return f"failed with exit code {code}" if code else ""


def _duration(seconds: float) -> str:
  """Hours, minutes, seconds."""
  return str(datetime.timedelta(seconds=round(seconds)))


def main(_) -> int:
  """Entry point."""
  settings = flags.read(PaperSettings)
  return run(settings, [name for name in flags.names() if command_line.FLAGS[name].present])
