"""The table of phases: a run enters exactly those that the dry run lists, in their order."""

import pytest
import tiny

from in2core_jax.estimate import pricing, stage_phases
from in2core_jax.index import store
from in2core_jax.pipeline import finetune, index, phases, select
from in2core_jax.pipeline.index_settings import IndexSettings
from in2core_jax.pipeline.settings import Settings
from in2core_jax.runs.progress import Progress

quick_compile = tiny.quick_compile


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
  return tiny.run_settings(tmp_path_factory.mktemp("phases"), sketch_size=4)


@pytest.fixture(scope="module")
def session(settings):
  return tiny.open_session(settings)


@pytest.fixture
def entered(monkeypatch):
  """What progress was shown of, in order."""
  found, plain = [], Progress.__init__

  def noted(self, total, what, *rest, **more):
    found.append(what)
    plain(self, total, what, *rest, **more)

  monkeypatch.setattr(Progress, "__init__", noted)
  return found


def names_of(shown, listed):
  """The listed phase that each text begins with, the longest that does; each once, by its first place."""
  for text in shown:
    assert any(text.startswith(name) for name in listed), f"{text} is not in the table"
  return list(dict.fromkeys(max((n for n in listed if text.startswith(n)), key=len) for text in shown))


def test_names_begin_no_other_phase_by_mistake():
  names = ["losses", "losses and scores", "scores by layer"]
  assert names_of(["losses and scores, jvp", "losses", "losses and scores"], names) == ["losses and scores", "losses"]
  with pytest.raises(AssertionError, match="is not in the table"):
    names_of(["evaluation"], names)


@pytest.mark.parametrize(
  ("changes", "wanted"),
  [
    ({"policy": "proponents"}, ["cg", "losses and scores"]),
    ({"solver": "identity", "write": "layer,query"}, ["losses and scores", phases.LAYERS, phases.BLOCKS]),
    ({"precondition": "diagonal"}, ["cg", "EK-FAC", "losses and scores"]),
    ({"policy": "matching"}, ["cg", "losses and scores", "projected gradients (train)", "projected gradients (eval)"]),
    ({"policy": "rds"}, ["cg", "losses and scores", "embeddings (train)", "embeddings (eval)"]),
    ({"solver": "identity", "trajectory": "tracin"}, ["scores at", "losses"]),
    ({"solver": "identity", "normalize": "cosine"}, ["scores and norms"]),
    ({"aggregate": "round_robin"}, ["cg", "losses and scores", phases.BLOCKS]),
  ],
)
def test_settings_decide_on_the_phases(changes, wanted):
  s = Settings(policy="proponents").replace(**changes)
  kept = [phases.hidden(4, "train"), phases.hidden(4, "eval")]
  assert phases.of_select(s, 4, 1) == [*kept, phases.QUERIES, *wanted, phases.RESULTS]
  assert phases.of_select(s, None, 1) == [phases.QUERIES, *wanted, phases.RESULTS]


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes",
  [
    {"policy": "auto", "write": "layer,token,query"},
    {"solver": "cg", "precondition": "diagonal", "score_path": "vmap", "policy": "rds"},
    {"solver": "identity", "normalize": "whitened_cosine", "policy": "bm25"},
    {"solver": "ekfac", "normalize": "cosine", "write": "self"},
    {"solver": "datainf", "aggregate": "round_robin"},
  ],
  ids=lambda changes: next(iter(changes.values())) + " " + next(iter(changes)),
)
def test_a_run_enters_exactly_the_phases_of_the_dry_run(settings, session, entered, tmp_path, changes):
  s = settings.replace(run_dir=str(tmp_path / "run"), **changes)
  tree = pricing.Pricer(session, "select", *stage_phases.shapes.scored_shapes(session.model.config, s))
  listed = phases.of_select(s, tree.boundary, 1)
  priced = [phase.name for phase in stage_phases.select_phases(session, s)]
  assert names_of(priced, listed) == listed
  session.hidden.kept.clear(), session.hidden.embedded.clear()
  select.run(s, session)
  assert names_of(entered, listed) == listed[:-1]  # of the files no progress is shown


@pytest.mark.slow
@pytest.mark.parametrize("basis", ["queries", "generic"])
def test_an_index_enters_the_phases_of_its_dry_run_and_keeps_the_bytes(settings, session, entered, tmp_path, basis):
  s = IndexSettings.of(settings, run_dir=str(tmp_path / "index"), index_basis=basis, index_size=8, index_hidden=4)
  listed, priced = phases.of_index(s), stage_phases.index_phases(session, s)
  assert [phase.name for phase in priced] == listed and all(phase.flops > 0 for phase in priced)
  index.run(s, session)
  assert names_of(entered, listed) == listed
  held, train = store.IndexStore.load(s.run_dir), session.splits["train"]
  rows = held.read_rows(store.keys_of(train.tokens, train.response_mask), train.ids)
  kept = sum(array.nbytes for segment in rows.segments for array in segment.values())
  assert priced[-1].disk == kept + held.read_basis().gradients.nbytes


@pytest.mark.slow
def test_a_training_and_its_checkpoints_have_the_phases_of_the_dry_run(settings, session, entered, tmp_path):
  s = settings.replace(run_dir=str(tmp_path / "full"), keep_checkpoints=0)
  listed = [phases.hidden(2, "train"), phases.TRAINING]
  assert names_of([phase.name for phase in stage_phases.finetune_phases(session, s)], listed) == listed
  session.hidden.kept.clear()
  checkpoint = finetune.run(s, session)
  assert names_of(entered, listed) == listed
  entered.clear()
  s = settings.replace(run_dir=str(tmp_path / "run"), checkpoint=checkpoint, solver="identity", trajectory="tracin")
  listed = phases.of_select(s, 2, 1)
  assert names_of([phase.name for phase in stage_phases.select_phases(session, s)], listed) == listed
  session.hidden.kept.clear()
  select.run(s, session)
  assert names_of(entered, listed) == listed[:-1]
