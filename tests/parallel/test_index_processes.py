"""An index by two processes: each writes its own shards, a dead one costs what it had not written."""

import os
import re

import jax
import numpy as np
import pytest
import tiny

from experiments import stages
from experiments.settings import IndexFlags
from in2core_jax.index import store
from in2core_jax.pipeline import index
from in2core_jax.runs.shards import ShardStore

quick_compile = tiny.quick_compile


def worker(dies_after: int) -> None:
  """`index` as one of the processes, which tells what rows it writes; process 1 dies after so many of them."""
  write, written = ShardStore.write, []

  def tell_or_die(self, number, arrays):
    if self.path.name == "rows":
      if jax.process_index() == 1 and len(written) == dies_after:
        os._exit(9)
      written.append(number)
      print(f"rows of shard {number}", flush=True)
    write(self, number, arrays)

  ShardStore.write = tell_or_die
  stages.start("index", IndexFlags)


def written_by(output: str) -> set[int]:
  """The shards of rows that a process says it wrote."""
  return set(map(int, re.findall(r"^rows of shard (\d+)$", output, re.MULTILINE)))


@pytest.mark.slow
@pytest.mark.real
def test_two_processes_make_the_index_of_one_and_a_dead_one_costs_its_shard(tmp_path):
  small = {"index_size": 8, "index_hidden": 4, "shard_batches": 1, "batch_tokens": 192}
  s = tiny.run_settings(tmp_path, kind=IndexFlags, run_dir=str(tmp_path / "one"), **small)
  session = tiny.open_session(s)
  index.run(s, session)
  job = s.replace(run_dir=str(tmp_path / "two"), mesh="data:8")

  def run(dies_after):
    own = [*job.as_flags(), f"--coordinator=localhost:{tiny.free_port()}", "--num_processes=2"]
    program = f"import test_index_processes; test_index_processes.worker({dies_after})"
    return tiny.run_processes(program, [[*own, f"--process_id={number}"] for number in (0, 1)], mortal=1)

  killed = run(dies_after=0)
  assert killed[1][0] == 9 and killed[0][0] != 0, killed[1][1][-3000:]
  there = {number for number in range(99) if (tmp_path / f"two/rows/{number:06d}.shard").exists()}
  done = run(dies_after=-1)
  assert [code for code, _ in done] == [0, 0], "\n".join(output[-3000:] for _, output in done)
  zero, one = (written_by(output) for _, output in done)
  shards = set(range(sum(part["shards"] for part in store.IndexStore.load(job.run_dir).run_dir.load_json(store.PARTS))))
  assert there and zero and one and not zero & one and zero | one == shards - there
  assert_same_index(s, job, session)


def assert_same_index(s, other, session) -> None:
  """Squares, losses and products of two indexes are equal: a basis may be turned, and rows are bfloat16."""
  train = session.splits["train"]
  keys, held = store.keys_of(train.tokens, train.response_mask), [store.IndexStore.load(x.run_dir) for x in (s, other)]
  wanted, found = (one.read_rows(keys, train.ids) for one in held)
  for name in ("square", "hidden_square", "loss"):
    np.testing.assert_allclose(found.values(name), wanted.values(name), rtol=1e-5, err_msg=name)
  queries = [one.read_queries()["gradients"] for one in held]
  products = [rows @ rows.T for rows in queries]
  np.testing.assert_allclose(products[1], products[0], atol=1e-5 * np.abs(products[0]).max())
  every = np.arange(len(wanted))
  inside = [rows @ one.take(every).gradients.T for rows, one in zip(queries, (wanted, found), strict=True)]
  np.testing.assert_allclose(inside[1], inside[0], atol=1e-2 * np.abs(inside[0]).max())
