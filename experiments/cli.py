"""What every command does around its main function: flags, logging, the compilation cache, one-line errors, exit codes.

| exit code | means |
|---|---|
| 0 | done |
| 1 | our bug (with a traceback), or the machine's fault: no memory or disk left, the folder removed (one line) |
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
from typing import NoReturn

from absl import app, flags

from experiments import help_text, output
from in2core_jax.errors import UserError, printable
from in2core_jax.pipeline.fields import in_flags
from in2core_jax.runs import locks
from in2core_jax.runs.cache_folder import cache_folder
from in2core_jax.runs.stopping import Terminated, terminate

log = logging.getLogger(__name__)

PROJECT_LOGGERS = ("in2core_jax", "experiments", "__main__")
_KEPT = "finished work is kept: the same command continues"


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
  output.guard()
  try:
    signal.signal(signal.SIGTERM, terminate)
    app.run(lambda argv: _prepare_and_call(main_fn, argv, alone), flags_parser=lambda argv: _parse(argv, help_fn))
  except SystemExit as end:  # absl's way to hand on what the main function returned
    if end.code is None or isinstance(end.code, int):
      _end(end.code or 0)
    raise
  except KeyboardInterrupt:
    _exit(130, f"stopped by Ctrl-C; {_KEPT}")
  except Terminated:
    _exit(143, f"stopped by SIGTERM; {_KEPT}")
  except BaseException as error:  # pyo3's panics are no Exception
    told = outcome(error)
    if told is None:
      locks.release_all()
      raise
    _exit(*told)
  _end(0)


# What the texts of errors say where a library gives no errno: tensorstore, Orbax, Arrow.
_NO_SPACE = {
  errno.ENOSPC: "No space left on device",
  errno.EDQUOT: "Disk quota exceeded",
  errno.EFBIG: "File too large",
}
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_PLACE = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


def outcome(error: BaseException) -> tuple[int, str] | None:
  """Exit code and line of an error that is a mistake of the user's or the machine's fault; None for a bug of ours."""
  if isinstance(error, UserError):
    return 2, f"error: {in_flags(str(error), help_text.our_flags())}"
  lost = str(error) if isinstance(error, locks.Lost) else locks.lost()
  if lost:
    return 1, f"error: {lost}"
  chain = list(_chain(error))
  full = next((str(each) for each in chain if _is_full(each)), None)
  if full is not None:
    limit = "file too large for the limit of this user or disk" if "too large" in full.lower() else "disk full"
    return 1, f"error: {limit} ({_short(full)}); {_KEPT} once there is space"
  if isinstance(error, MemoryError):
    return 1, f"error: out of memory ({error or 'no size given'}); {_KEPT}, and smaller batches need less"
  if isinstance(error, OSError) and error.filename and error.errno in (*_NOT_ALLOWED, *_NO_PLACE):
    advice = (
      "choose a place that this user may read and write" if error.errno in _NOT_ALLOWED else "choose another path"
    )
    return 2, f"error: {error.filename}: {error.strerror}; {advice}; {_KEPT}"
  # jaxlib's error for a device without memory; it has no class of its own.
  if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
    return 1, f"error: out of device memory ({_short(str(error))}); {_KEPT}, and smaller batches need less"
  if isinstance(error, RecursionError):
    return 1, f"error: something is nested too deeply ({_short(str(error))}): look for such data, templates or models"
  if type(error).__name__ == "PanicException":  # pyo3's, which Rust libraries such as tokenizers end in
    return (
      1,
      f"error: a library has failed inside ({_short(str(error))}): look at the tokenizer and the files of --model",
    )
  return None


def _chain(error: BaseException) -> Iterator[BaseException]:
  """An error, what it was raised from, and the members of groups."""
  waiting, seen = [error], set()
  while waiting:
    each = waiting.pop(0)
    if each is None or id(each) in seen:
      continue
    seen.add(id(each))
    yield each
    waiting += [each.__cause__, each.__context__, *getattr(each, "exceptions", ())]


def _is_full(error: BaseException) -> bool:
  if isinstance(error, OSError):
    return error.errno in _NO_SPACE
  return isinstance(error, Exception) and any(text in str(error) for text in _NO_SPACE.values())


def _short(text: str, most: int = 300) -> str:
  """The first line, its middle left out where it is long: what happened may stand at the end."""
  line = (text.strip().splitlines() or [""])[0]
  return line if len(line) <= most else f"{line[: most // 2]} ... {line[-most // 2 :]}"


def _exit(code: int, message: str) -> NoReturn:
  """Prints one line on stderr, whatever line breaks the message has, and exits."""
  print(printable(" ".join(message.split())), file=sys.stderr)
  _end(code)


def _end(code: int) -> NoReturn:
  """Exits, in a single process that has loaded JAX without taking anything down: everything is written by then.

  JAX clears its backends at exit. Programs of a command that a signal has stopped may still run in them: seen were a
  segmentation fault after SIGTERM and an abort after a finished run, exit codes that say the work failed. A process
  that is still one of several leaves in JAX's own way, which tells the others.
  """
  locks.release_all()
  for stream in filter(None, (sys.stdout, sys.stderr)):
    try:
      stream.flush()
      lost = output.loss(stream)
    except (BrokenPipeError, ValueError):  # a reader that has seen enough, a closed stream
      lost = None
    except OSError as error:
      lost = error
    if lost is not None and stream is not sys.stderr:  # the log may go: what was asked for is done
      code = code or 1
      with contextlib.suppress(OSError, ValueError):
        print(f"error: output is lost ({lost})", file=sys.stderr)
  jax = sys.modules.get("jax")
  profiled = flags.FLAGS.is_parsed() and (flags.FLAGS.run_with_profiling or flags.FLAGS.profile_file)
  if jax is None or profiled or jax.distributed.is_initialized():
    sys.exit(code)
  os._exit(code)


# --- flags ------------------------------------------------------------------------------------------------------------


def _parse(argv: list[str], help_fn: Callable[[], str] | None) -> list[str]:
  """absl's flags, with its errors as ours: absl would print several lines and exit with 1."""
  if any(argument in ("--help", "-h", "-help", "--helpfull") for argument in argv[1:]):
    print(help_fn() if help_fn else help_text.help_text("--helpfull" in argv), flush=True)
    sys.exit(0)
  try:
    rest = flags.FLAGS(_with_flagfiles(argv))
  except flags.UnrecognizedFlagError as error:
    raise UserError(help_text.unknown_flag(error.flagname)) from error
  except flags.CantOpenFlagFileError as error:
    reason = error.__context__  # absl puts its words around it
    name, why = getattr(reason, "filename", None), getattr(reason, "strerror", None)
    told = f"--flagfile={name}: {why}; give the path of a text file, a flag a line" if why else str(error)
    raise UserError(told) from error
  except flags.Error as error:
    raise UserError(f"{error}; --help lists the flags") from error
  except UnicodeDecodeError as error:
    raise UserError(f"a flagfile is not UTF-8 text ({error})") from error
  if len(rest) > 1:
    raise UserError(f"unexpected argument '{rest[1]}': flags are written --name=value; --help lists them")
  return rest


_DEEPEST = 10  # flagfiles that name each other


def _with_flagfiles(argv: list[str]) -> list[str]:
  """The arguments with those of the flagfiles in place of their names.

  absl takes the mark of the byte order that editors put in front of a text for a part of the first line, and passes
  over the name of a flagfile with blanks in front.

  Raises:
    UserError: flagfiles that name each other without end.
  """
  for _ in range(_DEEPEST):
    argv = [argv[0], *flags.FLAGS.read_flags_from_files(argv[1:])]
    marked = {argument: argument[1:].strip() for argument in argv[1:] if argument[:1] == "\ufeff"}
    argv = [marked.get(argument, argument) for argument in argv if marked.get(argument, "-")[:1] not in ("#", "/", "")]
    if not any(argument.lstrip("-").partition("=")[0] == "flagfile" for argument in argv[1:]):
      return argv
  raise UserError(f"flagfiles name each other more than {_DEEPEST} times; write one that names the others")


# --- surroundings -----------------------------------------------------------------------------------------------------


def _prepare_and_call(main_fn: Callable[[list[str]], int | None], argv: list[str], alone: bool) -> int | None:
  set_up_logging()
  set_up_compilation_cache()
  if "coordinator" not in flags.FLAGS:  # a command without the stages' flags is one process
    return main_fn(argv)
  said = flags.FLAGS.coordinator, flags.FLAGS.process_id, flags.FLAGS.num_processes
  if alone:
    refuse_several(locks.program(argv[0]), *said)
  joined = join_processes(*said)
  code = main_fn(argv)
  if joined:
    from in2core_jax.parallel import processes

    processes.leave()
  return code


def join_processes(coordinator: str, process_id: int, num_processes: int) -> bool:
  """Joins the processes of one job, by flags, SLURM or TPU slice; all of them but process 0 tell warnings only.

  Returns:
    Whether there are several.

  Raises:
    UserError: some of the flags without the others, or processes that do not find each other.
  """
  from in2core_jax.parallel import processes  # which imports JAX; a command without these flags does not wait for it

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
  from in2core_jax.parallel import processes

  if processes.start_settings(*_said(coordinator, process_id, num_processes), os.environ) is not None:
    raise UserError(
      f"{command} runs in one process, and this is one of several: start it on one machine, in one process, with "
      "--num_processes=1 where a larger job is found"
    )


def _said(coordinator: str, process_id: int, num_processes: int) -> tuple[str | None, int | None, int | None]:
  """The flags as `processes.initialize` takes them."""
  return coordinator or None, None if process_id < 0 else process_id, num_processes or None


def set_up_logging() -> None:
  """Plain lines on stderr: everything of this project, warnings of others."""
  root = logging.getLogger()
  handler = output.Handler(lambda error: outcome(error) is not None)
  handler.setFormatter(output.Formatter("%(message)s"))
  logging.captureWarnings(True)
  root.handlers[:] = [handler]
  root.setLevel(logging.WARNING)
  logging.getLogger("absl").setLevel(logging.WARNING)  # which Orbax writes to
  for name in PROJECT_LOGGERS:
    logging.getLogger(name).setLevel(logging.INFO)


def set_up_compilation_cache() -> None:
  """Keeps compiled programs across runs, in IN2CORE_CACHE/xla or ~/.cache/in2core_jax/xla.

  JAX's own variable, where it is set, wins.
  """
  if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  try:
    folder = cache_folder() / "xla"
    folder.mkdir(parents=True, exist_ok=True)
  except (OSError, UserError) as error:
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
