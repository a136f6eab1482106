"""The peers' half: runs in an environment of its own, and does one pass for each line that it reads.

python torch_side.py JOB.json; on standard input a word of `PASSES` a line, on standard output a line of JSON for each.
"""

import importlib.metadata
import json
import os
import pathlib
import sys
import time

import torch
import transformers
from bergson import GradientProcessor, InMemoryCollector, Scorer
from bergson.collector.collector import CollectorComputer
from bergson.config.config import IndexConfig
from bergson.score.score_writer import InMemorySequenceScoreWriter
from datasets import Dataset
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments
from kronfluence.task import Task
from kronfluence.utils.dataset import DataLoaderKwargs

STORE = 16  # numbers a side of bergson's store
RESET, STATUS = pathlib.Path("/proc/self/clear_refs"), pathlib.Path("/proc/self/status")


def padded(examples: list[dict]) -> dict[str, torch.Tensor]:
  """A batch: ids, labels and mask, int64 [B, T]."""
  longest = max(len(example["input_ids"]) for example in examples)
  blank = {"input_ids": 0, "labels": -100, "attention_mask": 0}
  rows = [example | {"attention_mask": [1] * len(example["input_ids"])} for example in examples]
  fill = lambda row, name: row[name] + [blank[name]] * (longest - len(row[name]))  # noqa: E731
  return {name: torch.tensor([fill(row, name) for row in rows]) for name in blank}


def losses(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
  """Mean negative log-likelihood of each example's response tokens, [B]."""
  logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
  target = batch["labels"][:, 1:]
  each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
  return each.view_as(target).sum(1) / (target != -100).sum(1)


class Influence(Task):
  """kronfluence's view of the model."""

  def __init__(self, modules: list[str]):
    """Chooses the modules."""
    super().__init__()
    self._modules = modules

  def compute_train_loss(self, batch, model, sample=False):
    """Sum over the examples."""
    return losses(model, batch).sum()

  def compute_measurement(self, batch, model):
    """Of a query."""
    return self.compute_train_loss(batch, model)

  def get_influence_tracked_modules(self):
    """The matrices of all layers."""
    return self._modules

  def get_attention_mask(self, batch):
    """Real tokens."""
    return batch["attention_mask"]


class Peers:
  """The model, the examples and the passes."""

  def __init__(self, job: dict):
    """Loads the model, and takes the query's gradient."""
    self.folder, self.train, self.query = job["folder"], job["train"], job["query"]
    self.batches = self._batches(job["batch_tokens"])
    self.model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    self.model.eval()
    self._query = self._collect([self.query], [[0]], 0).gradients

  def _batches(self, tokens: int) -> list[list[int]]:
    """Examples of like lengths together, about so many tokens with padding in a batch."""
    order = sorted(range(len(self.train)), key=lambda row: -len(self.train[row]["input_ids"]))
    found: list[list[int]] = []
    for row in order:
      if not found or (len(found[-1]) + 1) * len(self.train[found[-1][0]]["input_ids"]) > tokens:
        found.append([])
      found[-1].append(row)
    return found

  def _collect(self, examples: list[dict], batches: list[list[int]], size: int, scorer: Scorer | None = None):
    config = IndexConfig(run_path=f"{self.folder}/bergson", projection_dim=size, loss_reduction="mean")
    config.partial_run_path.mkdir(parents=True, exist_ok=True)
    data = Dataset.from_list(examples)
    collector = InMemoryCollector(
      model=self.model.base_model, data=data, cfg=config, scorer=scorer,
      processor=GradientProcessor(projection_dim=size or None),
    )  # fmt: skip
    CollectorComputer(self.model, data, collector=collector, batches=batches, cfg=config).run_with_collector_hooks()
    return collector

  def forward(self) -> list[float]:
    """Losses of all examples."""
    found = torch.zeros(len(self.train))
    with torch.no_grad():
      for rows in self.batches:
        found[rows] = losses(self.model, padded([self.train[row] for row in rows]))
    return found.tolist()

  def bergson_score(self) -> list[float]:
    """Products of whole gradients with the query's."""
    writer = InMemorySequenceScoreWriter(len(self.train), 1)
    scorer = Scorer(self._query, list(self._query), writer, torch.device("cpu"), torch.float32)
    self._collect(self.train, self.batches, 0, scorer)
    return writer.scores[:, 0].tolist()

  def bergson_store(self) -> list[float]:
    """Projected gradients of all examples; nothing is scored."""
    self._collect(self.train, self.batches, STORE)
    return []

  def kronfluence_score(self) -> list[float]:
    """Products of whole gradients with the query's, by kronfluence without factors."""
    names = [name for name, module in self.model.named_modules() if isinstance(module, torch.nn.Linear)]
    task = Influence([name for name in names if ".layers." in name])
    model = transformers.AutoModelForCausalLM.from_pretrained(self.model.name_or_path, dtype=torch.float32)
    analyzer = Analyzer(
      "peers", prepare_model(model.eval(), task), task, cpu=True, output_dir=self.folder, disable_tqdm=True
    )
    analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=padded))
    ordered = [row for rows in self.batches for row in rows]
    train, query = Dataset.from_list([self.train[row] for row in ordered]), Dataset.from_list([self.query])
    own = {"overwrite_output_dir": True, "factor_args": FactorArguments(strategy="identity")}
    analyzer.fit_all_factors("none", train, per_device_batch_size=8, **own)
    sizes = {"per_device_query_batch_size": 1, "per_device_train_batch_size": 8}
    analyzer.compute_pairwise_scores("scores", "none", query, train, overwrite_output_dir=True, **sizes)
    found = torch.zeros(len(ordered))
    found[ordered] = analyzer.load_pairwise_scores("scores")["all_modules"][0].float()
    return found.tolist()


PASSES = ("forward", "bergson_score", "bergson_store", "kronfluence_score")


def peak() -> float:
  """GB that the process has held at most since the last reset."""
  (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
  return int(line.split()[1]) * 1024 / 1e9


def main() -> None:
  """Answers line by line; what libraries print goes to standard error."""
  out = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  peers = Peers(json.loads(pathlib.Path(sys.argv[1]).read_text()))
  names = ("torch", "transformers", "bergson", "kronfluence")
  print(json.dumps({name: importlib.metadata.version(name) for name in names}), file=out, flush=True)
  for line in sys.stdin:
    RESET.write_text("5")
    began, busy = time.perf_counter(), time.process_time()
    values = getattr(peers, line.strip())()
    seconds, cpu = time.perf_counter() - began, time.process_time() - busy
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": peak(), "values": values}), file=out, flush=True)


if __name__ == "__main__":
  main()
