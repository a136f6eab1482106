"""Several processes as one job, and stages on 1, 2, 4 and 8 devices: the numbers of one device."""

import dataclasses
import json
import sys
import types
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest
import tiny
from fsspec.registry import _registry as fsspec_registry

from experiments import flags as flags_lib
from in2core_jax.errors import UserError
from in2core_jax.ihvp import solvers
from in2core_jax.parallel import processes, sharding
from in2core_jax.pipeline import evaluate, finetune, select
from in2core_jax.pipeline import session as sessions
from in2core_jax.pipeline.scoring import score
from in2core_jax.pipeline.session import choose
from in2core_jax.runs import files, run_folder
from in2core_jax.runs.unfinished import Work

quick_compile = tiny.quick_compile
# Nothing divides: a width of 20 not by 8, 37 examples by no number of devices.
CONFIG = dataclasses.replace(tiny.CONFIG, hidden_size=20, intermediate_size=36, num_layers=3, head_dim=6)
FLAGS = {
  "max_length": 40,
  "train_limit": 37,
  "eval_limit": 9,
  "test_limit": 9,
  "depth": 3,
  "curvature_examples": 7,
  "curvature_batch": 7,
  "trainable_layers": "last:1",
  "steps": 4,
  "checkpoint_every": 2,
  "batch_size": 5,
  "policies": "random",
  "seeds": "0",
}


# ---- start


def test_one_process_needs_no_start():
  assert processes.initialize() is False
  assert processes.initialize(num_processes=1) is False


@pytest.mark.parametrize(
  "flags, words",
  [
    (("localhost:1234", None, 2), "without --process_id"),
    ((None, 1, None), "without --coordinator and --num_processes"),
    ((None, None, 4), "without --coordinator and --process_id"),
    (("localhost:1234", 2, 2), "between 0 and 1"),
    (("localhost", 0, 2), "must be host:port"),
    (("localhost:1234", 0, 0), "at least 1"),
    (("localhost:1234", 1, 1), "between 0 and 0"),
  ],
)
def test_initialize_refuses(flags, words):
  with pytest.raises(UserError, match=words):
    processes.initialize(*flags)


def test_a_coordinator_that_is_not_there_is_named():
  with pytest.raises(
    UserError, match=r"--coordinator=localhost:\d+: no answer from there after 0 s .*is process 0 running"
  ):
    processes.initialize(f"localhost:{tiny.free_port()}", 1, 2, timeout=0)


SLURM = {"SLURM_JOB_ID": "5", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}


@pytest.mark.parametrize(
  "more, coordinator, local",
  [
    ({"SLURM_STEP_NODELIST": "node[007-010,12]", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, "node007", [1]),
    ({"SLURM_STEP_NODELIST": "a1,b2", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "CUDA_VISIBLE_DEVICES": "0"}, "a1", None),
    ({"SLURM_STEP_NODELIST": "gpu[3-6]-ib", "SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, "gpu3-ib", None),
    (
      {"SLURM_STEP_NODELIST": "n1", "SLURM_STEP_TASKS_PER_NODE": "4", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"},
      "n1",
      [2, 3],
    ),
  ],
)
def test_slurm(more, coordinator, local):
  settings = processes.start_settings(None, None, None, SLURM | {"SLURM_STEP_NUM_TASKS": "4"} | more)
  assert settings["coordinator_address"] == f"{coordinator}:61445"
  assert (settings["process_id"], settings["num_processes"]) == (3, 4)
  assert settings["local_device_ids"] == local


def test_slurm_outside_a_step_is_one_process():
  assert processes.start_settings(None, None, None, SLURM | {"SLURM_NTASKS": "4", "JAX_PLATFORMS": "cpu"}) is None
  one = SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "n1", "JAX_PLATFORMS": "cpu"}
  assert processes.start_settings(None, None, None, one) is None


@pytest.mark.parametrize(
  "environ, several",
  [
    ({"TPU_WORKER_HOSTNAMES": "t0,t1"}, True),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ({"TPU_WORKER_HOSTNAMES": "t0", "MEGASCALE_NUM_SLICES": "2"}, True),
    ({}, True),  # a TPU VM: JAX asks the machine
    ({"TPU_SKIP_MDS_QUERY": "1"}, False),
    ({"TPU_WORKER_HOSTNAMES": "t0,t1", "JAX_PLATFORMS": "cpu"}, False),
  ],
)
def test_tpu_pod(environ, several, monkeypatch):
  monkeypatch.setitem(sys.modules, "libtpu", types.ModuleType("libtpu"))
  sys.modules["libtpu"].__spec__ = object()
  assert processes.start_settings(None, None, None, environ) == ({} if several else None)


# ---- values that all processes need


def test_one_process_agrees_with_itself():
  assert processes.is_writer() and processes.from_writer({"a": (1, 2.5)}) == {"a": [1, 2.5]}
  assert processes.all_true(True) and not processes.all_true(False)
  processes.barrier("nothing to wait for")


# ---- stages on several devices


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
  return tiny.run_settings(tmp_path_factory.mktemp("processes"), CONFIG, **FLAGS)


@pytest.fixture(scope="module")
def session(settings):
  return tiny.open_session(settings)


def on_mesh(session, spec):
  """The same model and data on as many of the simulated devices as a --mesh says."""
  size = np.prod([int(part.split(":")[1]) for part in spec.split(",")])
  model = session.model.on(sharding.make_mesh(spec, jax.devices()[:size]))
  return sessions.make_session(session.settings.replace(mesh=spec), session.splits, model)


def scored_on(session, folder, **changes):
  chosen = choose(session, session.model.params, session.settings.layers, session.settings.modules)
  return chosen, score(session, session.settings.replace(**changes), chosen, Work(run_folder.RunDir.open(folder, {})))


def bytes_on_first_device(tree):
  first = jax.devices()[0]
  shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
  return sum(shard.data.nbytes for shard in shards if shard.device == first)


@pytest.fixture(scope="module")
def alone(session, tmp_path_factory):
  """Scores on one device."""
  return scored_on(session, tmp_path_factory.mktemp("alone"))[1]


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("spec", ["data:2,fsdp:2", "fsdp:8"])
def test_any_mesh_gives_the_scores_of_one_device(session, alone, spec, tmp_path, monkeypatch):
  wide = on_mesh(session, spec)
  to_arrays, states = solvers.state_to_arrays, []
  monkeypatch.setattr(solvers, "state_to_arrays", lambda state: states.append(state) or to_arrays(state))
  chosen, found = scored_on(wide, tmp_path)
  scale = np.abs(alone.influence).max()
  np.testing.assert_allclose(found.influence, alone.influence, rtol=0, atol=1e-5 * scale)
  np.testing.assert_allclose(found.loss, alone.loss, rtol=1e-5, atol=1e-6)
  fsdp = wide.batching.mesh.shape["fsdp"] if CONFIG.hidden_size % wide.batching.mesh.shape["fsdp"] == 0 else 1
  # Weights and iHVP vectors are cut over fsdp, but for the norms; nothing more lies on each device than on one.
  vectors = (found.result.solution, *((state.u, state.mean) for state in states))
  assert len(vectors) > 1
  for tree in (chosen.problem.sub, chosen.problem.frozen, *vectors):
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    assert bytes_on_first_device(tree) <= whole / fsdp + 0.02 * whole


@pytest.mark.slow
@pytest.mark.real
def test_cg_on_a_mesh_gives_the_scores_of_one_device(session, tmp_path):
  """The default solver, to its residual; what it solves for is cut over fsdp."""
  default = {"solver": "cg", "damping_ratio": 0.01, "solver_tol": 1e-4, "depth": 40}
  both = {"one": session, "wide": on_mesh(session, "data:2,fsdp:2")}
  (_, one), (_, found) = (scored_on(b, tmp_path / name, **default) for name, b in both.items())
  assert one.result.steps > 3 and np.max(found.result.residual) < 1e-4 and np.max(one.result.residual) < 1e-4
  scale = np.abs(one.influence).max()
  np.testing.assert_allclose(found.influence, one.influence, rtol=0, atol=1e-3 * scale)
  whole = sum(leaf.nbytes for leaf in jax.tree.leaves(found.result.solution))
  assert bytes_on_first_device(found.result.solution) <= 0.52 * whole


# ---- run folders on an object store


@pytest.mark.slow
@pytest.mark.real
def test_select_writes_to_an_object_store(settings, session, monkeypatch, tmp_path, caplog):
  """fsspec's store in memory stands for the one behind gs://; only what is read at random stays on the local disk."""
  memory = fsspec.get_filesystem_class("memory")
  for scheme in ("gs", "gcs"):
    monkeypatch.setitem(fsspec_registry, scheme, memory)
  memory.store.clear()
  monkeypatch.setenv("IN2CORE_CACHE", str(tmp_path))
  remote = settings.replace(run_dir="gs://bucket/runs/a", boundary_cache="disk", solver="ekfac", policy="matching")
  cloudy = sessions.make_session(remote.replace(sketch_size=4), session.splits, session.model)
  with caplog.at_level("INFO"):
    folder = select.run(cloudy.settings, cloudy)
  assert folder == "gs://bucket/runs/a" and str(tmp_path / "boundary") in caplog.text
  assert {path.name.split("-")[0] for path in (tmp_path / "boundary").iterdir()} == {"train", "eval"}
  there = {path.split("bucket/runs/")[1].rsplit("/", 1)[0] for path in memory.store}
  stores = {path for path in there if path.startswith("projected/")}
  assert {"a", "a/plots", "ekfac"} <= there and stores and not [path for path in there if "boundary" in path]
  assert len(run_folder.read_scores(f"{folder}/scores.parquet")["influence"]) == len(session.splits["train"])
  written = dict(memory.store)
  select.run(cloudy.settings, cloudy)  # finished already
  assert memory.store.keys() == written.keys() and all(memory.store[path] is written[path] for path in written)


# ---- stages in two processes


def stages(s, session) -> None:
  """Select from the base model, a fine-tuning that is killed and goes on, a comparison; as one of the processes."""
  folder = Path(s.run_dir)
  selected = select.run(s.replace(run_dir=str(folder / "select")), session)
  select.run(s.replace(run_dir=str(folder / "select-cg"), solver="cg", damping_ratio=0.01), session)
  training = s.replace(run_dir=str(folder / "finetune"))
  with tiny.killed_after_step(3):
    finetune.run(training, session)
  tuned = session.checkpoint_params(finetune.run(training, session))
  before, after = (jax.tree.leaves(processes.to_host(params)) for params in (session.model.params, tuned))
  moved = [np.any(a != b) for a, b in zip(before, after, strict=True)]
  assert 0 < sum(moved) < len(moved)  # the chosen layer's leaves, and none of the embedding and the last norm
  judged = s.replace(
    run_dir=str(folder / "evaluate"), select_runs=selected, policies="random", seeds="0", fixed_seeds="0"
  )
  evaluate.run(judged, session)


def main(_) -> None:
  """One of two processes; `cli.run` has joined them by then."""
  assert (jax.process_count(), jax.local_device_count(), jax.device_count()) == (2, 4, 8)
  if not processes.is_writer():
    write = files.write_bytes

    def only_shards(path, data):
      assert str(path).endswith(".shard"), f"process 1 writes {path}"
      write(path, data)

    files.write_bytes = run_folder.write_bytes = only_shards
  s = flags_lib.read()
  stages(s, sessions.open_session(s))


def worker() -> None:
  """The program that two processes run."""
  from experiments import cli

  flags_lib.define()
  cli.run(main)


@pytest.mark.slow
@pytest.mark.real
def test_two_processes_run_the_stages_as_one_does(settings, session, tmp_path):
  job = settings.replace(run_dir=str(tmp_path / "two"), mesh="data:4,fsdp:2")
  flags_ = [*job.as_flags(), f"--coordinator=localhost:{tiny.free_port()}", "--num_processes=2"]
  program = "import test_processes; test_processes.worker()"
  done = tiny.run_processes(program, [[*flags_, "--process_id=0"], [*flags_, "--process_id=1"]])
  assert [code for code, _ in done] == [0, 0], "\n".join(output[-3000:] for _, output in done)
  assert "loading model" in done[0][1] and "loading model" not in done[1][1]
  stages(settings.replace(run_dir=str(tmp_path / "one")), session)
  folders = {name: tmp_path / name for name in ("one", "two")}
  for name, tolerance in (("select", 1e-5), ("select-cg", 1e-4)):
    one, two = (run_folder.read_scores(folder / name / "scores.parquet") for folder in folders.values())
    scale = np.abs(one["influence"]).max()
    np.testing.assert_allclose(two["influence"], one["influence"], rtol=0, atol=tolerance * scale)
    np.testing.assert_array_equal(two["selected"], one["selected"])
  one, two = ((f / "finetune/metrics.jsonl").read_text().splitlines() for f in folders.values())
  assert [json.loads(line)["step"] for line in two] == [1, 2, 3, 4]
  losses = [[json.loads(line)["loss"] for line in lines] for lines in (one, two)]
  np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
  one, two = (run_folder.read_json(folder / "evaluate/evaluation.json") for folder in folders.values())
  assert two["base_perplexity"] == pytest.approx(one["base_perplexity"], rel=1e-5)
  for row, other in zip(one["table"], two["table"], strict=True):
    assert other["perplexity"] == pytest.approx(row["perplexity"], rel=1e-3)
  assert run_folder.read_json(tmp_path / "two/select/summary.json")["devices"]["num_processes"] == 2
