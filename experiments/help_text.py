"""The text of --help: a command's own flags in order of use, one sentence each; --helpfull has the rest."""

import difflib
import sys
import textwrap

from absl import flags

SHOWN, HIDDEN = "flags: ", "more flags: "  # how titles begin of flags that --help shows, and leaves out
WIDTH, _COLUMN = 100, 30


def help_text(full: bool = False, known: flags.FlagValues = flags.FLAGS) -> str:
  """The command's docstring, its flags by title, and how to read flags from a file.

  Titles are the module names of absl flags, a flag's first line of help is its sentence (`flags.define`).

  Args:
    full: also what else there is to say of a flag, the flags of other commands, and old names.
    known: the flags; those of the process unless told.
  """
  doc = (sys.modules["__main__"].__doc__ or "").strip()
  blocks = [doc]
  for title, members in known.flags_by_module_dict().items():
    if not is_ours(title) or title.startswith(HIDDEN) and not full:
      continue
    lines = [line for flag in members for line in _lines(flag, full)]
    blocks.append("\n".join([f"{title.removeprefix(SHOWN).removeprefix(HIDDEN)}:", *lines]))
  more = "" if full else "; --helpfull explains more, also other commands' flags"
  return "\n\n".join([*blocks, f"--flagfile=FILE reads flags from a file{more}"])


def is_ours(title: str) -> bool:
  """Whether flags of that module are the project's: of a command's own file, or under a title of `flags.define`."""
  return title == sys.argv[0] or title.startswith((SHOWN, HIDDEN, "experiments.", "in2core_jax.", "__main__"))


def our_flags() -> set[str]:
  """Names of the project's flags, those of other commands too."""
  titles = flags.FLAGS.flags_by_module_dict().items()
  return {flag.name for title, members in titles if is_ours(title) for flag in members}


def unknown_flag(name: str) -> str:
  """One line on a flag that there is not, with the nearest of any command and of this one."""
  ours = {title: members for title, members in flags.FLAGS.flags_by_module_dict().items() if is_ours(title)}
  every = our_flags()
  own = {flag.name for title, members in ours.items() if not title.startswith(HIDDEN) for flag in members}
  near = list(dict.fromkeys(found for known, most in ((every, 1), (own, 2)) for found in _like(name, known, most)))
  meant = f"; did you mean {' or '.join(f'--{other}' for other in near)}?" if near else ""
  return f"unknown flag --{name}{meant or ';'} --help lists the flags"


def _like(name: str, known: set[str], most: int) -> list[str]:
  return difflib.get_close_matches(name, sorted(known), most, 0.65)


def _lines(flag: flags.Flag, full: bool) -> list[str]:
  """A flag, its default and its sentence."""
  text, _, more = (flag.help or "").partition("\n")
  choices = [choice for choice in getattr(flag.parser, "enum_values", None) or () if choice]
  if choices:
    text = text.partition(">: ")[2]  # without absl's own list
    text = f"{text} One of {', '.join(choices)}."
  default = "" if flag.default is None else str(flag.default).lower() if flag.boolean else flag.default
  name = f"  --{flag.name}={default}"
  told = textwrap.wrap(f"{text} {more}" if full else text, WIDTH - _COLUMN, break_on_hyphens=False)
  first, rest = (told[:1], told[1:]) if len(name) < _COLUMN - 1 else ([], told)
  return [f"{name:<{_COLUMN}}{''.join(first)}".rstrip(), *(f"{'':<{_COLUMN}}{line}" for line in rest)]
