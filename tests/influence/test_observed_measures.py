"""Lengths, products and self-influence out of inputs and output gradients are those of per-example gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import quick_compile  # noqa: F401, an autouse fixture

from in2core_jax.errors import UserError
from in2core_jax.ihvp import ekfac
from in2core_jax.influence import normalize
from in2core_jax.influence.kernels import CompiledObjective
from in2core_jax.params import moment_probes

FIELDS = [field.name for field in dataclasses.fields(normalize.Measures)]


def gradients_of(rng, length, scale=1.0):
  """(inputs, output gradients, what the probe gives for them)."""
  a, g = rng.standard_normal((5, length, 12)), scale * rng.standard_normal((5, length, 9))
  g[2] = 0  # an example without response

  def pull(**probe):
    probe = jax.tree.map(lambda leaf: leaf[0], moment_probes.measure_probe(layers=1, size=5, dtype=g.dtype, **probe))
    made = jax.vjp(lambda y, probe: moment_probes.observe(jnp.asarray(a), y, probe), jnp.zeros_like(g), probe)[1]
    found = made(jnp.asarray(g))[1]
    peak = np.asarray(found.pop("peak"))
    return {name: np.asarray(found[name]) * (peak if found[name].ndim == 1 else peak[:, None]) for name in found
            if name in moment_probes.MEASURED}  # fmt: skip

  return np.einsum("bti,bto->bio", a, g), pull


@pytest.mark.parametrize(("length", "queries"), [(3, 0), (3, 1), (3, 3), (40, 1)])  # pairs of tokens are few, or many
def test_lengths_and_products_of_a_matrix_are_those_of_its_gradients(x64, length, queries):
  rng = np.random.default_rng(0)
  each, pull = gradients_of(rng, length, 1e-3)
  r = rng.standard_normal((queries, 1, 12, 9)) if queries else None
  found = pull(r=None if r is None else jnp.asarray(r), inverse=None)
  np.testing.assert_allclose(found["norm"], np.sqrt(np.sum(each**2, axis=(1, 2))), rtol=1e-10)
  assert ("along" in found) == bool(queries)
  if queries:
    np.testing.assert_allclose(found["along"], np.einsum("bio,qio->bq", each, r[:, 0]), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("turned", [True, False])
def test_self_influence_of_a_matrix_is_that_of_its_gradients(x64, turned):
  rng = np.random.default_rng(1)
  each, pull = gradients_of(rng, 4)
  values, r = rng.gamma(1, 1, (1, 12, 9)), rng.standard_normal((2, 1, 12, 9))
  bases = {side: np.linalg.qr(rng.standard_normal((1, n, n)))[0] for side, n in (("left", 12), ("right", 9))}
  inverse = {"values": values, "damping": 1e-3} | (bases if turned else {})
  found = pull(r=jnp.asarray(r), inverse=jax.tree.map(jnp.asarray, inverse))
  left, right = (bases[side][0] if turned else np.eye(n) for side, n in (("left", 12), ("right", 9)))
  mapped = left @ ((left.T @ each @ right) / (values[0] + 1e-3)) @ right.T
  np.testing.assert_allclose(found["own"] ** 2, np.sum(each * mapped, axis=(1, 2)), rtol=1e-9)
  np.testing.assert_allclose(found["mapped"], np.sqrt(np.sum(mapped**2, axis=(1, 2))), rtol=1e-9)
  np.testing.assert_allclose(found["norm"], np.sqrt(np.sum(each**2, axis=(1, 2))), rtol=1e-9)
  np.testing.assert_allclose(found["along"], np.einsum("bio,qio->bq", each, r[:, 0]), rtol=1e-9, atol=1e-12)


def assert_same(problem, stream, size, directions, inverse, rtol, monkeypatch):
  """What is measured out of inputs and output gradients, against per-example gradients."""
  assert normalize.observes(problem, inverse)
  found = normalize.measure(problem, stream, size, directions, inverse)
  with monkeypatch.context() as patch:
    patch.setattr(normalize, "observes", lambda *given: False)
    wanted = normalize.measure(problem, stream, size, directions, inverse)
  for name in FIELDS:
    values = getattr(wanted, name)
    np.testing.assert_allclose(getattr(found, name), values, rtol, rtol * np.abs(values).max(initial=0), err_msg=name)
  return found


def problem_of(t):
  problem = CompiledObjective(t.objective, t.sub, t.frozen, microbatch=3)
  return problem, lambda: iter([(np.arange(len(tiny.ROLES)), t.batch)]), len(tiny.ROLES)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"attention_bias": True, "query_key_norms": True}, {"norm_offset": 1.0}])
@pytest.mark.parametrize("lora", [0, 2])
def test_measures_with_an_inverse_are_those_of_gradients(x64, monkeypatch, changes, lora):
  t = tiny.make_tiny("1,2", "lora" if lora else "all", jnp.float64, config=tiny.smaller_config(**changes), lora=lora)
  problem, stream, size = problem_of(t)
  fitted = ekfac.fit(
    ekfac.Source(t.objective, t.sub, t.frozen, stream), jax.random.key(0), ekfac.EkfacSettings("fisher")
  )
  for damping in (1e-3, 1e-9):
    inverse = normalize.inverse_map("ekfac", fitted, damping)
    assert_same(problem, stream, size, tiny.direction(t.sub, queries=2), inverse, 1e-8, monkeypatch)
  assert_same(problem, stream, size, None, normalize.IDENTITY, 1e-9, monkeypatch)


@pytest.mark.parametrize("factor", [1e-25, 1e25])
def test_tiny_and_huge_gradients_keep_their_size(factor):
  """In float32 the squares of these gradients would be 0 or infinite."""
  rng = np.random.default_rng(2)
  a, g = (jnp.asarray(rng.standard_normal((5, 3, n)), jnp.float32) for n in (12, 9))

  def measured(by):
    given = {"r": None, "inverse": {"values": jnp.ones((1, 12, 9)), "damping": jnp.zeros(())}}
    probe = jax.tree.map(lambda leaf: leaf[0], moment_probes.measure_probe(layers=1, size=5, dtype=g.dtype, **given))
    pull = jax.vjp(lambda y, probe: moment_probes.observe(a, y, probe), jnp.zeros_like(g), probe)[1]
    found = pull(by * g)[1]
    return {name: np.asarray(found[name], np.float64) * found["peak"] for name in ("norm", "own", "mapped")}

  found, wanted = measured(factor), measured(1.0)
  for name, values in wanted.items():
    np.testing.assert_allclose(found[name], factor * values, rtol=1e-5, err_msg=name)


def test_another_subtree_than_was_fitted_is_refused(x64):
  t = tiny.make_tiny("1", "all", jnp.float64, config=tiny.smaller_config())
  problem, stream, size = problem_of(t)
  inverse = normalize.GradientMap(normalize.inverse_map("ekfac", ekfac.Ekfac({}, {}, {}), 0.1).function, ({}, {}, 0.1))
  with pytest.raises(UserError, match="fitted to another subtree"):
    normalize.measure(problem, stream, size, None, inverse)
