"""The settings of the small commands: defaults of their own, and which flags --help shows."""

import dataclasses
import functools
from typing import ClassVar

from experiments.study.settings import RuleSettings
from in2core_jax.pipeline.fields import changed, setting
from in2core_jax.pipeline.index_settings import IndexSettings
from in2core_jax.pipeline.ranges import COUNT, Each, Range
from in2core_jax.pipeline.settings import Settings


@dataclasses.dataclass(frozen=True)
class FinetuneFlags(Settings):
  """`finetune`."""

  shown: ClassVar = ("data", "model", "finetune", "run")
  run_dir: str = changed(Settings, "run_dir", "runs/finetune")


@dataclasses.dataclass(frozen=True)
class SelectFlags(Settings):
  """`select`."""

  shown: ClassVar = ("data", "model", "select", "run")
  run_dir: str = changed(Settings, "run_dir", "runs/select")


@dataclasses.dataclass(frozen=True)
class IndexFlags(IndexSettings):
  """`index`."""

  shown: ClassVar = ("index", "data", "model", "checkpoint", "layers", "sketch_size", "run")


_large_pools = functools.partial(setting, "large_pools")


@dataclasses.dataclass(frozen=True)
class LargePoolsFlags(IndexSettings):
  """`large_pools`."""

  shown: ClassVar = ("large_pools", "index", "data", "model", "layers", "run")
  run_dir: str = changed(Settings, "run_dir", "runs/large_pools")
  pool_sizes: str = _large_pools("10000,100000,1000000", "Examples that are drawn.", each=Each(int, COUNT))
  pool_queries: int = _large_pools(500, "Queries that are drawn.", within=COUNT)
  agreement: bool = _large_pools(False, "Instead: compare scores with exact ones, on real examples.")
  agreement_sizes: str = _large_pools("128,256,512", "Numbers of a row that are compared.", each=Each(int, COUNT))


@dataclasses.dataclass(frozen=True)
class EvaluateFlags(Settings):
  """`evaluate`."""

  shown: ClassVar = ("data", "model", "finetune", "evaluate", "checkpoint", "budget", "run")
  run_dir: str = changed(Settings, "run_dir", "runs/evaluate")


@dataclasses.dataclass(frozen=True)
class DemoFlags(Settings):
  """`demo`."""

  run_dir: str = changed(Settings, "run_dir", "runs/demo")


@dataclasses.dataclass(frozen=True)
class ExportFlags(Settings):
  """`export`: --model and --frozen_weights are those of the checkpoint where they are not given."""

  shown: ClassVar = ("export", "checkpoint", "model", "dtype", "frozen_weights", "overwrite")
  to: str = setting("export", "", "Folder that is written.", repeats=False)
  adapter: bool = setting("export", False, "Write the LoRA factors alone, for PEFT.", repeats=False)


@dataclasses.dataclass(frozen=True)
class CheckFlags(Settings):
  """`check`."""

  shown: ClassVar = ("check", "data", "model", "select", "run")
  check_examples: int = setting("check", 4, "Training examples to look at.", within=Range(1, 2**16))


@dataclasses.dataclass(frozen=True)
class OracleFlags(Settings):
  """`oracle`: its model and data are its own."""

  shown: ClassVar = ("depth", "seed", "run_dir", "overwrite")
  run_dir: str = changed(Settings, "run_dir", "runs/oracle")
  depth: int = changed(Settings, "depth", 400)


@dataclasses.dataclass(frozen=True)
class InteropFlags(Settings):
  """`interop`: its model and data are its own."""

  shown: ClassVar = ("seed", "run_dir", "overwrite")
  run_dir: str = changed(Settings, "run_dir", "runs/interop")


_kill_test = functools.partial(setting, "kill_test")


@dataclasses.dataclass(frozen=True)
class KillTestFlags(RuleSettings, IndexSettings):
  """`kill_test`: flags of the command that is killed, and how often."""

  run_dir: str = changed(Settings, "run_dir", "runs/kill_test")
  kills: int = _kill_test(10, "How often a run is killed.", within=Range(1, 10**4))
  kill_command: str = _kill_test(
    "select", "Which command.", choices=("select", "finetune", "evaluate", "study", "index")
  )
