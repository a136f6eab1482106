"""The one error type that entry points turn into a single line and exit code 2."""


class UserError(ValueError):
  """A mistake in what the caller gave: a flag, a file, a checkpoint, a data set.

  The message says what was seen (file, line, id, value), why it is wrong and what to do about it, in one line.
  Entry points print it without a traceback and exit with code 2; anything else that is raised is our own bug.
  """
