"""Eight simulated devices, and two processes with four each, compute what one device computes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import AxisType, PartitionSpec

from in2core_jax import gradients
from in2core_jax.data.batches import Batch
from in2core_jax.errors import UserError
from in2core_jax.model import decoder
from in2core_jax.model.objective import make_objective
from in2core_jax.parallel import processes, sharding
from in2core_jax.params import subtree

quick_compile = tiny.quick_compile
P = PartitionSpec
CONFIG = decoder.ModelConfig(96, 32, 64, 3, 4, 2, 8)
MESHES = ("data:2,fsdp:4", *(pytest.param(spec, marks=pytest.mark.slow) for spec in ("data:8", "data:4,fsdp:2")))


def make_params(modules, dtype=np.float32):
  """A tiny model on the host, with LoRA factors beside every kernel when `modules` asks for them."""
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(lambda key: decoder.init_params(CONFIG, key), jax.random.key(0))
  params = jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape).astype(dtype), shapes)
  if "lora" in modules:
    for block in ("attention", "mlp"):
      for projection in params["layers"][block].values():
        layers, width, features = projection["kernel"].shape
        projection["lora_a"] = 0.2 * rng.standard_normal((layers, width, 4)).astype(dtype)
        projection["lora_b"] = 0.2 * rng.standard_normal((layers, 4, features)).astype(dtype)
  return params


def make_batch(size=16, tokens=12, responses=5, dtype=np.float32):
  """Random tokens; the last row is padding, the one before has no response."""
  rng = np.random.default_rng(2)
  weight = np.full((size, responses), 1 / responses, dtype)
  weight[-2:] = 0
  return Batch(
    tokens=rng.integers(0, CONFIG.vocab_size, (size, tokens)).astype(np.int32),
    hidden=None,
    position=rng.integers(0, tokens, (size, responses)).astype(np.int32),
    target=rng.integers(0, CONFIG.vocab_size, (size, responses)).astype(np.int32),
    weight=weight,
    valid=(np.arange(size) < size - 1).astype(dtype),
  )


def make_problem(modules, dtype=np.float32):
  params = make_params(modules, dtype)
  chosen = subtree.make_subtree(params, "last:2" if modules == "attention" else "all", modules)
  sub, frozen = subtree.split(params, chosen)
  rng = np.random.default_rng(3)
  vectors = jax.tree.map(lambda leaf: rng.standard_normal((2, *leaf.shape)).astype(dtype), sub)
  return make_objective(CONFIG, chosen), sub, frozen, make_batch(dtype=dtype), vectors


def everything_fn(objective):
  """All that influence asks of `gradients`, in one program."""

  def everything(sub, frozen, batch, vectors):
    one = jax.tree.map(lambda leaf: leaf[0], vectors)
    args = (objective, sub, frozen, batch)
    return {
      "losses": gradients.per_example_losses(*args),
      "gradient": gradients.sum_gradient(*args),
      "jvp": tiny.jvp_scores(*args, one),
      "vmap": gradients.vmap_scores(*args, vectors),
      "ggn": gradients.ggn_product(*args, one),
    }

  return jax.jit(everything)


_REFERENCES = {}


def reference(modules, dtype):
  """The single-device answers, computed once per kind."""
  if (modules, dtype) not in _REFERENCES:
    objective, *args = make_problem(modules, dtype)
    _REFERENCES[modules, dtype] = processes.to_host(everything_fn(objective)(*args))
  return _REFERENCES[modules, dtype]


def assert_same(got, want, tolerance):
  """Largest difference relative to the largest entry, leaf by leaf."""
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
    assert a.shape == b.shape and a.dtype == b.dtype
    size = np.abs(b).max()
    assert size > 0, path
    assert np.abs(a - b).max() <= tolerance * size, f"{jax.tree_util.keystr(path)}: {np.abs(a - b).max() / size}"


def run_on_mesh(spec, modules, dtype):
  objective, sub, frozen, batch, vectors = make_problem(modules, dtype)
  mesh = sharding.make_mesh(spec)
  return processes.to_host(
    everything_fn(objective)(
      sharding.place_params(sub, mesh),
      sharding.place_params(frozen, mesh),
      sharding.place_batch(batch, mesh),
      sharding.place_vectors(vectors, mesh, query_axis=True),
    )
  )


@pytest.mark.real
@pytest.mark.parametrize("spec", MESHES)
def test_eight_devices_equal_one(spec):
  modules = "all,lora"  # full weights and LoRA leaves in one subtree
  got = run_on_mesh(spec, modules, np.float32)
  assert_same(got, reference(modules, np.float32), 1e-5)
  assert np.all(got["jvp"][-2:] == 0) and np.all(got["jvp"][:-2] != 0)


@pytest.mark.slow
@pytest.mark.real
def test_eight_devices_equal_one_in_double_precision(x64):
  got = run_on_mesh("data:2,fsdp:2,tensor:2", "attention", np.float64)
  assert_same(got, reference("attention", np.float64), 1e-10)


# ---- mesh


@pytest.mark.parametrize(
  "spec, shape",
  [
    ("", (8, 1, 1)),
    ("data:4,fsdp:2", (4, 2, 1)),
    ("fsdp:4, data:-1", (2, 4, 1)),
    ("fsdp:8", (1, 8, 1)),
    ("data=2,fsdp=-1,tensor=2", (2, 2, 2)),
  ],
)
def test_make_mesh(spec, shape):
  mesh = sharding.make_mesh(spec)
  assert mesh.axis_names == ("data", "fsdp", "tensor")
  assert mesh.devices.shape == shape
  assert set(mesh.axis_types) == {AxisType.Auto}
  assert sharding.batch_multiple(mesh) == shape[0] * shape[1]
  assert len({device.id for device in mesh.devices.flat}) == 8


def test_make_mesh_of_some_devices():
  mesh = sharding.make_mesh("data:-1,fsdp:2", jax.devices()[2:6])
  assert [device.id for device in mesh.devices.flat] == [device.id for device in jax.devices()[2:6]]


@pytest.mark.parametrize(
  "spec, words",
  [
    ("data:3", ["needs 3 devices", "this job has 8 cpu devices", "--mesh=data:8"]),
    ("data:4,fsdp:4", ["needs 16 devices", "--mesh=data:2,fsdp:4"]),
    ("data:-1,fsdp:3", ["multiple of 3", "--mesh=data:8"]),
    ("data:-1,fsdp:-1", ["only one axis"]),
    ("data:0", ["'data:0' is not understood"]),
    ("data", ["'data' is not understood"]),
    ("model:8", ["unknown axis 'model'", "data, fsdp, tensor"]),
    ("data:4,data:2", ["repeated axis 'data'"]),
  ],
)
def test_make_mesh_refuses(spec, words):
  with pytest.raises(UserError) as caught:
    sharding.make_mesh(spec)
  for word in words:
    assert word in str(caught.value)


# ---- rules


def test_params_are_cut_as_the_rules_say():
  params, mesh = make_params("lora"), sharding.make_mesh("data:2,fsdp:4")
  placed = sharding.place_params(params, mesh)
  query = placed["layers"]["attention"]["q_proj"]
  assert query["kernel"].addressable_shards[0].data.shape == (3, 8, 32)
  assert placed["layers"]["mlp"]["down_proj"]["kernel"].addressable_shards[0].data.shape == (3, 64, 8)
  assert query["lora_a"].addressable_shards[0].data.shape == (3, 8, 4)
  assert query["lora_b"].addressable_shards[0].data.shape == (3, 4, 8)
  assert placed["embed"]["embedding"].addressable_shards[0].data.shape == (96, 8)
  for path, leaf in jax.tree_util.tree_leaves_with_path(placed):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    held = leaf.addressable_shards[0].data.size
    assert held == (leaf.size if "norm" in name else leaf.size // 4), name  # a quarter on every device, norms whole
  assert all(
    np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (processes.to_host(placed), params)), strict=True)
  )


def test_tensor_axis_and_first_axis():
  params, mesh = make_params("lora"), sharding.make_mesh("data:2,fsdp:2,tensor:2")
  specs = sharding.param_specs(params, mesh)
  assert specs["layers"]["attention"]["k_proj"]["kernel"] == P(None, "fsdp", "tensor")
  assert specs["layers"]["attention"]["o_proj"]["kernel"] == P(None, "tensor", "fsdp")
  assert specs["layers"]["mlp"]["up_proj"]["lora_b"] == P(None, None, ("tensor", "fsdp"))
  for _, rule in sharding.PARTITION_RULES:
    assert not rule or rule[0] is None or rule in (P("tensor", "fsdp"), P("fsdp", "tensor"))
  stacked = jax.tree.leaves(specs["layers"], is_leaf=lambda node: isinstance(node, P))
  assert all(not spec or spec[0] is None for spec in stacked)


def test_every_leaf_of_the_tree_has_a_rule():
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16)  # noqa: E731
  params = make_params("lora")
  params["layers"]["attention"]["q_proj"] |= {
    "bias": shape(3, 32),
    "left": shape(3, 32, 16),
    "core": shape(3, 16, 16),
    "right": shape(3, 16, 32),
  }
  params["layers"]["attention"]["q_norm"] = params["layers"]["mlp_post_norm"] = {"scale": shape(3, 8)}
  params["lm_head"] = {"kernel": shape(32, 96)}
  specs = sharding.param_specs(params, sharding.make_mesh("fsdp:8"), strict=True)
  assert specs["layers"]["attention"]["q_proj"]["core"] == P(None, "fsdp")
  assert specs["layers"]["attention"]["q_proj"]["left"] == P(None, "fsdp")
  assert specs["lm_head"]["kernel"] == P("fsdp")
  assert specs["layers"]["attention"]["q_proj"]["bias"] == P()
  assert specs["layers"]["attention"]["q_norm"]["scale"] == specs["layers"]["mlp_post_norm"]["scale"] == P()


def test_optimizer_state_follows_the_parameters():
  params, mesh = make_params("all"), sharding.make_mesh("data:4,fsdp:2")
  state = jax.eval_shape(optax.adamw(1e-3).init, params)
  specs = sharding.param_specs(state, mesh)
  assert specs[0].count == P()
  assert specs[0].mu == specs[0].nu == sharding.param_specs(params, mesh)
  placed = jax.jit(optax.adamw(1e-3).init, out_shardings=sharding.shardings(specs, mesh))(params)
  assert placed[0].nu["layers"]["mlp"]["up_proj"]["kernel"].addressable_shards[0].data.shape == (3, 16, 64)


def test_uncovered_leaves_are_all_listed():
  params = make_params("all")
  params["layers"]["attention"]["q_norm"] = {"zeta": np.ones((3, 8))}
  params["vision"] = {"patch": np.ones((3, 3))}
  with pytest.raises(UserError) as caught:
    sharding.param_specs(params, sharding.make_mesh())
  assert "2 leaves" in str(caught.value)
  assert "layers/attention/q_norm/zeta [3, 8]" in str(caught.value) and "vision/patch [3, 3]" in str(caught.value)


def test_first_rule_wins_and_long_rules_are_refused():
  mesh = sharding.make_mesh("data:4,fsdp:2")
  tree = {"a": {"kernel": np.ones((4, 6))}}
  assert sharding.param_specs(tree, mesh, [("kernel", P(None, "fsdp")), ("a/", P("fsdp"))])["a"]["kernel"] == P(
    None, "fsdp"
  )
  with pytest.raises(UserError, match="3 dimensions, but a/kernel has shape"):
    sharding.param_specs(tree, mesh, [("kernel", P(None, "fsdp", None))])


def test_sizes_that_do_not_divide_are_replicated_and_noted(caplog):
  tree = {"layers": {"mlp": {"up_proj": {"kernel": np.ones((2, 6, 8)), "lora_b": np.ones((2, 4, 6))}}}}
  mesh = sharding.make_mesh("data:1,fsdp:4,tensor:2")
  with caplog.at_level("INFO"):
    specs = sharding.param_specs(tree, mesh)["layers"]["mlp"]["up_proj"]
  assert specs["kernel"] == P(None, None, "tensor")
  assert specs["lora_b"] == P(None, None, "tensor")
  notes = [record.message for record in caplog.records]
  assert len(notes) == 2 and "up_proj/kernel [2, 6, 8]: 6 does not divide by 4, replicated over 'fsdp'" in notes[0]
  assert sharding.place_params(tree, mesh)["layers"]["mlp"]["up_proj"]["kernel"].addressable_shards[0].data.shape == (
    2,
    6,
    4,
  )
  with pytest.raises(UserError, match="6 does not divide by 4"):
    sharding.param_specs(tree, mesh, strict=True)


def test_vectors_are_cut_like_the_subtree():
  mesh = sharding.make_mesh("data:2,fsdp:4")
  _, sub, _, _, vectors = make_problem("all")
  one, many = sharding.vector_specs(sub, mesh, False), sharding.vector_specs(vectors, mesh, True)
  assert one == sharding.param_specs(sub, mesh)
  assert many["layers"]["attention"]["q_proj"]["kernel"] == P(None, None, "fsdp")
  assert many["layers"]["mlp"]["down_proj"]["kernel"] == P(None, None, None, "fsdp")
  placed = sharding.place_vectors(vectors, mesh, query_axis=True)
  assert placed["layers"]["mlp"]["down_proj"]["kernel"].addressable_shards[0].data.shape == (2, 3, 64, 8)


# ---- batches


def test_place_batch():
  mesh, batch = sharding.make_mesh("data:2,fsdp:2,tensor:2"), make_batch(16)
  placed = sharding.place_batch(batch, mesh)
  assert placed.hidden is None
  assert placed.tokens.sharding.spec == P(("data", "fsdp"))
  assert placed.tokens.addressable_shards[0].data.shape == (4, 12)
  held = {tuple(shard.index[0].indices(16)[:2]) for shard in placed.tokens.addressable_shards}
  assert held == {(0, 4), (4, 8), (8, 12), (12, 16)}  # tensor replicates, data and fsdp cut
  assert np.array_equal(processes.to_host(placed.tokens), batch.tokens)
  same = sharding.place_batch(batch, mesh, per_process=True)  # one process holds all rows
  assert same.tokens.sharding == placed.tokens.sharding and np.array_equal(same.tokens, batch.tokens)


def test_place_batch_refuses():
  mesh = sharding.make_mesh("data:4,fsdp:2")
  with pytest.raises(UserError, match="12 examples cannot be cut over 8 devices.*multiple of 8"):
    sharding.place_batch(make_batch(12), mesh)
  with pytest.raises(UserError, match="one size B"):
    sharding.place_batch({"a": np.ones((8, 2)), "b": np.ones(16)}, mesh)


def test_whole_copies_and_to_host():
  mesh = sharding.make_mesh("data:4,fsdp:2")
  tree = {"a": np.arange(6.0, dtype=np.float32), "b": None, "c": np.float32(3)}
  placed = sharding.place(tree, mesh, jax.tree.map(lambda _: P(), tree))
  assert len(placed["a"].addressable_shards) == 8
  assert all(np.array_equal(shard.data, tree["a"]) for shard in placed["a"].addressable_shards)
  host = processes.to_host(placed)
  assert host["b"] is None and isinstance(host["a"], np.ndarray) and host["c"] == 3


def test_arrays_on_one_device_are_moved():
  mesh = sharding.make_mesh("data:4,fsdp:2")
  leaf = {"embed": {"embedding": jnp.arange(32.0).reshape(8, 4)}}
  placed = sharding.place_params(leaf, mesh)["embed"]["embedding"]
  assert placed.addressable_shards[0].data.shape == (8, 2)
  assert np.array_equal(placed, leaf["embed"]["embedding"])


# ---- several processes


def work(coordinator, process_id, num_processes, out):
  """One of two processes; run as a program."""
  assert processes.initialize(coordinator, process_id, num_processes, timeout=60)
  assert (jax.process_index(), jax.process_count(), jax.local_device_count()) == (process_id, num_processes, 4)
  rows = slice(8 * process_id, 8 * (process_id + 1))
  results = {"rows": np.arange(16)[rows]}
  objective, sub, frozen, batch, vectors = make_problem("attention")
  for spec in ("data:8", "fsdp:8"):  # the last: parameters cut across the processes
    mesh = sharding.make_mesh(spec)
    mine = jax.tree.map(lambda leaf: leaf[rows], batch)
    placed = (
      sharding.place_params(sub, mesh),
      sharding.place_params(frozen, mesh),
      sharding.place_batch(mine, mesh, per_process=True) if spec == "data:8" else sharding.place_batch(batch, mesh),
      sharding.place_vectors(vectors, mesh, query_axis=True),
    )
    assert not placed[2].tokens.is_fully_addressable
    one = jax.tree.map(lambda leaf: leaf[0], placed[3])
    score = jax.jit(lambda s, f, b, v: tiny.jvp_scores(objective, s, f, b, v))
    results[spec] = processes.to_host(score(*placed[:3], one))
    back = processes.to_host(placed[0])
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (back, sub)), strict=True))
  np.savez(out, **results)


def jvp_on_one_device():
  objective, sub, frozen, batch, vectors = make_problem("attention")
  one = jax.tree.map(lambda leaf: leaf[0], vectors)
  score = jax.jit(lambda s, f, b, v: tiny.jvp_scores(objective, s, f, b, v))
  return np.asarray(score(sub, frozen, batch, one))


@pytest.mark.real
def test_two_processes_equal_one(tmp_path):
  coordinator, out = f"localhost:{tiny.free_port()}", [str(tmp_path / f"{index}.npz") for index in range(2)]
  program = "import sys, test_sharding as t; t.work(sys.argv[1], int(sys.argv[2]), 2, sys.argv[3])"
  done = tiny.run_processes(program, [[coordinator, str(index), out[index]] for index in range(2)])
  assert [code for code, _ in done] == [0, 0], "\n".join(output for _, output in done)[-4000:]
  found = [np.load(tmp_path / f"{index}.npz") for index in range(2)]
  want = jvp_on_one_device()
  for results in found:
    for spec in ("data:8", "fsdp:8"):
      assert np.abs(results[spec] - want).max() <= 1e-5 * np.abs(want).max()
  assert np.array_equal(np.concatenate([results["rows"] for results in found]), np.arange(16))
