"""DataInf's sums out of activations and output gradients are those of per-example gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from in2core_jax.ihvp import datainf_probes
from in2core_jax.ihvp.datainf import DataInfSettings, datainf
from in2core_jax.influence.kernels import CompiledObjective
from in2core_jax.params import moment_probes

quick_compile = tiny.quick_compile


@pytest.mark.parametrize("length", [3, 40])  # pairs of tokens are fewer than numbers of a gradient, or more
def test_lengths_and_sums_of_a_matrix_are_those_of_its_gradients(x64, length):
  rng = np.random.default_rng(0)
  a, g, v = (jnp.asarray(rng.standard_normal(shape)) for shape in ((5, length, 12), (5, length, 9), (2, 12, 9)))
  probe = {"v": v, "damping": jnp.asarray(0.3), "sums": jnp.zeros_like(v), "norms": jnp.zeros(5)}
  _, pull = jax.vjp(lambda y, probe: moment_probes.observe(a, y, probe), jnp.zeros_like(g), probe)
  found, each = pull(g)[1], np.einsum("bti,bto->bio", a, g)
  norms = np.sum(each**2, axis=(1, 2))
  np.testing.assert_allclose(found["norms"], norms, rtol=1e-10)
  weights = np.einsum("bio,qio->qb", each, v) / (0.3 + norms)
  np.testing.assert_allclose(found["sums"], np.einsum("qb,bio->qio", weights, each), rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"attention_bias": True, "query_key_norms": True}, {"norm_offset": 1.0}])
def test_datainf_without_gradients_is_that_of_gradients(x64, changes):
  config = tiny.smaller_config(**changes)
  t = tiny.make_tiny("1,2", dtype=jnp.float64, config=config)
  parts = [tiny.make_batch(config, rows) for rows in ((0, 1, 2), (3, 4, 5))]
  source = CompiledObjective(t.objective, t.sub, t.frozen, microbatch=3).example_gradients(lambda: iter(parts))
  assert source.observed is not None
  v = tiny.direction(t.sub, queries=2)
  for settings in (DataInfSettings(0.1), DataInfSettings(damping_ratio=0.1)):
    found, wanted = (datainf(v, own, settings) for own in (source, dataclasses.replace(source, observed=None)))
    tiny.assert_trees_close(found.solution, wanted.solution, 1e-9)
    assert found.info["damping"] == pytest.approx(wanted.info["damping"], rel=1e-9)


def test_leaves_without_a_probe_take_gradients():
  t = tiny.make_tiny("1")
  assert datainf_probes.serves(t.objective, t.sub)
  assert not datainf_probes.serves(t.objective, {"embed": {"embedding": 0}})
  assert not datainf_probes.serves(dataclasses.replace(t.objective, reads_probes=False), t.sub)
