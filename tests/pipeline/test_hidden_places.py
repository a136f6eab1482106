"""Where hidden states are kept: worth it, and room for it."""

import pytest

from in2core_jax.pipeline.hidden_states import Place


@pytest.mark.parametrize(
  ("how", "megabytes", "free", "base", "expected"),
  [
    ("auto", 100, 2000, True, True),
    ("auto", 100, 900, True, False),  # more than a tenth of what is free
    ("auto", 100, 2000, False, False),  # of a trained model: no other command asks for them
    ("auto", 10, 2000, True, False),  # made again in seconds
    ("auto", 5000, 6000, False, True),  # too much for memory
    ("memory", 100, 2000, True, False),
    ("disk", 1, 1, False, True),
  ],
)
def test_hidden_states_are_kept_for_the_next_command_where_it_is_worth_it(
  monkeypatch, tmp_path, how, megabytes, free, base, expected
):
  monkeypatch.setattr("in2core_jax.pipeline.hidden_states.files.disk_free", lambda _: free * 1e6)
  assert Place(how, 4.0, str(tmp_path / "run")).on_disk(megabytes * 10**6, base) is expected
