"""The benchmark: order of measuring, operation counts against the traced programs, verdicts, its fresh processes."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from experiments.benchmark import benchmark, isolated, passes, reading, shapes
from experiments.benchmark.settings import BenchmarkSettings
from in2core_jax import gradients
from in2core_jax.costs import flop_counts, timing
from in2core_jax.data.records import Record
from in2core_jax.errors import UserError

quick_compile = tiny.quick_compile

CONFIG = dataclasses.replace(
  tiny.CONFIG, hidden_size=8, intermediate_size=16, num_layers=3, num_heads=2, num_kv_heads=1
)


@pytest.fixture
def settings(tmp_path):
  return tiny.run_settings(
    tmp_path,
    CONFIG,
    kind=BenchmarkSettings,
    synthetic_length=24,
    train_limit=10,
    eval_limit=2,
    test_limit=2,
    layers="last:1",
    score_layers="last:2",
    batch_tokens=96,
    batch_size=4,
    curvature_batch=4,
    microbatch=2,
    rounds=1,
    measure="times",
  )


@pytest.fixture
def one_device(monkeypatch):
  """The benchmark on one of the simulated devices: quick to compile."""
  monkeypatch.setattr(benchmark, "measured_session", lambda s: passes.measured_session(s, 1))


# ---- timing --------------------------------------------------------------------------


def test_every_round_has_every_row_between_its_references():
  calls, counted = [], []
  work = lambda name: lambda: calls.append(name)  # noqa: E731
  timings = timing.interleaved(
    {"forward": work("forward")}, {"a": work("a"), "b": work("b")}, rounds=3, on_measured=counted.append
  )
  there, back = ["forward", "a", "b", "forward"], ["forward", "b", "a", "forward"]
  assert calls == counted == ["forward", "a", "b", *there, *back, *there]
  assert {name: seconds.shape for name, seconds in timings.seconds.items()} == {"forward": (3,), "a": (3,), "b": (3,)}


def test_a_reference_counts_with_the_mean_of_its_two_measurements(monkeypatch):
  clock = [0.0]
  monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
  lasts = iter([100, 100, 2, 5, 4])  # the first two compile

  def work():
    clock[0] += next(lasts)

  timings = timing.interleaved({"forward": work}, {"a": work}, 1, lambda _: None)
  assert timings.seconds["forward"].tolist() == [3] and timings.seconds["a"].tolist() == [5]


def test_ratios_are_taken_within_a_round():
  # The machine is ten times slower in two rounds; medians of the columns would give 2.
  timings = timing.Timings({"a": np.array([3.0, 30, 20]), "forward": np.array([1.0, 10, 10])})
  assert timings.ratio("a", "forward") == 3 and timings.median("a") == 20


def test_rates_and_ratios_of_the_table():
  names = (benchmark.PRODUCT, passes.FORWARD, "score last:4", "score last:4, boundary cache")
  timings = timing.Timings({name: np.array([t]) for name, t in zip(names, (2.0, 4.0, 6.0, 1.5), strict=True)})
  flops = dict(zip(names, (400e9, 600e9, 900e9, 300e9), strict=True))
  table, figures = benchmark.time_rows(timings, flops, tokens=1200)
  row = table[2]
  assert row["to forward only"] == 1.5 and row["by operations"] == 1.5 and row["tokens/s"] == 200
  assert row["GFLOP/s"] == 150 and row["% of the matrix product"] == pytest.approx(75)  # of 200 GFLOP/s
  assert table[0]["to forward only"] is None and table[0]["GFLOP/s"] == 200
  assert figures["score last:4"] == 1.5 and figures["share of forward only"] == pytest.approx(0.75)
  assert figures["score last:4 speed-up"] == 4 and figures["tokens/s of score last:4"] == 200


def test_the_meter_counts_what_is_compiled_while_it_is_open():
  fresh = jax.jit(lambda x: jnp.sin(x) * 3)
  with timing.CompileMeter() as meter:
    fresh(jnp.ones(7)).block_until_ready()
  assert meter.programs >= 1 and meter.compile_seconds > 0 and meter.lower_seconds > 0
  programs = meter.programs
  with timing.CompileMeter() as again:
    fresh(jnp.ones(7)).block_until_ready()
  jax.jit(lambda x: jnp.cos(x) * 5)(1.0)
  assert again.programs == 0 and again.compile_seconds == 0 and meter.programs == programs


def test_the_peak_of_memory_starts_anew():
  assert timing.reset_peak_memory() == pathlib.Path("/proc/self/clear_refs").exists()
  before = timing.peak_memory()
  block = np.ones(40_000_000)  # 320 MB
  peak = timing.peak_memory()
  assert peak - before > 0.9 * block.nbytes
  del block
  if timing.reset_peak_memory():
    assert timing.peak_memory() < peak - 200e6


# ---- operations ----------------------------------------------------------------------


def inner_programs(equation):
  """The programs inside an equation: the body of a loop, a called function."""
  for value in equation.params.values():
    for item in value if isinstance(value, tuple | list) else (value,):
      item = getattr(item, "jaxpr", item)
      if hasattr(item, "eqns"):
        yield item


def matrix_operations(program) -> int:
  """2 M N K of the matrix products in a traced program, loops unrolled; without attention's, which have a batch."""
  total = 0
  for equation in program.eqns:
    total += equation.params.get("length", 1) * sum(map(matrix_operations, inner_programs(equation)))
    if equation.primitive.name == "dot_general":
      (summed, _), (batch, _) = equation.params["dimension_numbers"]
      shape = equation.invars[0].aval.shape
      total += 0 if batch else 2 * equation.outvars[0].aval.size * int(np.prod([shape[axis] for axis in summed]))
  return total


@pytest.mark.parametrize(("layers", "modules"), [("last:2", "matrices"), ("all", "attention"), ("1,3", "mlp")])
def test_operations_are_those_of_the_traced_programs(layers, modules):
  t = tiny.make_tiny(layers, modules)
  v = tiny.direction(t.sub)
  programs = {
    "losses": lambda sub: gradients.per_example_losses(t.objective, sub, t.frozen, t.batch),
    "jvp": lambda sub: gradients.losses_and_jvp_scores(t.objective, sub, t.frozen, t.batch, v),
    "gradient": lambda sub: gradients.sum_gradient(t.objective, sub, t.frozen, t.batch),
    "ggn": lambda sub: gradients.ggn_product(t.objective, sub, t.frozen, t.batch, v),
  }
  sizes = flop_counts.matrix_sizes(t.params, t.subtree)
  computed = t.batch.tokens.size, t.batch.slots.size  # padding is computed too
  for kind, program in programs.items():
    traced = matrix_operations(jax.make_jaxpr(program)(t.sub).jaxpr)
    assert traced == flop_counts.flops(kind, sizes, *computed), kind
  cached = flop_counts.flops("jvp", sizes, 10, 0, cached=True)
  assert flop_counts.flops("jvp", sizes, 10, 0) - cached == 2 * 10 * sizes.below


# ---- verdicts ------------------------------------------------------------------------


def test_verdicts():
  low = benchmark.Requirement("ratio", "score", 1.8, 1.6)
  assert [low.verdict(v) for v in (1.5, 1.7, 1.9, None)] == [
    "reached, and the aim",
    "reached",
    "missed",
    "not measured",
  ]
  high = benchmark.Requirement("share", "share", 0.55, 0.8, at_least=True)
  assert [high.verdict(v) for v in (0.5, 0.6, 0.8)] == ["missed", "reached", "reached, and the aim"]
  table = benchmark.verdicts({"score last:8": 1.7, "share of forward only": 0.3}, "cpu")
  assert [row["verdict"] for row in table if row["measured"]] == ["reached", "missed"]
  assert benchmark.verdicts({"tokens/s of score last:4": 2e5}, "gpu")[0]["verdict"] == "reached"


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"measure": "times,speed"}, "unknown 'speed'; use some of times, compile, memory"),
    ({"score_layers": "all,all"}, "a word is given twice"),
    ({"score_layers": "all,last:99"}, "^--score_layers=last:99: 99 is not between"),
    ({"device_counts": "2,1"}, "not a list of growing numbers"),
    ({"memory_examples": "0"}, "^memory_examples=0: '0' is wrong in this list of whole numbers, each at least 1"),
    ({"memory_examples": "8,4"}, "not a list of growing numbers"),
    ({"synthetic_length": 1}, "needs 2 or more tokens"),
    ({"train_limit": 0}, "--train_limit"),
    ({"boundary_cache": "off"}, "the benchmark needs one"),
  ],
)
def test_flags_that_mean_nothing_are_refused(settings, one_device, changes, message):
  with pytest.raises(UserError, match=message):
    benchmark.measure(settings.replace(**changes))


# ---- runs ----------------------------------------------------------------------------


def test_synthetic_examples(settings):
  parts = passes.synthetic_parts(settings.replace(synthetic_length=5), 37)
  assert {name: len(part) for name, part in parts.items()} == {"train": 10, "eval": 2, "test": 2}
  assert all(isinstance(record, Record) for record in parts["train"].records)
  assert all(mask.tolist() == [False, False, False, True, True] for mask in parts["eval"].response_mask)
  tokens = np.concatenate(parts["train"].tokens)
  assert tokens.min() >= 0 and tokens.max() < 37 and len(set(tokens.tolist())) > 10


@pytest.mark.slow
def test_passes_are_timed_and_reported(settings, one_device, monkeypatch, capsys):
  monkeypatch.setattr(benchmark, "_PRODUCT_SIZE", {"cpu": (32, 1)})
  folder = pathlib.Path(benchmark.run(settings))
  found = json.loads((folder / "benchmark.json").read_text())
  rows = {row["pass"]: row for row in found["times"]}
  assert list(rows) == [
    *("matrix product", "forward only", "score last:2", "score last:2, boundary cache"),
    *("index last:2", "index all", "score all, attention"),
    *("score last:2, vmap", "gradients last:2, vmap(grad)", "LiSSA last:1", "training all"),
    *("LiSSA last:1, boundary cache", "training last:1, boundary cache"),
  ]
  assert all(row["seconds"] > 0 for row in rows.values()) and rows["forward only"]["to forward only"] == 1
  layer, head, tokens, responses = 8 * (8 + 4 + 4 + 8) + 3 * 8 * 16, CONFIG.vocab_size * 8, 10 * 24, 10 * 12
  forward = 2 * 3 * layer * tokens + 2 * head * responses
  by_operations = {name: row["by operations"] for name, row in rows.items()}
  assert by_operations["score last:2"] == pytest.approx(
    (2 * 3 * layer * tokens + 8 * layer * tokens + 4 * head * responses) / forward
  )
  assert by_operations["score last:2"] < by_operations["score last:2, vmap"]
  text = (folder / "benchmark.md").read_text()
  assert capsys.readouterr().out.strip() == text.strip() and "| score last:2, boundary cache |" in text
  assert "not measured" in text and found["measured_on"]["dtype"] == "float32"


def test_rates_of_a_shape_and_its_share_of_the_peak():
  one = {"device": "gpu: NVIDIA H200", "tokens": 1000, "compilation": 9.0, "peak memory": 2e9}
  one["passes"] = {"forward only": {"seconds": 0.5, "flops": 989e11}, "index last:8": {"seconds": 1.0, "flops": 1e12}}
  found = {"cold": one, "warm": one | {"compilation": 1.0}, "agreement": 0.99}
  first, second = shapes.rows_of("tiny", found, "bfloat16")
  assert first["tokens/s"] == 2000 and first["% of the peak"] == pytest.approx(20)
  assert (first["compilation cold, s"], first["compilation warm, s"], first["Spearman with a CPU"]) == (9.0, 1.0, 0.99)
  assert second["pass"] == "index last:8" and "peak memory, GB" not in second
  assert shapes.peak_of("cpu: AMD EPYC", "float32") is None and shapes.peak_of("TPU v5p", "bfloat16") == 459e12


@pytest.mark.slow
def test_shapes_are_measured_once_and_kept(settings, monkeypatch):
  started = []

  def here(own, folder, environment):
    started.append(own.alone)
    folder.mkdir(parents=True)
    own = own.replace(run_dir=str(folder))
    return shapes.shape_alone(own) if own.alone == "shape" else isolated.score_alone(own)

  monkeypatch.setattr(isolated, "start", here)
  own = settings.replace(shapes=settings.model, boundary_cache="off")
  folder = pathlib.Path(benchmark.run(own))
  found = json.loads((folder / "benchmark.json").read_text())["shapes"]
  assert [row["pass"] for row in found] == ["forward only", "score last:2", "index last:2"]
  assert found[0]["Spearman with a CPU"] == pytest.approx(1) and started == ["shape", "shape", "score", "score"]
  benchmark.run(own)
  assert len(started) == 4


@pytest.mark.slow
def test_several_devices_score_like_one(settings, tmp_path):
  found, scores = {}, {}
  for name, changes in {
    "1": {"device_counts": "1"},
    "2": {"device_counts": "2", "mesh": ""},
    "fsdp": {"device_counts": "2", "mesh": "fsdp:2"},
  }.items():
    own = settings.replace(alone="score", run_dir=str(tmp_path / name), **changes)
    isolated.run_alone(own, {"score": isolated.score_alone})
    found[name] = json.loads((tmp_path / name / "alone.json").read_text())
    scores[name] = np.array(json.loads((tmp_path / name / "scores.json").read_text()))
  assert scores["1"].shape == (1, 10) and np.ptp(scores["1"]) > 0
  for name in ("2", "fsdp"):
    assert np.abs(scores[name] - scores["1"]).max() <= 1e-5 * np.abs(scores["1"]).max()
  weights = {name: row["bytes of weights"] for name, row in found.items()}
  assert weights["2"] == weights["1"] and weights["fsdp"] < 0.6 * weights["1"]
  assert found["1"]["tokens"] == 240 and found["1"]["examples"] == 10
  beyond = isolated.score_alone(settings.replace(device_counts="1000"))
  assert beyond == {"devices": len(jax.devices())}


@pytest.mark.slow
@pytest.mark.real
def test_memory_is_measured_in_processes_of_their_own(settings, monkeypatch):
  for name, value in tiny.child_environment(devices=1).items():
    monkeypatch.setenv(name, value)
  (row,) = isolated.measure_memory(settings, "last:1", [6])
  assert row["examples"] == 6 and row["growth, %"] == 0 and row["peak memory"] > 50e6


@pytest.mark.slow
def test_reading_is_measured_step_by_step(tmp_path):
  """The pool has the same bytes each time; memory is told beside that of the imports."""
  for name in ("a", "b"):
    reading.write_pool(tmp_path / name, 30)
  assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
  found = reading.measure(tmp_path / "a")
  assert found["tokens"] > 30 * (reading.PROMPT + reading.RESPONSE)
  assert found["seconds"] >= found["read"] + found["tokenise"] and found["peak_mb"] >= found["imports_mb"]
  assert "| ours | 30 |" in reading.table(30, {"ours": found})
