"""Commands end with the right exit code and one line, through real processes."""

import collections
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags as absl_flags

from experiments import cli, output
from in2core_jax.errors import UserError
from in2core_jax.parallel import processes

ROOT = Path(__file__).resolve().parents[2]
HEAD = """
import logging, os, signal, sys, time
from absl import flags
from experiments import cli
from in2core_jax.errors import UserError
flags.DEFINE_float("fraction", 0.5, "share to keep", lower_bound=0.0)
flags.DEFINE_string("run_dir", "", "folder")
"""


def command(tmp_path: Path, body: str, *arguments: str) -> subprocess.Popen:
  """Starts a command whose main function has the given body."""
  lines = "\n".join(f"  {line}" for line in body.strip().splitlines())
  path = tmp_path / "command.py"
  path.write_text(f'"""A command."""\n{HEAD}\ndef main(argv):\n{lines}\n\ncli.run(main)\n')
  environment = os.environ | {"PYTHONPATH": str(ROOT), "IN2CORE_CACHE": str(tmp_path / "cache")}
  environment.pop("JAX_COMPILATION_CACHE_DIR", None)
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  return subprocess.Popen([sys.executable, "-P", str(path), *arguments], env=environment, cwd=tmp_path, **pipes)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
  out, err = process.communicate(timeout=60)
  return process.returncode, out, err


@pytest.mark.parametrize(
  ("arguments", "seen"),
  [
    (["--fractoin=0.5"], "fractoin"),
    (["--fraction=many"], "many"),
    (["--fraction=-1"], "fraction"),
    (["--flagfile=nowhere.flags"], "--flagfile=nowhere.flags: No such file or directory; give the path"),
    (["--flagfile=binary.flags"], "not UTF-8"),
    (["select"], "unexpected argument 'select'"),
  ],
)
def test_wrong_flags_are_one_line_and_exit_code_2(tmp_path, arguments, seen):
  (tmp_path / "binary.flags").write_bytes(b"--run_dir=\xff\xfe\n")
  code, out, err = finish(command(tmp_path, "print('ran')", *arguments))
  assert (code, out) == (2, "")
  assert err.startswith("error: ") and err.count("\n") == 1 and seen in err


@pytest.mark.parametrize(
  ("body", "code", "start"),
  [
    ("from in2core_jax.errors import UserError; raise UserError('x.jsonl:\\n line 3')", 2, "error: x.jsonl: line 3\n"),
    ("raise KeyboardInterrupt", 130, "stopped by Ctrl-C; finished work is kept"),
    ("raise MemoryError('9 GB')", 1, "error: out of memory (9 GB)"),
    ("raise OSError(28, 'No space left on device', 'scores.parquet')", 1, "error: disk full"),
    (
      "raise RuntimeError('RESOURCE_EXHAUSTED: 9 GB\\nstack')",
      1,
      "error: out of device memory (RESOURCE_EXHAUSTED: 9 GB)",
    ),
    ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)", 143, "stopped by SIGTERM; finished work is kept"),
    ("raise OSError(27, 'File too large', 'x')", 1, "error: file too large"),
    ("raise OSError(36, 'File name too long', 'x')", 2, "error: x: File name too long; choose another path"),
    ("raise ValueError('RESOURCE_EXHAUSTED: x: No space left on device')", 1, "error: disk full (RESOURCE_EXHAUSTED"),
    ("raise ExceptionGroup('a', [OSError(122, 'Disk quota exceeded')])", 1, "error: disk full"),
    ("def f(): f()\nf()", 1, "error: something is nested too deeply (maximum recursion"),
    ("raise type('PanicException', (BaseException,), {})('index out')", 1, "error: a library has failed inside (index"),
    ("raise UserError('\\x1b[2Jhi\\u202e \\ud800 \\u2028 x')", 2, r"error: \x1b[2Jhi\u202e \ud800 x"),
  ],
)
def test_errors_are_one_line(tmp_path, body, code, start):
  assert_code, _, err = finish(command(tmp_path, body))
  assert assert_code == code
  assert err.startswith(start) and err.count("\n") == 1


@pytest.mark.parametrize(
  ("end", "code"),
  [("return 5", 5), ("return", 0), ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)", 143)],
)
def test_nothing_that_breaks_while_jax_is_taken_down_changes_the_exit_code(tmp_path, end, code):
  body = f"import atexit, jax\natexit.register(os.abort)\nprint('done')\n{end}"
  assert finish(command(tmp_path, body))[:2] == (code, "done\n")


def test_output_that_is_lost_is_told(tmp_path):
  code, _, err = finish(command(tmp_path, "import jax\nsys.stdout = open('/dev/full', 'w')\nprint('done')"))
  assert code == 1 and err.startswith("error: output is lost") and err.count("\n") == 1
  code, _, err = finish(command(tmp_path, "import jax\nsys.stdout = None"))
  assert (code, err) == (0, "")


LOUD = """
import logging, pathlib
from in2core_jax.runs import locks
log = logging.getLogger("in2core_jax.x")
log.info("before")
pathlib.Path("run").mkdir()
lock = locks.take("run")
log.info("after")
print("result", file=sys.stderr)
pathlib.Path("run/result").write_text("done")
"""


def test_a_job_whose_log_is_lost_goes_on_and_says_it_in_the_run_folder(tmp_path):
  process = command(tmp_path, LOUD)
  process.stderr.close()  # as `| head` does
  assert process.wait(timeout=60) == 0
  process.stdout.close()
  told = (tmp_path / "run" / "log_lost.txt").read_text()
  assert (tmp_path / "run" / "result").read_text() == "done"
  assert told.startswith("--- stderr was lost ([Errno 32] Broken pipe); the job continues")
  assert told.endswith("---\nbefore\nafter\nresult\n")
  assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["log_lost.txt", "result"]


@pytest.mark.parametrize(("text", "shown"), [("Event loop is closed", False), ("another", True)])
def test_answers_that_come_too_late_after_a_failed_write_are_no_news(capsys, monkeypatch, text, shown):
  class Raises:
    def __del__(self):
      raise RuntimeError(text)

  monkeypatch.setattr(sys, "unraisablehook", output._pass_over_late_answers)
  Raises()
  assert (f"RuntimeError: {text}" in capsys.readouterr().err) is shown


@pytest.mark.parametrize("ends", ["2>/dev/full", "2>&-", "2>&- >&-", "2>&- >&- <&-", "2>/dev/full >/dev/null"])
def test_a_full_or_closed_log_changes_no_exit_code(tmp_path, ends):
  process = command(tmp_path, LOUD + "print('out')\nreturn 3")
  process.kill()
  process.communicate()
  line = f"cd {tmp_path}; PYTHONPATH={ROOT} exec {sys.executable} -P command.py {ends}"
  done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, timeout=60)
  assert done.returncode == 3 and done.stderr == ""
  assert "after\nresult\n" in (tmp_path / "run" / "log_lost.txt").read_text()
  assert (tmp_path / "run" / "result").read_text() == "done"


def test_no_text_steers_the_terminal(tmp_path):
  body = """
import logging, warnings
from in2core_jax.runs.progress import Progress
text = "a\\x1b[31mb\\u202ec\\x9bd\\u2029e\\ud800"
logging.getLogger("in2core_jax.x").info("%s\\nnext", text)
print(text)
warnings.warn(text)
with Progress(2, text) as progress:
  progress.update(2, loss=text)
raise ValueError(text)
"""
  code, out, err = finish(command(tmp_path, body))
  assert code == 1 and out == "a\\x1b[31mb\\u202ec\\x9bd\\u2029e\\ud800\n"
  assert err.splitlines()[:2] == [out.strip(), "next"] and err.count(out.strip()) >= 5
  assert not [c for c in out + err if c < " " and c != "\n" or c in "\x1b\x9b\u202e\u2029"]


def test_our_own_bug_keeps_its_traceback(tmp_path):
  code, _, err = finish(command(tmp_path, "raise ValueError('ours')"))
  assert code == 1 and "Traceback" in err and "ValueError: ours" in err


def test_other_os_errors_keep_their_traceback(tmp_path):
  code, _, err = finish(command(tmp_path, "open('nowhere')"))
  assert code == 1 and "Traceback" in err and "FileNotFoundError" in err


def test_success_passes_flags_and_logs_plain_lines(tmp_path):
  (tmp_path / "run.flags").write_text("# comment\n--fraction=0.25\n")
  body = """
print(flags.FLAGS.fraction, argv[1:], os.environ["JAX_COMPILATION_CACHE_DIR"])
logging.getLogger("in2core_jax.x").info("ours")
logging.getLogger("jax").info("theirs")
logging.getLogger("jax").warning("their warning")
return 3
"""
  code, out, err = finish(command(tmp_path, body, "--flagfile=run.flags"))
  assert (code, err) == (3, "ours\ntheir warning\n")
  assert out == f"0.25 [] {tmp_path}/cache/xla\n"


def test_help_names_the_flags_and_exits_0(tmp_path):
  code, out, _ = finish(command(tmp_path, "print('ran')", "--help"))
  assert code == 0 and out.startswith("A command.") and "share to keep" in out and "ran" not in out


def test_help_for_a_reader_that_has_gone(tmp_path):
  process = command(tmp_path, "pass", "--help")
  process.stdout.close()  # as `| head` does
  assert process.wait(timeout=60) == 0 and process.stderr.read() == ""
  process.stderr.close()


def test_loop_finishes_its_piece_on_sigterm(tmp_path):
  body = """
from in2core_jax.runs import stopping
with stopping.finish_on_sigterm() as stop_requested:
  for piece in range(1000):
    print("begin", piece, flush=True)
    time.sleep(0.3)
    print("end", piece, flush=True)
    if stop_requested():
      break
print("after")
"""
  process = command(tmp_path, body)
  first = process.stdout.readline()
  process.send_signal(signal.SIGTERM)
  code, out, err = finish(process)
  lines = (first + out).splitlines()
  assert code == 143 and len(lines) < 1000 and "after" not in lines
  assert lines[-1].startswith("end")  # the piece under way was finished
  assert err.splitlines()[-1].startswith("stopped by SIGTERM")


SLURM = {"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_TASKS": "2"}


@pytest.mark.parametrize(
  ("arguments", "variables", "refused"),
  [
    ([], {}, False),
    (["--coordinator=h:1", "--process_id=0", "--num_processes=2"], {}, True),
    ([], SLURM, True),
    (["--num_processes=1"], SLURM, False),
  ],
)
def test_a_command_for_one_process_refuses_to_be_one_of_several(monkeypatch, arguments, variables, refused):
  own = absl_flags.FlagValues()
  absl_flags.DEFINE_string("coordinator", "", "", flag_values=own)
  absl_flags.DEFINE_integer("process_id", -1, "", flag_values=own)
  absl_flags.DEFINE_integer("num_processes", 0, "", flag_values=own)
  monkeypatch.setattr(absl_flags, "FLAGS", own)
  for name in ("set_up_logging", "set_up_compilation_cache"):
    monkeypatch.setattr(cli, name, lambda: None)
  monkeypatch.setattr(processes, "initialize", lambda *_: pytest.fail("waits for the others") if refused else False)
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  argv = own(["experiments/study.py", *arguments])
  if refused:
    with pytest.raises(UserError, match="study runs in one process, and this is one of several: .* --num_processes=1"):
      cli._prepare_and_call(lambda _: 7, argv, alone=True)
  else:
    assert cli._prepare_and_call(lambda _: 7, argv, alone=True) == 7


def test_commands_with_cells_are_for_one_process():
  texts = collections.defaultdict(str)
  for path in (ROOT / "experiments").rglob("*.py"):
    texts[path.stem if path.parent.name == "experiments" else path.parent.name] += path.read_text()
  alone = {name for name, text in texts.items() if "cli.run(main, alone=True)" in text}
  # children of their own, cells of a room, one folder, the old name of solvers
  others = {"paper", "recommend", "export", "interop", "large_pools", "oracle"}
  assert alone == others | {name for name, text in texts.items() if "import ResultCache" in text}


def test_help_and_wrong_flags_do_not_wait_for_large_libraries():
  modules = [f"experiments.{name}" for name in ("finetune", "select", "evaluate", "index", "recommend.__main__")]
  large = {"jax", "scipy", "matplotlib", "transformers", "orbax", "pyarrow"}
  code = f"import sys\nimport {', '.join(modules)}\nprint(sorted({large} & set(sys.modules)))"
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
  assert done.stdout == "[]\n"
