"""Seconds and memory of reading, tokenising and planning a large pool, beside `datasets.map` on the same file.

python -m experiments.benchmark.reading --records=1000000 --folder=runs/reading --peer=PATH/OF/PYTHON

It writes records of about 200 tokens as Parquet, then starts a process for each way, so that no peak hides another's.
--peer is the Python of an environment that has datasets, transformers and jinja2; without it we are measured alone.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_WORDS = (
  "the of and to in is that for it as was with be by on not he his but at are this have from or had an they which one "
  "you were her all she there would their we him been has when who will more no if out so said what up its about into"
)
PROMPT, RESPONSE = 60, 120  # words
_ROWS = 10_000  # of a row group

# What the other process runs: the same template and tokenizer, ids and a mask of the response.
_PEER = """
import json, os, resource, sys, time
from datasets import load_dataset
from transformers import AutoTokenizer
file, model, cache = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
peak = lambda: max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
before, began = peak(), time.perf_counter()

def encode(rows):
  asked = [[{"role": "user", "content": text}] for text in rows["prompt"]]
  said = [[*turns, {"role": "assistant", "content": text}] for turns, text in zip(asked, rows["response"])]
  whole = tokenizer.apply_chat_template(said, tokenize=False)
  starts = [len(text) for text in tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)]
  found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
  masks = [[a >= start for a, _ in offsets] for offsets, start in zip(found["offset_mapping"], starts)]
  return {"input_ids": found["input_ids"], "mask": masks}

pool = load_dataset("parquet", data_files=file, split="train", cache_dir=cache)
pool = pool.map(encode, batched=True, num_proc=os.cpu_count(), remove_columns=pool.column_names)
seconds = time.perf_counter() - began
tokens = sum(map(len, pool["input_ids"]))
print(json.dumps({"seconds": seconds, "peak_mb": peak() / 1024, "imports_mb": before / 1024, "tokens": tokens}))
"""


def write_pool(path: pathlib.Path, records: int) -> None:
  """Records of random words; the same bytes on each call."""
  rng, words = np.random.default_rng(0), np.array(_WORDS.split())
  said = lambda rows, size: [" ".join(line) for line in words[rng.integers(0, len(words), (rows, size))]]  # noqa: E731
  with pq.ParquetWriter(path, pa.schema([("prompt", pa.string()), ("response", pa.string())])) as out:
    for start in range(0, records, _ROWS):
      rows = min(_ROWS, records - start)
      out.write_table(pa.table({"prompt": said(rows, PROMPT), "response": said(rows, RESPONSE)}))


def peak_mb() -> float:
  """The most memory that this process has held, MB."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(path: pathlib.Path) -> dict:
  """Our way, in this process: seconds of each step, peak memory, tokens."""
  from in2core_jax.data import packing, tokenizing
  from in2core_jax.model import weights

  _, tokenizer = weights.describe_model("smollm2")
  before, laps = peak_mb(), [time.perf_counter()]
  records = tokenizing.load_records(f"file:{path}")
  laps.append(time.perf_counter())
  pool = tokenizing.tokenize(records, tokenizer, 512, "none")
  laps.append(time.perf_counter())
  packing.Packer(pool).sequential_plan(16_384)
  laps.append(time.perf_counter())
  steps = dict(zip(("read", "tokenise", "plan"), np.diff(laps).tolist(), strict=True))
  told = {"seconds": laps[-1] - laps[0], "peak_mb": peak_mb(), "imports_mb": before}
  return steps | told | {"tokens": int(pool.num_tokens.sum(dtype=np.int64))}


def save_tokenizer(folder: pathlib.Path) -> None:
  """The tokenizer for the other way."""
  from in2core_jax.model import weights

  weights.describe_model("smollm2")[1].save_pretrained(folder)


def table(records: int, found: dict[str, dict]) -> str:
  """As Markdown; memory is what a way adds to its imports, also as a multiple of the token ids in 16 bits."""
  lines = ["| way | records | seconds | MB beside imports | times the token ids |", "|---|---:|---:|---:|---:|"]
  for name, one in found.items():
    held, ids = one["peak_mb"] - one["imports_mb"], 2 * one["tokens"] / 2**20
    lines.append(f"| {name} | {records:,} | {one['seconds']:.1f} | {held:,.0f} | {held / ids:.1f} |")
  return "\n".join(lines) + "\n"


def main(arguments: argparse.Namespace) -> None:
  """Writes the pool, measures both ways, one after the other, and writes reading.json and reading.md."""
  folder = pathlib.Path(arguments.folder).absolute()
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / f"pool-{arguments.records}.parquet"
  if arguments.alone:
    print(json.dumps(measure(path)))
    return
  if not path.exists():
    write_pool(path.with_suffix(".part"), arguments.records)
    path.with_suffix(".part").rename(path)
  own = [sys.executable, "-m", "experiments.benchmark.reading", "--alone", f"--folder={folder}"]
  ways = {"in2core_jax": [*own, f"--records={arguments.records}"]}
  if arguments.peer:
    save_tokenizer(folder / "tokenizer")
    cache = folder / f"cache-{time.time_ns()}"  # an earlier map would be taken from there
    ways["datasets.map"] = [arguments.peer, "-c", _PEER, str(path), str(folder / "tokenizer"), str(cache)]
  found = {}
  for name, command in ways.items():
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
      raise SystemExit(f"{name} ended with {done.returncode}: see its messages above")
    found[name] = json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: {found[name]}", flush=True)
  (folder / "reading.json").write_text(json.dumps({"records": arguments.records, "ways": found}, indent=1) + "\n")
  (folder / "reading.md").write_text(table(arguments.records, found))
  print(table(arguments.records, found))


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--records", type=int, default=20_000)
  parser.add_argument("--folder", default="runs/reading")
  parser.add_argument("--peer", default="", help="Python of an environment with datasets and transformers")
  parser.add_argument("--alone", action="store_true", help="measure our way in this process")
  main(parser.parse_args())
