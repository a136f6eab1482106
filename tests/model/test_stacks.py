"""Weights that go to the devices tensor by tensor are those that were stacked on the host, in the same sharding."""

import jax
import numpy as np
import pytest
from test_weights import CONFIG, edit_tensors, make_params

from in2core_jax.errors import UserError
from in2core_jax.model import stacks, weights
from in2core_jax.parallel import sharding


@pytest.mark.parametrize(("shape", "index"), [((5, 4), (1,)), ((3, 5, 4), (1,)), ((5, 4), ()), ((6,), (1,))])
@pytest.mark.parametrize("kind", ["host", "devices"])
def test_a_leaf_is_filled_block_by_block(kind, shape, index, monkeypatch):
  """Also where the last two axes change places, and whatever the blocks; NaN in any of them is seen."""
  monkeypatch.setattr(stacks, "BLOCK_NUMBERS", 8)
  tensor = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
  for turned in (False, True)[: len(shape)]:
    wanted = tensor.swapaxes(-1, -2) if turned else tensor
    placed = sharding.NamedSharding(sharding.make_mesh("data:8"), sharding.PartitionSpec())
    whole = (2,)[: len(index)] + wanted.shape
    stack = stacks.stack_of(whole, np.dtype("float32"), placed if kind == "devices" else None)
    stack.put((0,) * len(index), np.zeros(shape, np.float32), turned)
    assert stack.put(index, tensor, turned)
    np.testing.assert_array_equal(np.asarray(stack.array)[index], wanted)
    tensor[-1] = np.nan
    assert not stack.put(index, tensor, turned)
    tensor[-1] = 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streamed_weights_are_those_of_the_host(dtype, tmp_path, monkeypatch):
  weights.save_hf_dir(tmp_path, CONFIG, make_params(CONFIG))
  mesh = sharding.make_mesh("data:2,fsdp:2,tensor:2")
  _, wanted = weights.load_hf_dir(tmp_path, dtype, mesh)
  assert isinstance(wanted["embed"]["embedding"], np.ndarray)  # on a CPU it stays there
  wanted = sharding.place_params(wanted, mesh)
  monkeypatch.setattr(stacks, "STREAMED_BYTES", 0)
  monkeypatch.setattr(stacks, "BLOCK_NUMBERS", 100)
  monkeypatch.setattr(stacks, "has_own_memory", lambda mesh: True)
  _, found = weights.load_hf_dir(tmp_path, dtype, mesh)
  for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim) and ours.dtype == theirs.dtype
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
  placed = sharding.place_params(found, mesh)["layers"]["mlp"]["up_proj"]["kernel"]
  kernel = found["layers"]["mlp"]["up_proj"]["kernel"]
  pointer = lambda array: array.addressable_shards[0].data.unsafe_buffer_pointer()  # noqa: E731
  assert pointer(placed) == pointer(kernel)  # nothing is copied where it is placed already
  edit_tensors(tmp_path, lambda t: t["model.layers.1.mlp.up_proj.weight"].fill(np.nan))
  with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj.weight holds NaN"):
    weights.load_hf_dir(tmp_path, dtype, mesh)
