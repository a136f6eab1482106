"""A tiny decoder, a few examples of awkward shapes and their batch, for every test that needs a model.

The same numbers in any dtype: everything is drawn in float64 by NumPy and then cast. At the end, what runs of whole
stages need: a model with a tokenizer, flags for it, a training that is killed, processes of their own.
"""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers

from experiments import subprocesses
from in2core_jax import gradients
from in2core_jax.data import assets, batches
from in2core_jax.model import decoder, hf_config, weights
from in2core_jax.model.objective import make_objective
from in2core_jax.model.tokenizer import tokenizer_from_gguf
from in2core_jax.parallel import sharding
from in2core_jax.params import subtree
from in2core_jax.pipeline import session as sessions
from in2core_jax.pipeline.settings import Settings
from in2core_jax.training import train_loop

# (role of each token: P prompt, r response). Odd lengths, one response token only, several turns, a prompt at the end,
# one prompt token before a long response, no response at all.
ROLES = ("PPPrrrr", "PPrrPPPrrrP", "PPPPr", "PPPPPP", "Prrrrrrrr", "PPPPrPr")
NO_RESPONSE = 3
MULTI_TURN = 1
NUM_TOKENS, NUM_RESPONSES = 13, 9
SIZE = 8  # two padding rows


def jvp_scores(*args) -> jax.Array:
  """The scores of `gradients.losses_and_jvp_scores` alone, [B]."""
  return gradients.losses_and_jvp_scores(*args)[1]


@pytest.fixture(scope="module", autouse=True)
def quick_compile():
  """For a module that imports it: programs of microseconds are not worth an optimising compiler's seconds."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


# What makes the decoder a Gemma 3: of five layers the third is global, the window is shorter than the examples.
GEMMA3 = hf_config.GEMMA3 | {
  "query_scalar": 5.0,
  "global_every": 3,
  "sliding_window": 3,
  "local_rope_theta": 50.0,
  "rope_scaling": (("factor", 4.0), ("rope_type", "linear")),
}


class Tiny(NamedTuple):
  """One model, one subtree, one batch."""

  config: decoder.ModelConfig
  params: Any
  subtree: subtree.Subtree
  objective: gradients.Objective
  sub: Any
  frozen: Any
  batch: batches.Batch


def make_config(**changes) -> decoder.ModelConfig:
  """Five layers, four heads that share two key heads, sizes that differ from each other."""
  sizes = {
    "vocab_size": 37,
    "hidden_size": 12,
    "intermediate_size": 14,
    "num_layers": 5,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
  }
  return decoder.ModelConfig(**(sizes | changes))


def smaller_config(**changes) -> decoder.ModelConfig:
  """Small enough for dense curvature matrices."""
  sizes = {"vocab_size": 11, "hidden_size": 6, "intermediate_size": 5, "num_layers": 3, "num_heads": 2}
  return make_config(**(sizes | {"num_kv_heads": 1, "head_dim": 4} | changes))


def make_params(config: decoder.ModelConfig, dtype=jnp.float32, seed: int = 0, lora: int = 0, sketch: int = 0):
  """Parameters of natural scale: factors of norms around one, biases and both LoRA factors not zero, `core` zero."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda key: decoder.init_params(config, key), jax.random.key(0))

  def draw(path, leaf):
    name = path[-1].key
    values = rng.standard_normal(leaf.shape)
    if name in ("kernel", "experts"):
      return values / np.sqrt(leaf.shape[-2])
    if name in ("bias", "expert_bias", "sinks"):
      return 0.3 * values
    return {"scale": 1 - config.norm_offset + 0.2 * values, "embedding": 0.7 * values}[name]

  params = jax.tree_util.tree_map_with_path(draw, shapes)
  modules = [*params["layers"]["attention"].values(), *params["layers"]["mlp"].values()]
  for module in (module for module in modules if isinstance(module, dict) and "kernel" in module):
    layers, inner, outer = module["kernel"].shape
    if lora:
      module["lora_a"] = rng.standard_normal((layers, inner, lora)) / np.sqrt(inner)
      module["lora_b"] = 0.3 * rng.standard_normal((layers, lora, outer))
    if sketch:
      module["left"] = rng.standard_normal((layers, inner, sketch))
      module["core"] = np.zeros((layers, sketch, sketch))
      module["right"] = rng.standard_normal((layers, sketch, outer))
  return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


def make_dataset(vocab_size: int, seed: int = 1):
  """The examples of `ROLES` with random ids, as much of a `TokenizedDataset` as a `Batcher` needs."""
  rng = np.random.default_rng(seed)
  return types.SimpleNamespace(
    ids=tuple(f"example-{i}" for i in range(len(ROLES))),
    tokens=tuple(rng.integers(0, vocab_size, len(roles)).astype(np.int32) for roles in ROLES),
    response_mask=tuple(np.array([role == "r" for role in roles]) for roles in ROLES),
  )


def make_batch(config, rows=None, num_tokens=NUM_TOKENS, num_responses=NUM_RESPONSES, size=SIZE, pad_id=0):
  """The batch of the given examples (all of them when None), padded to `size` rows."""
  shape = batches.Shape(num_tokens, num_responses)
  every = make_dataset(config.vocab_size)
  rows = range(len(ROLES)) if rows is None else rows
  fields = {name: tuple(values[row] for row in rows) for name, values in vars(every).items()}
  batcher = batches.Batcher(types.SimpleNamespace(**fields), (shape,), pad_id=pad_id)
  return batcher.batch(range(len(fields["ids"])), shape, size)


def make_tiny(layers="2,3", modules="all", dtype=jnp.float32, config=None, **extra) -> Tiny:
  """Everything that a test of derivatives needs; extra arguments go to `make_params`."""
  config = config or make_config()
  params = make_params(config, dtype, **extra)
  chosen = subtree.make_subtree(params, layers, modules)
  objective = make_objective(config, chosen)
  return Tiny(config, params, chosen, objective, *subtree.split(params, chosen), make_batch(config))


def direction(sub, seed: int = 2, queries: int | None = None, dtype=None):
  """A random direction like `sub`, with a leading query axis when `queries` is given."""
  rng = np.random.default_rng(seed)
  lead = () if queries is None else (queries,)
  return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(lead + leaf.shape), dtype or leaf.dtype), sub)


def plain_losses(config, params, batch):
  """The loss, written again from its definition: all logits, log-softmax, weighted sum over response slots; [B]."""
  every = jax.nn.log_softmax(decoder.logits(config, params, batch.tokens), axis=-1)
  rows = np.arange(every.shape[0])[:, None]
  return -jnp.sum(every[rows, batch.position, batch.target] * batch.weight, axis=-1)


def assert_trees_close(found, wanted, rtol: float):
  """Every leaf within rtol of the largest entry of its counterpart."""
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    assert got.shape == want.shape
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * np.abs(want).max(initial=0))


def assert_trees_equal(found, wanted):
  """Every leaf equal bit for bit, dtypes included."""
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


# ---- runs of whole stages ------------------------------------------------------------

# The embedded tokenizer has 49,152 entries, and products with so many would be most of such a run.
CONFIG = decoder.ModelConfig(2048, 16, 32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=4)


def one_device():
  """A mesh of one of the simulated devices, which is quick to compile."""
  return sharding.make_mesh("", jax.devices()[:1])


def open_session(s: Settings, model=None) -> sessions.Session:
  """A session on one device, or on those of a model that there is already."""
  return sessions.open_session(s, None if model else one_device(), model)


def make_tokenizer(size: int) -> transformers.PreTrainedTokenizerFast:
  """The embedded tokenizer with its first entries only; whatever text it gets, it writes longer."""
  whole = tokenizer_from_gguf(assets.asset_path(weights.EMBEDDED_MODEL))
  content = json.loads(whole.backend_tokenizer.to_str())
  kept = {token: i for token, i in content["model"]["vocab"].items() if i < size}
  merges = [pair for pair in content["model"]["merges"] if "".join(pair) in kept]
  content["model"] |= {"vocab": kept, "merges": merges}
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(content)),
    chat_template=whole.chat_template,
    clean_up_tokenization_spaces=False,
    **whole.special_tokens_map,
  )


def write_model(folder: pathlib.Path, config: decoder.ModelConfig = CONFIG) -> str:
  """Writes a random model and its tokenizer into `folder`; returns the --model that names it."""
  rng = np.random.default_rng(0)
  # The embeddings are large enough for logits that training can change.
  deviations = {"kernel": 0.02, "experts": 0.02, "embedding": 0.1}

  def draw(path, leaf):
    name = path[-1].key
    return np.ones(leaf.shape, "f4") if name == "scale" else deviations[name] * rng.standard_normal(leaf.shape, "f4")

  shapes = jax.eval_shape(lambda: decoder.init_params(config, jax.random.key(0)))
  params = jax.tree_util.tree_map_with_path(draw, shapes)
  weights.save_hf_dir(folder, config, params, make_tokenizer(config.vocab_size))
  return f"hf:{folder}"


def run_settings(
  folder: pathlib.Path, config: decoder.ModelConfig = CONFIG, kind: type[Settings] = Settings, **changes
) -> Settings:
  """Flags of a run that takes seconds, on a model that is written into `folder`, with real conversations."""
  small = {
    "model": write_model(folder / "model", config),
    "run_dir": str(folder / "run"),
    "system_prompt": "none",
    "max_length": 48,
    "max_shapes": 1,
    "train_limit": 40,
    "eval_limit": 10,
    "test_limit": 10,
    "trainable_layers": "last:2",
    "layers": "last:2",
    "learning_rate": 1e-2,
    "batch_size": 8,
    "batch_tokens": 480,
    "solver": "lissa",
    "damping_ratio": 0.1,
    "depth": 6,
    "curvature_examples": 8,
    "curvature_batch": 8,
    "checkpoint_every": 3,
    "policy": "proponents",
    "seeds": "0,1",
    "fixed_seeds": "0",
  }
  return kind(**(small | changes))


class Killed(BaseException):
  """Stands for SIGKILL inside one process: nothing may catch it."""


@contextlib.contextmanager
def killed_after_step(number: int):
  """The training inside is killed when it has logged that step."""
  log_step = train_loop.TrainLog.step

  def step_and_die(self, step, *rest):
    log_step(self, step, *rest)
    if step == number:
      raise Killed

  with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
    patch.setattr(train_loop.TrainLog, "step", step_and_die)
    yield


def child_environment(devices: int) -> dict[str, str]:
  """Variables of a process of its own, with so many simulated devices; it shares the tests' compiled programs.

  What it compiles is kept however quick it was: the next process does not compile it again.
  """
  ours = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
  return subprocesses.environment(
    {
      "XLA_FLAGS": " ".join([*ours, f"--xla_force_host_platform_device_count={devices}"]),
      "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
      "JAX_DEFAULT_MATMUL_PRECISION": "highest",
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
  )


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def run_processes(program: str, arguments: list[list[str]], mortal: int = 0) -> list[tuple[int, str]]:
  """Runs a Python program, which may import test modules, once for each list of arguments, side by side.

  Each process has four devices. When the `mortal` one fails, the others are killed, as a scheduler does. Returns
  (exit code, output) of each.
  """
  variables = child_environment(devices=4)
  tests = pathlib.Path(__file__).parent
  folders = sorted({file.parent for file in tests.rglob("*.py")})
  variables["PYTHONPATH"] += "".join(f"{os.pathsep}{folder}" for folder in folders)
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": variables}
  started = [subprocess.Popen([sys.executable, "-c", program, *own], **pipes) for own in arguments]
  try:
    outputs = {mortal: started[mortal].communicate(timeout=1500)[0]}
    for number, process in enumerate(started):
      if started[mortal].returncode:
        process.kill()
      outputs.setdefault(number, "" if number in outputs else process.communicate(timeout=1500)[0])
  finally:
    for process in started:
      process.kill()
  return [(process.returncode, outputs[number]) for number, process in enumerate(started)]
