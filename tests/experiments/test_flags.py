"""Settings and the flags made of them: every value in its range or refused in one line; old names; identity; help."""

import ast
import dataclasses
import itertools
import math
import re
import sys
from pathlib import Path

import pytest
from absl import flags as absl_flags

from experiments import cli, flags, help_text, settings
from experiments.coverage.settings import CoverageSettings
from experiments.fidelity.settings import FidelitySettings
from experiments.study.settings import StudySettings
from in2core_jax.errors import UserError
from in2core_jax.pipeline import checks, fields, lists
from in2core_jax.pipeline.fields import Checked
from in2core_jax.pipeline.lists import in_order
from in2core_jax.pipeline.settings import GROUPS, Settings
from in2core_jax.selection import coreset
from in2core_jax.selection.inputs import Budget
from in2core_jax.training.recipe import steps_for

ROOT = Path(__file__).resolve().parents[2]
FIELDS = {field.name: field for field in flags.every_field()}
NUMERIC = [name for name, field in FIELDS.items() if field.metadata["kind"] in (int, float)] + ["batch_tokens"]
LISTS = [name for name, field in FIELDS.items() if field.metadata["each"]]
EDGES = (
  *("inf", "-inf", "nan", "-1", "0", "1", "0.5", "1e400", "-0.0", "", "text", "1e-400"),
  *(str(2**power + more) for power in (31, 32, 53, 62, 63, 64) for more in (-1, 0)),
  "9" * 5000,
)


@dataclasses.dataclass(frozen=True)
class Every(*flags.OTHERS):
  """The settings of all commands at once."""


@pytest.fixture
def parser():
  """Makes the parser of a command line, as the command with that settings class has it."""
  return flags.Parser


@pytest.fixture
def read(parser):
  """Parses a command line with the flags of all commands."""
  return parser(Every)


# ---- values ----------------------------------------------------------------------------------------------------------


def test_every_setting_says_what_it_is():
  for name, field in FIELDS.items():
    meta = field.metadata
    assert meta["group"] in flags.GROUPS and meta["help"].endswith((".", "...")), name
    assert len(meta["help"]) <= 90 and meta["kind"] in (bool, int, float, str), name
    assert bool(meta["within"]) == (name in NUMERIC), name
  assert set(GROUPS) == {field.metadata["group"] for field in dataclasses.fields(Settings)}
  assert [field.name for field in dataclasses.fields(Settings) if field.name not in FIELDS] == []


def test_every_settings_class_is_among_the_commands():
  def below(kind):
    return {kind} | {one for sub in kind.__subclasses__() for one in below(sub)}

  defined = {kind for kind in below(Settings) if kind.__module__.startswith("experiments.")}
  shared = (settings.FinetuneFlags, settings.SelectFlags, settings.EvaluateFlags, settings.DemoFlags)
  assert defined - {*shared, settings.OracleFlags, settings.InteropFlags} == set(
    flags.OTHERS
  )  # these have no flags of their own


def test_what_is_accepted_is_in_the_range_and_the_rest_is_one_line(read):
  accepted = {}
  for name, text in itertools.product([*NUMERIC, *LISTS], EDGES):
    try:
      found = read(f"--{name}={text}")
    except (UserError, absl_flags.Error) as error:
      assert name in str(error) and len(str(error)) < 6000, (name, text)
      continue
    accepted.setdefault(name, []).append(text)
    value, within = getattr(found, name), FIELDS[name].metadata["within"]
    if within and not isinstance(value, str):
      assert within.holds(value), (name, text)
  assert set(accepted) >= set(NUMERIC)
  numbers = (text for texts in accepted.values() for text in texts)
  assert not {"inf", "-inf", "1e400", "9" * 5000} & set(numbers)
  assert {name for name, texts in accepted.items() if "nan" in texts} == {"damping", "scale"}
  assert {name for name, texts in accepted.items() if str(2**62) in texts} == {"scale"}  # a float is fine so large


@pytest.mark.parametrize(
  ("flag", "words"),
  [
    ("--damping=inf", "--damping=inf must be a number that is at least 0 and at most 1000000000"),
    (f"--seed={2**32}", f"--seed={2**32} must be a number that is at least 0 and at most {2**32 - 1}"),
    (f"--seed={2**63}", "--seed="),
    (f"--steps={2**62}", "at most 10000000"),
    (f"--seeds=0,{2**32}", f"'{2**32}' is wrong in this list of whole numbers"),
    ("--seeds=1,1", "--seeds=1,1: a number is given twice"),
    ("--fractions=0.5,nan", "'nan' is wrong in this list of numbers"),
    ("--fraction=0", "above 0 and at most 1"),
    ("--budget=0", "--budget=0 is not a budget: give a share"),
    ("--budget=half", "--budget=half is not a budget"),
    ("--write=query,column", "--write=query,column: unknown 'column'; use some of query, layer, token, self"),
    (f"--mesh=data:{2**62}", "more than 9 digits"),
    (f"--layers=last:{'9' * 5000}", "more than 9 digits"),
    (f"--batch_tokens={2**62}", "--batch_tokens"),
    ("--run_dir=a\0b", r"a\\x00b holds a NUL"),
    ("--template_date=tomorrow", "^--template_date=tomorrow is no date"),
    ("--train_data= ", "^--train_data= is empty"),
    ("--hardware=v5e-8", "^--hardware=v5e-8 is for --dry_run=true"),
    ("--damping=1e-39", "--damping=1e-39 is 0 in float32"),
    ("--learning_rate=1e-400", "learning_rate=1e-400: is too small for a number of this computer"),
  ],
)
def test_the_message_has_name_value_and_range(read, flag, words):
  with pytest.raises((UserError, absl_flags.Error), match=words):
    read(flag)


def test_entries_of_lists_in_order_do_not_move_up():
  assert in_order("3, ,1;", "x", ";") == ["3, ,1"] and in_order("", "x") == [] and in_order("1,2,", "x") == ["1", "2"]
  for text in ("1,,2", ",1"):
    with pytest.raises(UserError, match=f"--x={text}: entry [12] of this list is empty"):
      in_order(text, "x")


FLAGFILES = {
  "with a mark of the byte order": "\ufeff# first\n--seed=3\n",
  "with a mark before a flag": "\ufeff--seed=3\n",
  "with other line ends": "# first\r\n\r\n--seed=3\r\n--layers=all\r",
  "with blanks before the name of another": "  --flagfile={other}\n",
  "that names another": "--flagfile={other}\n",
}


@pytest.mark.parametrize("name", FLAGFILES)
def test_a_flagfile_is_read_whatever_wrote_it(parser, tmp_path, name):
  file, other = tmp_path / "a.flags", tmp_path / "b.flags"
  other.write_text("--seed=3\n")
  file.write_bytes(FLAGFILES[name].format(other=other).encode())
  parser()
  assert "--seed=3" in cli._with_flagfiles(["command", f"--flagfile={file}"])
  assert cli._with_flagfiles(["command", "--system_prompt", "# x"])[1:] == ["--system_prompt", "# x"]


def test_flagfiles_without_end_are_refused(parser, tmp_path):
  file = tmp_path / "a.flags"
  file.write_text(f" --flagfile={file}\n")
  parser()
  with pytest.raises(UserError, match="flagfiles name each other more than 10 times"):
    cli._with_flagfiles(["command", f"--flagfile={file}"])


@pytest.mark.parametrize(
  ("values", "words"),
  [
    ({"damping_ratio": -1}, "^damping_ratio=-1 must be a number that is at least 0"),
    ({"solver": "newton"}, "^solver=newton is unknown; use one of lissa, cg"),
    ({"seed": "3"}, "^seed='3' must be a whole number"),
    ({"epochs": True}, "^epochs=True must be a number"),
    ({"dedup": 1}, "^dedup=1 must be true or false"),
    ({"model": None}, "^model=None must be a text"),
    ({"budget": -0.5}, "^budget=-0.5 is not a budget"),
    ({"seeds": "1,x"}, "^seeds=1,x: 'x' is wrong"),
    ({"hardware": "v5e-8"}, "^hardware=v5e-8 is for dry_run=true"),
    ({"write": ("query", "row")}, "^write=query,row: unknown 'row'"),
  ],
)
def test_python_reads_of_parameters_and_the_command_line_of_flags(values, words):
  with pytest.raises(UserError, match=words) as caught:
    Settings(**values)
  (name,) = values
  assert fields.in_flags(str(caught.value), FIELDS).startswith(f"--{name}=")


def test_a_message_of_the_pipeline_in_words_of_parameters():
  told = "--layers=last:9: 9 is not between 1 and 2; give --dedup, or --layers and --dedup=false, see --help; x--seed=1"
  told += "; --dedup is False there and True now"
  assert fields.in_parameters(told, Settings) == (
    "layers=last:9: 9 is not between 1 and 2; give dedup=True, or layers and dedup=false, see --help; x--seed=1"
    "; dedup is False there and True now"
  )


def test_values_have_one_spelling():
  made = Settings(budget=0.50, write="self, query", batch_tokens="512")
  assert (made.budget, made.write, made.batch_tokens) == ("0.5", "query,self", 512)
  assert made == Settings(budget="0.5", write=("self", "query"), batch_tokens=512) and not made.is_set("budget")
  assert made.writes("self") and not made.writes("layer")


def test_learning_for_ever_is_refused():

  assert steps_for(100, 10, 2.0) == 20
  with pytest.raises(UserError, match="--epochs=1000000.0 of 1,000 examples are"):
    steps_for(1000, 1, 1e6)


# ---- names old and new -----------------------------------------------------------------------------------------------

NAMES = [
  (("--budget=0.25",), ("--fraction=0.25",)),
  (("--budget=1.0",), ("--fraction=1",)),
  (("--budget=7",), ("--num_examples=7",)),
  (("--budget=40000tok",), ("--token_budget=40000",)),
  (("--budget=7",), ("--fraction=0.5", "--num_examples=7")),  # a number went before a share
  ((), ("--fraction=0.5", "--num_examples=0", "--token_budget=0")),
  (("--write=query",), ("--per_query",)),
  (("--write=self,query",), ("--per_query=true", "--self_influence")),
  (("--write=layer,token",), ("--per_layer", "--per_token", "--noper_query")),
  ((), ("--per_query=false", "--drop_copies=false")),
  (("--dedup",), ("--drop_copies",)),
]


@pytest.mark.parametrize(("new", "old"), NAMES)
def test_old_names_mean_the_new_ones_and_make_the_same_run(read, caplog, new, old):
  caplog.set_level("INFO")
  wanted = read(*new)
  assert "is now" not in caplog.text
  found = read(*old)
  assert found == wanted and found.as_flags() == wanted.as_flags()
  assert found.identity(*GROUPS) == wanted.identity(*GROUPS)
  told = [line for line in caplog.messages if "is now" in line]
  assert all(re.match(r"--\w+ is now --(budget|write|dedup)\b", line) for line in told) and len(told) <= len(old)
  assert told or not wanted.as_flags()
  assert read(*new, *old) == wanted  # both say the same


@pytest.mark.parametrize(
  ("line", "words"),
  [
    ("--fraction=0.25 --budget=0.5", "^--fraction=0.25 and --budget=0.5 disagree: give --budget alone$"),
    ("--num_examples=5 --budget=0.5", "^--num_examples=5 and --budget=0.5 disagree"),
    ("--num_examples=5 --token_budget=9", "^--num_examples=5 and --token_budget=9: give one --budget$"),
    ("--per_query --write=layer", "^--per_query=true and --write=layer disagree: give --write alone$"),
    ("--noper_layer --write=layer", "^--per_layer=false and --write=layer disagree"),
    ("--drop_copies --nodedup", "^--drop_copies=true and --dedup=false disagree: give --dedup alone$"),
    ("--token_budget=-1", "^--token_budget=-1 must be a number"),
  ],
)
def test_old_and_new_names_that_disagree_are_refused(read, line, words):
  with pytest.raises(UserError, match=words):
    read(*line.split())


# What version 0.3.0 wrote into run folders for default flags and for these.
SAME = {"checkpoint": "", "layers": "last:8", "modules": "all", "policy": "auto", "aggregate": "auto", "solver": "cg"}
BEFORE = {"fraction": 0.5, "num_examples": 0, "token_budget": 0, "per_query": False, "per_layer": False}
BEFORE |= {"per_token": False, "self_influence": False}


@pytest.mark.parametrize(
  ("values", "recorded"),
  [
    ({}, {}),
    ({"budget": 0.25}, {"fraction": 0.25}),
    ({"budget": 7, "write": "self"}, {"num_examples": 7, "self_influence": True}),
    ({"budget": "9tok", "write": "layer,token"}, {"token_budget": 9, "per_layer": True, "per_token": True}),
    ({"dedup": True}, {"drop_copies": True}),
  ],
)
def test_run_folders_go_by_the_names_that_they_were_made_with(values, recorded):
  found = Settings(**values).identity("data", "select")
  assert {name: value for name, value in found.items() if name in BEFORE or name in recorded} == BEFORE | recorded
  assert not {"budget", "write", "dedup"} & set(found) and SAME.items() <= found.items()


def test_the_identity_of_default_settings_is_that_of_version_0_3_0():
  found = Settings().identity("run", "data", "model", "finetune", "select", "evaluate")
  assert set(found) == set(IDENTITY_0_3_0.split())
  assert found["damping"] is None and found["fraction"] == 0.5 and type(found["num_examples"]) is int


IDENTITY_0_3_0 = """
seed mesh boundary_cache boundary_cache_gb batch_tokens microbatch shard_batches train_data eval_data test_data
data_fields split eval_topics train_limit eval_limit test_limit max_length system_prompt max_shapes loss_reduction model
dtype trainable trainable_layers trainable_modules lora_rank learning_rate epochs steps batch_size warmup_ratio
weight_decay max_grad_norm checkpoint_every keep_checkpoints checkpoint layers modules solver precondition
ekfac_examples curvature damping damping_ratio depth repeat scale acceleration solver_tol average curvature_examples
curvature_batch normalize self_influence per_layer per_token policy aggregate fraction num_examples token_budget
per_query query_block score_path sketch_size matching_target matching_shrink trajectory select_runs policies seeds
fixed_seeds fractions equal
"""


@pytest.mark.parametrize("word", ["0.5", "1.0", "1e-05", "1", "500", "40000tok"])
def test_a_budget_is_written_as_it_is_read(word):
  assert str(Budget.read(word)) == word and Settings(budget=word).budget == word


def test_other_spellings_of_a_budget():
  spelled = {"1.": "1.0", ".5": "0.5", " 7 ": "7", "007": "7", "9 tokens": "9tok", "0.50": "0.5"}
  assert {word: str(Budget.read(word)) for word in spelled} == spelled
  for word in ("", "0", "0.0", "1.5", "nan", "-3", "tok", "0tok", "1k", "50%"):
    with pytest.raises(UserError, match="is not a budget: give a share above 0.0"):
      Budget.read(word)


# ---- commands --------------------------------------------------------------------------------------------------------

COMMANDS = (
  *(settings.FinetuneFlags, settings.SelectFlags, settings.EvaluateFlags, settings.DemoFlags, settings.OracleFlags),
  *flags.OTHERS,
)


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_command_takes_a_flagfile_that_holds_flags_of_every_other(parser, tmp_path, kind):
  parse = parser(kind)
  every = [f"--{name}={field.default}" for name, field in FIELDS.items() if field.metadata["repeats"]]
  file = tmp_path / "every.flags"
  file.write_text("\n".join([*every, "--halves=3", "--variants=matching", "--folds=2", "--budget=7"]))
  found = parse(f"--flagfile={file}")
  assert type(found) is kind and found.budget == "7"
  assert getattr(found, "halves", 3) == 3 and getattr(found, "variants", "matching") == "matching"
  again = parse(*found.as_flags())
  assert dataclasses.astuple(found.replace(damping=0.1, scale=1.0)) == dataclasses.astuple(
    again.replace(damping=0.1, scale=1.0)
  )


def test_the_flagfiles_of_the_project_are_read_by_every_command(parser):
  for kind in (settings.SelectFlags, StudySettings, FidelitySettings):
    parse = parser(kind)
    for file in sorted((ROOT / "experiments/flags").glob("*.flags")):
      assert isinstance(parse(f"--flagfile={file}"), kind)


def test_a_command_has_defaults_of_its_own(parser):
  assert parser(StudySettings)().seeds == "0,1,2,3,4" and parser(settings.SelectFlags)().seeds == "0,1,2"
  own = CoverageSettings()
  assert own.layers == "last:2" and own.has_own_default("layers") and own.is_set("layers")
  assert "--layers=last:2" in own.as_flags() and not own.has_own_default("modules")
  assert CoverageSettings.of(Settings(depth=7, layers="all")).layers == "all"


def test_settings_of_one_stage_check_themselves():
  stages = [kind for kind in Settings.__mro__ if issubclass(kind, Checked) and kind not in (Settings, Checked)]
  assert len(stages) == len(GROUPS)
  for kind in stages:
    made = kind.of(Settings())
    assert {field.metadata["group"] for field in dataclasses.fields(kind)} == {made.__class__.__name__[:-8].lower()}
    assert Settings.of(made).replace(damping=0.1, scale=1.0) == Settings(damping=0.1, scale=1.0)


def test_a_number_that_is_not_set_stays_so():
  made = Settings(damping=math.nan)
  assert not made.is_set("damping") and made.as_flags() == []


def test_a_policy_that_is_gone_names_the_one_to_take(parser):
  with pytest.raises(UserError, match="policy=matching_quota is gone: use matching"):
    Settings(policy="matching_quota")
  with pytest.raises(absl_flags.Error, match="policy=matching_topic: it is gone: use matching"):
    parser(settings.SelectFlags)("--policy=matching_topic")
  with pytest.raises(absl_flags.Error, match="policy=matching_tok: did you mean matching"):
    parser(settings.SelectFlags)("--policy=matching_tok")
  with pytest.raises(UserError, match="--policies=full,matching_quota: matching_quota is gone: use matching"):
    checks.policies_of(Settings(policies="full,matching_quota"))
  assert not set(coreset.GONE) & set(coreset.POLICIES) and set(coreset.GONE.values()) <= set(coreset.POLICIES)


@pytest.mark.parametrize(
  ("message", "shown"),
  [
    ("budget=41 is more than the 40 examples", "--budget=41 is more than the 40 examples"),
    ("--budget=x is no budget; runs/budget=x stays", "--budget=x is no budget; runs/budget=x stays"),
    ("data_fields='a=b': cannot use 'a=b'; with data_fields=prompt=a", None),
  ],
)
def test_errors_from_below_the_command_line_name_flags(parser, monkeypatch, message, shown):
  monkeypatch.setattr(help_text.flags, "FLAGS", parser(settings.SelectFlags).flags)
  wanted = shown or message.replace("data_fields", "--data_fields")
  assert cli.outcome(UserError(message)) == (2, f"error: {wanted}")


def test_an_unknown_word_of_a_list_is_told_with_the_one_that_it_is_like():
  with pytest.raises(UserError, match=r"^--policies=full,randm: unknown 'randm' \(did you mean 'random'\?\); use some"):
    lists.words("full,randm", "policies", ("full", "random", "rds"))
  with pytest.raises(
    UserError, match=r"^write=quer: unknown 'quer' \(did you mean 'query'\?\); use some of query, self$"
  ):
    lists.some_of(("query", "self"), "write", "quer")


# ---- help ------------------------------------------------------------------------------------------------------------


def shown(kind, parser, monkeypatch, full=False):
  monkeypatch.setattr(sys.modules["__main__"], "__doc__", "Does it.")
  return help_text.help_text(full, parser(kind).flags)


def test_help_of_select_is_short_and_in_order(parser, monkeypatch):
  text = shown(settings.SelectFlags, parser, monkeypatch)
  lines = text.splitlines()
  assert len(lines) <= 110 and max(map(len, lines)) <= help_text.WIDTH
  titles = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
  assert titles == ["data:", "model:", "scores and selection:", "run folder and devices:", "advanced:"]
  assert lines[0] == "Does it." and lines[-1].startswith("--flagfile=FILE")
  assert "--helpfull" in lines[-1]
  named = re.findall(r"^  --(\w+)", text, re.M)
  own = ("data", "model", "select", "run")
  assert sorted(named) == sorted(name for name, field in FIELDS.items() if field.metadata["group"] in own)
  assert named.index("train_data") < named.index("budget") < named.index("run_dir") < named.index("microbatch")
  assert re.search(r"--run_dir=runs/select +Folder of the results; the same command resumes there\.", text)
  assert re.search(r"--loss_reduction=mean +How .* One of mean, sum\.", text) and "<mean" not in text


@pytest.mark.parametrize(
  ("kind", "first"),
  [
    (settings.DemoFlags, "data"),
    (StudySettings, "rules of selection, retrained"),
    (settings.IndexFlags, "index of a large pool"),
  ],
)
def test_help_begins_with_a_commands_own_flags_then_data(kind, first, parser, monkeypatch):
  text = shown(kind, parser, monkeypatch)
  titles = re.findall(r"^(\w.*):$", text, re.M)
  assert titles[0] == first and ("--index=" in text) == (kind is not settings.IndexFlags)
  assert titles[titles.index("data") + 1 :][:1] == ["model"] and titles[-1] == "advanced"


def test_help_of_everything_has_other_commands_and_old_names(parser, monkeypatch):
  text = shown(settings.SelectFlags, parser, monkeypatch, full=True)
  named = re.findall(r"^  --(\w+)", text, re.M)
  assert sorted(named) == sorted(flags.names()) and max(map(len, text.splitlines())) <= help_text.WIDTH
  assert (
    "\nold names:\n" in text
    and "\nfine-tuning:\n  --trainable=" in text
    and re.search(r"--fraction= +Now --budget\.", text)
  )
  assert "\nstudy, rules of selection, retrained:\n  --variants=" in text


@pytest.mark.parametrize("kind", COMMANDS)
def test_every_command_shows_its_own_flags_once(parser, monkeypatch, kind):
  named = re.findall(r"^  --(\w+)", shown(kind, parser, monkeypatch), re.M)
  own = {field.name for field in dataclasses.fields(kind)}
  assert len(named) == len(set(named)) and set(named) <= own and ("to" if "to" in own else "run_dir") in named
  assert {name for name in own if FIELDS[name].metadata["group"] not in GROUPS} <= set(named)


@pytest.mark.parametrize(
  ("line", "told"),
  [
    ("--fracton=0.5", "unknown flag --fracton; did you mean --fraction"),
    ("--budgets=0.5", "unknown flag --budgets; did you mean --budget"),
    ("--lds_solver=cg", "unknown flag --lds_solver; did you mean --lds_solvers"),
    ("--xyz", "unknown flag --xyz; --help lists the flags"),
  ],
)
def test_an_unknown_flag_is_one_line_with_those_that_are_like_it(parser, monkeypatch, line, told):
  monkeypatch.setattr(absl_flags, "FLAGS", parser(settings.SelectFlags).flags)
  with pytest.raises(UserError) as caught:
    cli._parse(["select", line], None)
  assert str(caught.value).startswith(told) and "\n" not in str(caught.value)
  assert str(caught.value).endswith("--help lists the flags")


# As run.sh finds them.
FILES = [*(ROOT / "experiments").glob("*.py"), *(ROOT / "experiments").glob("*/__main__.py")]
COMMANDS = [path for path in sorted(FILES) if '\nif __name__ == "__main__":' in path.read_text()]


def name_of(path: Path) -> str:
  return path.parent.name if path.stem == "__main__" else path.stem


@pytest.mark.parametrize("path", COMMANDS, ids=name_of)
def test_the_first_screen_says_what_a_command_does_how_it_is_called_and_what_it_writes(path):
  files = [file for file in (path, path.parent / f"{name_of(path)}.py") if file.exists()]
  text = next(filter(None, (ast.get_docstring(ast.parse(file.read_text())) for file in files)))
  assert text.count("\n") < 20 and re.search(rf"^ *\./run\.sh {name_of(path)}\b", text, re.M)
  assert re.search(r"[Ww]rites?\s|land in|Exit\s|docs/scaling|old name", text), text
