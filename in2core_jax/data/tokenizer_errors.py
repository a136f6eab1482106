"""What the tokenizers library raises, in one line."""

import contextlib

from in2core_jax.errors import UserError, one_line


@contextlib.contextmanager
def told_by_tokenizers(what: str):
  """Turns what the tokenizers library raises into one line that begins with `what`.

  It raises bare `Exception`s, and its panics are `BaseException`s, which nothing else would stop.
  """
  try:
    yield
  except BaseException as error:
    # Its errors are of Python's own classes; what is derived from these has a reason of its own.
    bare = type(error) in (Exception, ValueError, TypeError, KeyError, OSError, OverflowError)
    if not bare and type(error).__name__ != "PanicException":
      raise
    raise UserError(
      f"{what} ({one_line(error)}); save the tokenizer again, or take it from the model's own source"
    ) from error
