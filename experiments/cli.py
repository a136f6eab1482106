"""What every command does around its main function: flags, logging, the compilation cache, one-line errors, exit codes.

| exit code | means |
|---|---|
| 0 | done |
| 1 | our bug (with a traceback), or no memory or disk left (one line) |
| 2 | a mistake in flags, files or data, or a place that may not be read or written (one line) |
| 130, 143 | stopped by Ctrl-C, by SIGTERM; finished work is kept and the same command continues |
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from absl import app, flags
from tqdm import tqdm

from in2core_jax.errors import UserError

log = logging.getLogger(__name__)

PROJECT_LOGGERS = ("in2core_jax", "experiments", "__main__")
_KEPT = "finished work is kept: the same command continues"


class Terminated(BaseException):
  """SIGTERM arrived. Like KeyboardInterrupt not an Exception: code that handles errors must not swallow it."""


def run(
  main_fn: Callable[[list[str]], int | None], help_fn: Callable[[], str] | None = None, alone: bool = False
) -> NoReturn:
  """Parses the flags, runs a command's main function, exits.

      if __name__ == "__main__":
        cli.run(main)

  Args:
    main_fn: gets argv without flags (its first item is the program); returns the exit code, None for 0.
    help_fn: text for --help; default: the command's docstring and all flags of the project.
    alone: whether the command refuses to be one of several processes.
  """
  try:
    signal.signal(signal.SIGTERM, _terminate)
    app.run(lambda argv: _prepare_and_call(main_fn, argv, alone), flags_parser=lambda argv: _parse(argv, help_fn))
  except SystemExit as end:  # absl's way to hand on what the main function returned
    if end.code is None or isinstance(end.code, int):
      _end(end.code or 0)
    raise
  except UserError as error:
    _exit(2, f"error: {error}")
  except KeyboardInterrupt:
    _exit(130, f"stopped by Ctrl-C; {_KEPT}")
  except Terminated:
    _exit(143, f"stopped by SIGTERM; {_KEPT}")
  except MemoryError as error:
    _exit(1, f"error: out of memory ({error or 'no size given'}); {_KEPT}, and smaller batches need less")
  except OSError as error:
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
      _exit(2, f"error: {error.filename}: {error.strerror}; choose a place that this user may read and write; {_KEPT}")
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
      raise
    _exit(1, f"error: disk full ({error}); {_KEPT} once there is space")
  except RuntimeError as error:
    # jaxlib's error for a device without memory; it has no class of its own.
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    _exit(1, f"error: out of device memory ({str(error).splitlines()[0]}); {_KEPT}, and smaller batches need less")
  _end(0)


def _exit(code: int, message: str) -> NoReturn:
  """Prints one line on stderr, whatever line breaks the message has, and exits."""
  print(" ".join(message.split()), file=sys.stderr)
  _end(code)


def _end(code: int) -> NoReturn:
  """Exits, in a single process that has loaded JAX without taking anything down: everything is written by then.

  JAX clears its backends at exit. Programs of a command that a signal has stopped may still run in them: seen were a
  segmentation fault after SIGTERM and an abort after a finished run, exit codes that say the work failed. A process
  that is still one of several leaves in JAX's own way, which tells the others.
  """
  jax = sys.modules.get("jax")
  profiled = flags.FLAGS.is_parsed() and (flags.FLAGS.run_with_profiling or flags.FLAGS.profile_file)
  if jax is None or profiled or jax.distributed.is_initialized():
    sys.exit(code)
  for stream in filter(None, (sys.stdout, sys.stderr)):
    try:
      stream.flush()
    except (BrokenPipeError, ValueError):  # a reader that has seen enough, a closed stream
      pass
    except OSError as error:
      code = code or 1
      with contextlib.suppress(OSError, ValueError):
        print(f"error: output is lost ({error})", file=sys.stderr)
  os._exit(code)


# --- flags ------------------------------------------------------------------------------------------------------------


def _parse(argv: list[str], help_fn: Callable[[], str] | None) -> list[str]:
  """absl's flags, with its errors as ours: absl would print several lines and exit with 1."""
  if any(argument in ("--help", "-h", "-help", "--helpfull") for argument in argv[1:]):
    try:
      print(help_fn() if help_fn else _help_text(), flush=True)
    except BrokenPipeError:  # a reader that has seen enough, as `| head`; nothing may be flushed into it at the exit
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)
  try:
    rest = flags.FLAGS(argv)
  except flags.Error as error:
    raise UserError(f"{error}; --help lists the flags") from error
  except UnicodeDecodeError as error:
    raise UserError(f"a flagfile is not UTF-8 text ({error})") from error
  if len(rest) > 1:
    raise UserError(f"unexpected argument '{rest[1]}': flags are written --name=value; --help lists them")
  return rest


def _help_text() -> str:
  """The command's docstring and the flags that the project's modules define."""
  modules = flags.FLAGS.flags_by_module_dict()
  # The stages' flags are grouped under "stage: what it does" (experiments/flags.py).
  ours = [
    name
    for name in modules
    if name == sys.argv[0] or ": " in name or name.startswith(("experiments.", "in2core_jax.", "__main__"))
  ]
  doc = (sys.modules["__main__"].__doc__ or "").strip()
  return "\n\n".join(
    [doc, *(flags.FLAGS.module_help(name) for name in ours), "--flagfile=FILE: read flags from a file"]
  )


# --- surroundings -----------------------------------------------------------------------------------------------------


def _prepare_and_call(main_fn: Callable[[list[str]], int | None], argv: list[str], alone: bool) -> int | None:
  set_up_logging()
  set_up_compilation_cache()
  if "coordinator" not in flags.FLAGS:  # a command without the stages' flags is one process
    return main_fn(argv)
  said = flags.FLAGS.coordinator, flags.FLAGS.process_id, flags.FLAGS.num_processes
  if alone:
    refuse_several(Path(argv[0]).stem, *said)
  joined = join_processes(*said)
  code = main_fn(argv)
  if joined:
    from in2core_jax import processes

    processes.leave()
  return code


def join_processes(coordinator: str, process_id: int, num_processes: int) -> bool:
  """Joins the processes of one job, by flags, SLURM or TPU slice; all of them but process 0 tell warnings only.

  Returns:
    Whether there are several.

  Raises:
    UserError: some of the flags without the others, or processes that do not find each other.
  """
  from in2core_jax import processes  # which imports JAX; a command without these flags does not wait for it

  joined = processes.initialize(*_said(coordinator, process_id, num_processes))
  if joined and not processes.is_writer():
    for name in PROJECT_LOGGERS:
      logging.getLogger(name).setLevel(logging.WARNING)
  return joined


def refuse_several(command: str, coordinator: str, process_id: int, num_processes: int) -> None:
  """Refuses to be one of several processes, before the others are waited for; arguments as in `join_processes`.

  Raises:
    UserError: the flags, SLURM or a TPU slice say that there are several.
  """
  from in2core_jax import processes

  if processes.start_settings(*_said(coordinator, process_id, num_processes), os.environ) is not None:
    raise UserError(
      f"{command} runs in one process, and this is one of several: start it on one machine, in one process, with "
      "--num_processes=1 where a larger job is found"
    )


def _said(coordinator: str, process_id: int, num_processes: int) -> tuple[str | None, int | None, int | None]:
  """The flags as `processes.initialize` takes them."""
  return coordinator or None, None if process_id < 0 else process_id, num_processes or None


class _Handler(logging.Handler):
  """Plain lines on stderr, above a progress bar when there is one."""

  def emit(self, record: logging.LogRecord) -> None:
    tqdm.write(self.format(record), file=sys.stderr)


def set_up_logging() -> None:
  """Plain lines on stderr: everything of this project, warnings of others."""
  root = logging.getLogger()
  handler = _Handler()
  handler.setFormatter(logging.Formatter("%(message)s"))
  root.handlers[:] = [handler]
  root.setLevel(logging.WARNING)
  logging.getLogger("absl").setLevel(logging.WARNING)  # which Orbax writes to
  for name in PROJECT_LOGGERS:
    logging.getLogger(name).setLevel(logging.INFO)


def cache_folder() -> Path:
  """A place on a local disk for what can be made again: IN2CORE_CACHE, or ~/.cache/in2core_jax."""
  return Path(os.environ.get("IN2CORE_CACHE") or os.path.join("~", ".cache", "in2core_jax")).expanduser()


def set_up_compilation_cache() -> None:
  """Keeps compiled programs across runs, in IN2CORE_CACHE/xla or ~/.cache/in2core_jax/xla.

  JAX's own variable, where it is set, wins.
  """
  if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  folder = cache_folder() / "xla"
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    log.warning("no compilation cache: %s; set IN2CORE_CACHE to a folder that can be written", error)
    return
  settings = {
    "jax_compilation_cache_dir": str(folder),
    "jax_persistent_cache_min_compile_time_secs": 0.2,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }
  if "jax" in sys.modules:
    for name, value in settings.items():
      sys.modules["jax"].config.update(name, value)
  else:  # a command that does not need JAX does not wait for it
    os.environ.update({name.upper(): str(value) for name, value in settings.items()})


# --- SIGTERM ----------------------------------------------------------------------------------------------------------


def _terminate(number: int, frame: object) -> None:
  raise Terminated


@contextlib.contextmanager
def finish_on_sigterm() -> Iterator[Callable[[], bool]]:
  """Lets a loop end its piece of work when SIGTERM (a preemption) arrives, instead of being cut off in it.

      with cli.finish_on_sigterm() as stop_requested:
        for index in shards:
          ...
          if stop_requested():
            break

  Yields a function: whether SIGTERM has arrived, in whichever process of the job; collective. The command exits with
  143 after the block; a second SIGTERM ends it at once.
  """
  from in2core_jax import processes

  requested = False

  def stop_requested() -> bool:
    nonlocal requested
    stop = not processes.all_true(not requested)
    if stop:  # and never back to False: the signal may arrive while the others are asked
      requested = True
    return stop

  def handle(number: int, frame: object) -> None:
    nonlocal requested
    if requested:
      raise Terminated
    requested = True
    log.warning("SIGTERM: finishing the piece under way, then stopping (a second SIGTERM stops at once)")

  before = signal.signal(signal.SIGTERM, handle)
  try:
    yield stop_requested
  finally:
    signal.signal(signal.SIGTERM, before)
  if stop_requested():  # asked of all once more: one process must not leave alone when the signal came late
    raise Terminated
