"""--dry_run and --batch_tokens=auto: what they say is what the run has, and what does not fit is told with a flag."""

import contextlib
import dataclasses
import pathlib

import pytest
import tiny
from absl import flags as absl_flags

from experiments import flags, scaling
from experiments.coverage.settings import CoverageSettings
from in2core_jax.costs import device_memory, flop_counts, hardware
from in2core_jax.data import packing
from in2core_jax.errors import UserError
from in2core_jax.estimate import dry_run, pricing, stage_phases
from in2core_jax.estimate.pricing import Pricer
from in2core_jax.model import weights
from in2core_jax.pipeline import auto_batch, shapes, solver_inputs
from in2core_jax.pipeline import session as sessions
from in2core_jax.pipeline.settings import Settings
from in2core_jax.runs import run_folder

quick_compile = tiny.quick_compile
# As large a vocabulary as in real models, of which memory is a matter.
CONFIG = dataclasses.replace(tiny.CONFIG, vocab_size=49152)
ROOT = pathlib.Path(__file__).resolve().parents[2]


def settings_of(folder, **changes):
  return tiny.run_settings(folder, CONFIG, policies="full,random", **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("dry")


@pytest.fixture(scope="module")
def described(folder):
  """With its data read, on one device; tests take it with other settings through `varied`."""
  return pricing.described(settings_of(folder), hardware.Hardware("here", 1, 10**12, (1e9, 2e9, 3e9)))


@pytest.fixture(scope="module")
def session(described):
  return described.session


def real_session(session, **changes):
  """As in a run, but for the weights."""
  model = dataclasses.replace(session.model, mesh=tiny.one_device())
  return sessions.make_session(session.settings.replace(**changes), session.splits, model)


def named(phases, start):
  (found,) = [phase for phase in phases if phase.name.startswith(start)]
  return found


# ---- the same numbers as in the run --------------------------------------------------


def test_select_is_priced_by_the_batches_that_it_runs(session, described):
  real = real_session(session)
  phases = stage_phases.select_phases(session, session.settings)
  sizes = Pricer(session, "", *shapes.scored_shapes(session.model.config, session.settings)).sizes
  work = flop_counts.packed_work(real.packer("train").sequential_plan(480))
  assert named(phases, "losses and scores").flops == flop_counts.pass_flops(sizes, "jvp", work, True)
  work = flop_counts.packed_work(real.packer("eval").sequential_plan(480))
  assert named(phases, "query gradients").flops == flop_counts.pass_flops(sizes, "gradient", work, True)
  rows = solver_inputs.curvature_rows(real, session.settings)
  packer = real.packer("train", rows=rows.fixed, shapes=[rows.shape])
  ((_, batch),) = packer.shuffled(rows.batch, 0, 0)
  product = flop_counts.pass_flops(
    sizes,
    "ggn",
    flop_counts.Work(batch.tokens.size, batch.tokens.size * batch.tokens.shape[1], batch.slots.size, 8, 1),
    True,
  )
  assert named(phases, "lissa").flops == (10 + 6 + 1) * product
  cache = named(phases, "hidden states below layer 2 (train)")
  assert cache.host == int(session.splits["train"].num_tokens.sum()) * 16 * 4 and cache.disk == 0
  on_disk = stage_phases.select_phases(described.varied(boundary_cache="disk").session, session.settings)
  assert named(on_disk, "hidden states below layer 2 (train)").disk == cache.host


def test_training_takes_the_steps_of_the_recipe(session):
  s = session.settings
  phases = stage_phases.finetune_phases(session, s)
  shape = packing.training_shape([session.packer("train")], 8, [0])
  price = Pricer(session, "", *shapes.trained_shapes(session.model.config, s))
  steps = shapes.num_steps(s, 40)
  assert steps == 10
  work = stage_phases.shape_work(shape, 1, 8).times(steps)
  assert named(phases, "training").flops == flop_counts.pass_flops(price.sizes, "gradient", work, True)
  assert named(phases, "training").disk == 3 * 4 * price.sizes.subtree * 3  # two kept, one being written
  lora = stage_phases.finetune_phases(session, s.replace(trainable="lora", lora_rank=2))
  assert named(lora, "training").disk < named(phases, "training").disk


@pytest.mark.parametrize(("policy", "trainings"), [("opponents", 1 + 6), ("bm25", 1 + 6 + 3), ("random", 1 + 6)])
def test_a_select_run_in_a_sweep_names_its_policy(tmp_path, policy, trainings):
  run_folder.RunDir.open(tmp_path, {}).write_json("summary.json", {"policy": policy})
  s = Settings(policies="full,opponents,random", seeds="0", fixed_seeds="", fractions="0.1,0.2,0.5")
  s = s.replace(select_runs=str(tmp_path))
  assert stage_phases.num_trainings(s) == (trainings, trainings)
  assert stage_phases.num_trainings(s.replace(fractions="")) == (4, 4)


def test_a_demo_is_its_stages_without_what_they_share(session):
  s = session.settings
  demo = stage_phases.demo_phases(session, s)
  names = [phase.name for phase in demo]
  assert len([name for name in names if name.startswith("hidden states")]) == 3  # train, eval, test: once each
  # full by fine-tuning; random twice and the selection once by evaluate
  assert "3 trainings: 10 steps of 8 examples" in names and stage_phases.num_trainings(s) == (3, 3.0)
  sweep = s.replace(
    policies="full,random,bm25", seeds="0,1", fixed_seeds="0", fractions="0.25,0.5,1", equal="steps,epochs"
  )
  assert stage_phases.num_trainings(sweep) == (1 + 2 * 2 * 3, 1 + 2 * 3 + 0.75 * 3)
  # full once, each run once: runs have the fixed seeds, whatever they are called
  assert stage_phases.num_trainings(s.replace(policies="full", seeds="0,1", select_runs="random,b")) == (3, 3.0)
  last, one = demo[-1], named(demo, "training, 10 steps").flops / 10
  # On 5 % of 40 examples, a step each: three rules with one seed and all with two, what the answer needs; judging them.
  assert last.name.startswith("recommendation, about ") and last.stage == "recommend" and 20 < last.flops / one < 80
  alone = stage_phases.evaluate_phases(session, s)
  assert named(alone, "3 trainings").flops == named(demo, "3 trainings").flops


def test_equal_epochs_of_a_smaller_set_are_fewer_steps(session, tmp_path):
  """Of as many examples as are kept, whichever flag or run says so."""
  run_folder.RunDir.open(tmp_path, {}).write_json("summary.json", {"policy": "matching", "selected": 4})
  own = session.settings.replace(policies="random", seeds="0", equal="epochs", budget=0.5)
  tokens = session.splits["train"].num_tokens
  steps = named(stage_phases.evaluate_phases(session, own.replace(equal="steps")), "1 training:").flops
  for share, changes in (
    (0.5, {}),
    (0.25, {"budget": 10}),
    (0.2, {"budget": f"{tokens.sum() // 5}tok"}),
    (0.1, {"select_runs": str(tmp_path), "policies": "", "budget": 10}),
  ):
    s = own.replace(**changes)
    assert stage_phases.share_kept(s, tokens) == pytest.approx(share, rel=0.01)
    assert named(stage_phases.evaluate_phases(session, s), "1 training:").flops == pytest.approx(
      share * steps, rel=0.01
    )


@pytest.mark.parametrize(
  ("changes", "phase"),
  [
    ({"score_path": "vmap"}, "losses and scores, per-example gradients"),
    ({"policy": "matching", "sketch_size": 4}, "projected gradients (train)"),
    ({"policy": "auto", "sketch_size": 4}, "projected gradients (eval)"),
    ({"policy": "rds"}, "embeddings (train)"),
    ({"normalize": "whitened_cosine", "solver": "identity", "sketch_size": 4}, "projected gradients (eval)"),
    ({"solver": "ekfac"}, "EK-FAC of"),
    ({"solver": "datainf"}, "datainf"),
    ({"write": "query", "query_block": 4}, "scores of evaluation examples, 3 blocks"),
    ({"write": "self", "solver": "identity"}, "scores and norms"),
  ],
)
def test_other_ways_have_phases_of_their_own(session, described, changes, phase):
  found = named(
    stage_phases.select_phases(described.varied(**changes).session, session.settings.replace(**changes)), phase
  )
  assert found.flops > 0 and found.device["program"] > 0


# ---- what is printed -----------------------------------------------------------------


def test_it_reads_no_weight_and_makes_no_folder(folder, monkeypatch, capsys):
  def refuse(*_):
    raise AssertionError("a dry run read weights")

  monkeypatch.setattr(weights, "load_model", refuse)
  dry_run.run(settings_of(folder), "demo")
  text = capsys.readouterr().out
  assert not (folder / "run").exists()
  assert "scored: 4,672 parameters, 0.59 %, 2 layers (layers 2 to 3)" in text
  assert "train 40 examples" in text and "Everything fits." in text and "measured here just now" in text
  for name in ("hidden states below layer 2 (train)", "training, 10 steps", "lissa, 17 products", "test losses"):
    assert name in text


def test_what_does_not_fit_is_told_with_the_flags_that_help(session, described):
  where = hardware.Hardware("small", 1, 60_000_000, (1e9, 2e9, 3e9))
  found = dry_run.estimate(described.varied(max_shapes=1), "select", where)
  (line, *_) = found.too_large()
  assert "select, " in line and "of 0.06 GB on each device" in line and "program" in line
  helpful = dry_run.fixes(described, "select", found)
  assert any("--batch_tokens=" in flag for flag in helpful)
  for flag in helpful:  # every one of them does what it says
    changes = dict(part.removeprefix("--").split("=") for part in flag.split())
    changes = {name: int(value) if value.isdecimal() else value for name, value in changes.items()}
    assert not dry_run.estimate(described.varied(**changes), "select", where).too_large(), flag
  none = dry_run.estimate(described, "select", dataclasses.replace(where, memory=1000))
  assert none.too_large() and "choose fewer --layers or --modules." in dry_run.advice(described, "select", none)
  full = dry_run.Estimate(stage_phases.finetune_phases(session, session.settings), where, disk_free=1e4)
  assert any(line.startswith("disk: ") and "finetune, training" in line for line in full.too_large())


def test_more_devices_hold_less_each(session):
  s = session.settings.replace(mesh="fsdp:8", dtype="bfloat16")
  on = lambda s, name: pricing.described_session(  # noqa: E731
    s, (session.model.config, session.model.tokenizer), session.splits, hardware.on_paper(name, "bfloat16")
  )
  eight, one = on(s, "v5e-8"), on(s.replace(mesh=""), "v5e-1")
  vectors = [named(stage_phases.select_phases(b, b.settings), "lissa").device["vectors"] for b in (eight, one)]
  assert vectors[0] < 0.2 * vectors[1]  # norm scales are whole everywhere
  phase = named(stage_phases.select_phases(eight, s), "losses and scores")
  assert phase.gathered > 0 and named(stage_phases.select_phases(one, s), "losses and scores").gathered == 0


def test_hardware_by_name():
  assert hardware.on_paper("v5p-32", "bfloat16").count == 16  # the name counts cores
  assert hardware.on_paper("h100-8", "float32").rates[2] == hardware.on_paper("h100-8", "bfloat16").rates[2] / 2
  assert hardware.on_paper("v5e-8", "bfloat16").seconds(8 * 197e12 * 0.4)[1] == pytest.approx(1)
  for name in ("v5e", "z9-4", "v5e-0"):
    with pytest.raises(UserError, match="use a chip and a number"):
      hardware.on_paper(name, "bfloat16")


# ---- the flags -----------------------------------------------------------------------


@contextlib.contextmanager
def command(kind=Settings):
  """Parses command lines of a command into its settings."""
  before = set(absl_flags.FLAGS)
  flags.define(kind)
  try:
    yield lambda *line, **options: absl_flags.FLAGS(["command", *line]) and flags.read(kind, **options)
  finally:
    for name in set(absl_flags.FLAGS) - before:
      delattr(absl_flags.FLAGS, name)


@pytest.fixture
def parse():
  """Parses a command line into settings."""
  with command() as made:
    yield made


def test_batch_tokens_is_a_number_or_auto(parse):
  assert parse().batch_tokens == Settings().batch_tokens == 2048
  assert parse("--batch_tokens=1024").batch_tokens == 1024
  assert parse("--batch_tokens=1024").as_flags() == ["--batch_tokens=1024"]
  assert parse("--batch_tokens=auto").batch_tokens == "auto"
  for nonsense in ("many", "0", "-1", "1e3", ""):
    with pytest.raises(UserError, match=f"--batch_tokens={nonsense} is neither auto nor a whole number"):
      parse(f"--batch_tokens={nonsense}")


def test_a_flagfile_repeats_the_run_of_a_command_with_defaults_of_its_own():
  own = {"run_dir": "runs/coverage", "layers": "last:2", "trainable_layers": "last:2", "solver": "identity"}
  assert {name: getattr(CoverageSettings(), name) for name in own} == own
  table = Settings()
  for line in ([], [f"--{name}={getattr(table, name)}" for name in own], ["--layers=all", "--solver=cg"]):
    with command(CoverageSettings) as parse:
      asked = parse(*line)
      written = asked.as_flags()
    with command(CoverageSettings) as parse:
      again = parse(*written)
    with command() as parse:  # another command, from the same file
      other = parse(*written)
    for name in own:
      assert getattr(asked, name) == getattr(again, name) == getattr(other, name), (line, name)


def test_dry_run_is_refused_where_work_would_begin(parse):
  assert parse("--dry_run", "--hardware=v5e-8", tells_costs=True).as_flags() == []
  with pytest.raises(UserError, match="this command cannot"):
    parse("--dry_run")
  with pytest.raises(UserError, match="is for --dry_run"):
    parse("--hardware=v5e-8", "--nodry_run")


# ---- the largest batch ---------------------------------------------------------------


def test_auto_is_the_default_on_a_cpu_and_less_where_memory_is_short(session, monkeypatch, caplog):
  real = real_session(session, batch_tokens="auto", max_length=48)
  with caplog.at_level("INFO"):
    assert real.batching.batch_tokens == min(2048, 2 ** (session_tokens(session) - 1).bit_length())
  assert "compiled programs take" in caplog.text
  shapes_for = real.batching.packed_shapes_for
  work = auto_batch.Work.of(real.settings, real.model.config, real.splits, real.model.mesh, real.hidden.where.serves)
  large, small = (max(auto_batch.compiled_bytes(work, shape) for shape in shapes_for(tokens)) for tokens in (2048, 256))
  assert small < large
  monkeypatch.setattr(auto_batch, "PROGRAMS", {"gradient": auto_batch.PROGRAMS["gradient"]})  # the larger one
  monkeypatch.setattr(device_memory, "usable_bytes", lambda device: work.resident_bytes + (small + large) // 2)
  found = auto_batch.largest_batch(work, shapes_for)
  assert 256 <= found < 2048
  used = [auto_batch.compiled_bytes(work, shape) for shape in shapes_for(found)]
  assert max(used) <= (small + large) // 2
  monkeypatch.setattr(device_memory, "usable_bytes", lambda device: work.resident_bytes + 1000)
  with pytest.raises(UserError, match="choose fewer --layers"):
    auto_batch.largest_batch(work, shapes_for)


def session_tokens(session):
  return sum(int(part.num_tokens.sum()) for part in session.splits.values())


# ---- the page ------------------------------------------------------------------------


def test_the_page_on_scaling_has_what_the_functions_say():
  lines = (ROOT / "docs" / "scaling.md").read_text().splitlines()
  case = scaling.CASES[0]
  for row in scaling.rows([case]):
    start = f"| {row['devices']} | {row['examples']} | {row['flags']} | "
    (line,) = [line for line in lines if line.startswith(start)]
    written = [float(cell) for cell in line.removeprefix(start).split(" | ")[:6]]
    ours = [row[name] for name in ("TFLOP", "seconds", "from", "to", "GB a device", "disk GB")]
    assert written == pytest.approx(ours, rel=0.03) and row["fits"]
  direct = sum(phase.flops for phase in scaling.sampled(case, 39_000))
  assert sum(phase.flops for phase in scaling.phases(case, 39_000)) == pytest.approx(direct, rel=0.01)
