"""Mixtures of experts: what they compute, and every derivative of it against dense oracles in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import quick_compile  # noqa: F401, an autouse fixture

from in2core_jax import gradients
from in2core_jax.costs import flop_counts
from in2core_jax.errors import UserError
from in2core_jax.ihvp import datainf, ekfac
from in2core_jax.influence import projected
from in2core_jax.model import decoder, experts
from in2core_jax.model.objective import make_objective
from in2core_jax.parallel import sharding
from in2core_jax.params import adapters, subtree
from in2core_jax.pipeline import finetune, select
from in2core_jax.training import recipe

OPTIONS = {"num_experts": 4, "experts_per_token": 2, "router_bias": True, "expert_bias": True, "swiglu_limit": 0.5}
OPTIONS |= {"attention_sinks": True, "qkv_clip": 1.0, "num_layers": 2}
PATHS = ("down_proj/experts", "gate_proj/experts", "up_proj/experts")


def case(modules="mlp,attention/sinks", **changes) -> tiny.Tiny:
  config = tiny.smaller_config(**(OPTIONS | changes))
  return tiny.make_tiny("1", modules, jnp.float64, config)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("norm_gates", [True, False])
def test_a_token_goes_through_the_experts_that_the_router_scores_highest(norm_gates, x64):
  config = tiny.smaller_config(**OPTIONS, norm_gates=norm_gates)
  mlp = jax.tree.map(lambda leaf: np.asarray(leaf[0]), tiny.make_params(config, jnp.float64)["layers"]["mlp"])
  x = np.random.default_rng(0).standard_normal((2, 5, config.hidden_size))
  found = jax.jit(lambda p, x: decoder.Mixture(config).apply({"params": p}, x))(mlp, x)
  project = lambda name, e, a: a @ mlp[name]["experts"][e] + mlp[name]["expert_bias"][e]  # noqa: E731
  for token, got in zip(x.reshape(10, -1), np.asarray(found).reshape(10, -1), strict=True):
    scores = token @ mlp["router"]["kernel"] + mlp["router"]["bias"]
    best = np.argsort(-scores)[:2]
    gates = np.exp(scores[best]) / np.exp(scores[best] if norm_gates else scores).sum()
    wanted = 0.0
    for gate, e in zip(gates, best, strict=True):
      g, up = np.minimum(project("gate_proj", e, token), 0.5), np.clip(project("up_proj", e, token), -0.5, 0.5)
      wanted = wanted + gate * project("down_proj", e, (up + 1) * g * sigmoid(1.702 * g))
    np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.slow
def test_gradients_scores_and_products_through_experts_are_the_dense_ones(x64):
  t = case(norm_gates=True)
  v, batch = tiny.direction(t.sub), t.batch
  losses = lambda sub: tiny.plain_losses(t.config, subtree.merge(sub, t.frozen, t.subtree), batch)  # noqa: E731

  def outputs(sub):
    every = decoder.logits(t.config, subtree.merge(sub, t.frozen, t.subtree), batch.tokens)
    return jnp.take_along_axis(every, batch.position[..., None], 1)

  @jax.jit
  def dense(sub):
    one_by_one = jax.jacrev(losses)(sub)
    exact = jax.jvp(jax.grad(lambda s: jnp.sum(losses(s))), (sub,), (v,))[1]
    logits, moved = jax.jvp(outputs, (sub,), (v,))
    p = jax.nn.softmax(logits)
    bent = batch.weight[..., None] * (p * moved - p * jnp.sum(p * moved, -1, keepdims=True))
    return one_by_one, jax.vjp(outputs, sub)[1](bent)[0], exact

  @jax.jit
  def ours(sub):
    args = t.objective, sub, t.frozen, batch
    scores = tiny.jvp_scores(*args, v)
    products = gradients.ggn_product(*args, v), gradients.hessian_product(*args, v)
    return gradients.per_example_gradients(*args, microbatch=3), *products, scores

  wanted, found = dense(t.sub), ours(t.sub)
  for got, want in zip(found[:3], wanted, strict=True):
    tiny.assert_trees_close(got, want, 1e-8)
  dots = jax.tree.map(lambda g, d: np.einsum("bp,p->b", np.reshape(g, (len(g), -1)), np.ravel(d)), wanted[0], v)
  np.testing.assert_allclose(found[3], sum(jax.tree.leaves(dots)), rtol=1e-9, atol=1e-12)
  router = np.asarray(wanted[0]["layers"]["mlp"]["router"]["kernel"])
  assert np.abs(router[:3]).max() > 1e-4, "gates have a derivative in the router's scores"
  np.testing.assert_array_equal(np.asarray(found[0]["layers"]["mlp"]["up_proj"]["experts"])[tiny.NO_RESPONSE], 0)


def example_gradients(t) -> dict[str, np.ndarray]:
  """name -> [B, E, in, out] of the experts' matrices in the one chosen layer."""
  found = jax.jit(lambda sub: gradients.per_example_gradients(t.objective, sub, t.frozen, t.batch))(t.sub)
  return {name: np.asarray(found["layers"]["mlp"][name]["experts"])[:, 0] for name in found["layers"]["mlp"]}


@pytest.mark.slow
def test_ekfac_has_factors_of_each_expert_and_the_exact_second_moments_in_their_basis(x64):
  t = case("experts", norm_gates=True, num_experts=7, experts_per_token=1)
  source = ekfac.Source(t.objective, t.sub, t.frozen, lambda: iter([(np.arange(len(tiny.ROLES)), t.batch)]))
  fitted = ekfac.fit(source, jax.random.key(0), ekfac.EkfacSettings("fisher"))
  idle = 0
  for name, gradient in example_gradients(t).items():
    factor = jax.tree.map(lambda leaf: np.asarray(leaf)[0], fitted.factors[f"layers/mlp/{name}/experts"])
    turned = np.einsum("eij,beio,eop->bejp", factor.left, gradient, factor.right)
    np.testing.assert_allclose(factor.values, (turned**2).sum(0) / len(tiny.ROLES), rtol=1e-7, atol=1e-14)
    eye = np.einsum("eij,eik->ejk", factor.left, factor.left)
    np.testing.assert_allclose(eye, np.broadcast_to(np.eye(eye.shape[-1]), eye.shape), atol=1e-10)
    idle += (np.abs(gradient).max((0, 2, 3)) == 0).sum()
  assert not fitted.diagonals and idle > 0, "of seven experts some see no token, and that is no error"


@pytest.mark.slow
def test_datainf_takes_each_expert_as_a_block(x64):
  t = case("experts")
  v = tiny.direction(t.sub, queries=2)
  stream = lambda: iter([t.batch])  # noqa: E731
  function = lambda context, batch: (  # noqa: E731
    gradients.per_example_gradients(t.objective, *context, batch),
    batch.valid,
  )
  source = datainf.ExampleGradients(function, stream, (t.sub, t.frozen))
  found = datainf.datainf(v, source, datainf.DataInfSettings(damping=0.01)).solution
  for name, gradient in example_gradients(t).items():
    rows = gradient[: len(tiny.ROLES)].reshape(len(tiny.ROLES), 4, -1)
    right = np.asarray(v["layers"]["mlp"][name]["experts"]).reshape(2, 4, -1)
    share = np.einsum("qed,bed->qbe", right, rows) / (0.01 + (rows**2).sum(-1))
    wanted = (right - np.einsum("qbe,bed->qed", share, rows) / len(rows)) / 0.01
    got = np.asarray(found["layers"]["mlp"][name]["experts"])
    np.testing.assert_allclose(got.reshape(wanted.shape), wanted, rtol=1e-8)


@pytest.mark.slow
def test_sketches_of_experts_are_projected_gradients_and_unbiased(x64):
  t = case("matrices")
  sketch = projected.make_sketch(t.params, "1", projected.SketchSettings(3, 0, allow_small=True))
  objective = make_objective(t.config, sketch.tree)
  sub, frozen = subtree.split(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), sketch.params), sketch.tree)
  cores = jax.jit(lambda s: gradients.adapter_gradients(objective, s, frozen, t.batch))(sub)
  whole = jax.jit(lambda s: gradients.per_example_gradients(t.objective, s, t.frozen, t.batch))(t.sub)
  ours = np.concatenate([np.reshape(leaf, (tiny.SIZE, -1)) for leaf in jax.tree.leaves(cores)], axis=1)
  np.testing.assert_allclose(projected.project_direction(whole, sketch), ours, rtol=1e-6, atol=1e-9)
  np.testing.assert_array_equal(projected.uncovered_share(whole, sketch), 0)

  # <sum_e L_e G_e R_e, sum_e L_e S_e R_e> over many draws, of two directions and four experts.
  rng = np.random.default_rng(0)
  g, s = rng.standard_normal((2, 4, 6, 5))
  kernel = {"layers": {"mlp": {"up_proj": {"experts": jnp.zeros((400, 4, 6, 5))}}}}  # layers stand for draws
  drawn = adapters.add_sketch(kernel, 8, jax.random.key(1))["layers"]["mlp"]["up_proj"]
  sides = np.asarray(drawn["left"]), np.asarray(drawn["right"])
  of = lambda m: np.einsum("keia,eio,kebo->kab", sides[0], m, sides[1])  # noqa: E731
  products = np.sum(of(g) * of(s), axis=(1, 2))
  assert abs(products.mean() - (g * s).sum()) < 4 * products.std() / np.sqrt(len(products))


def test_lora_leaves_experts_and_routers_alone():
  params = tiny.make_params(tiny.smaller_config(**OPTIONS))
  added = set(subtree.leaf_paths(adapters.add_lora(params, 2, jax.random.key(0)))) - set(subtree.leaf_paths(params))
  assert added == {f"attention/{name}_proj/lora_{side}" for name in "qkvo" for side in "ab"}


def test_words_of_modules_know_experts_and_biases_are_not_decayed():
  params = tiny.make_params(tiny.smaller_config(**OPTIONS))
  chosen = {word: subtree.make_subtree(params, "all", word).paths for word in ("all", "experts", "matrices")}
  assert set(chosen["all"]) == set(subtree.leaf_paths(params))
  assert chosen["experts"] == tuple(f"mlp/{path}" for path in PATHS)
  assert set(chosen["experts"]) < set(chosen["matrices"]) and "mlp/router/kernel" in chosen["matrices"]
  with pytest.raises(UserError, match="this model has no 'experts'"):
    subtree.make_subtree(tiny.make_params(tiny.smaller_config()), "all", "experts")
  optimizer = recipe.make_optimizer(recipe.Recipe(steps=3, learning_rate=1.0, weight_decay=0.1, max_grad_norm=0.0))
  zeros = jax.tree.map(jnp.zeros_like, params)
  moved = optimizer.update(zeros, optimizer.init(params), params)[0]["layers"]["mlp"]["up_proj"]
  assert np.abs(moved["experts"]).max() > 0 and np.abs(moved["expert_bias"]).max() == 0


def test_leaves_of_experts_are_cut_by_width_and_never_by_expert():
  config = tiny.make_config(hidden_size=16, intermediate_size=24, num_heads=4, head_dim=4, **OPTIONS)
  params = adapters.add_sketch(tiny.make_params(config), 3, jax.random.key(0))
  specs = sharding.param_specs(params, sharding.make_mesh("fsdp:2,tensor:2,data:2"))["layers"]["mlp"]
  assert specs["up_proj"]["experts"] == sharding.PartitionSpec(None, None, "fsdp", "tensor")
  assert specs["down_proj"]["experts"] == sharding.PartitionSpec(None, None, "tensor", "fsdp")
  assert specs["router"]["kernel"] == sharding.PartitionSpec(None, "fsdp")


@pytest.mark.slow
@pytest.mark.parametrize("count", [4, 16], ids=["all computed", "sorted"])
def test_devices_that_share_experts_compute_the_same(count, monkeypatch):
  monkeypatch.setattr(experts, "_LEAST", 2 if count == 16 else 32)
  changes = OPTIONS | {"num_experts": count}
  config = tiny.make_config(hidden_size=16, intermediate_size=24, num_heads=4, head_dim=4, **changes)
  assert (experts.blocks(tiny.SIZE, tiny.NUM_TOKENS, 2, count) is None) == (count == 4)
  t = tiny.make_tiny("0,1", "all", jnp.float32, config)
  run = jax.jit(lambda sub, frozen, batch: gradients.sum_gradient(t.objective, sub, frozen, batch))
  alone = run(t.sub, t.frozen, t.batch)
  mesh = sharding.make_mesh("fsdp:2,tensor:2,data:2")
  placed = [sharding.place_params(tree, mesh) for tree in (t.sub, t.frozen)]
  tiny.assert_trees_close(run(*placed, sharding.place_batch(t.batch._replace(slots=None), mesh)), alone, 2e-5)


def test_sizes_count_every_expert_and_flops_those_of_a_token():
  config = tiny.make_config(**OPTIONS)
  params = jax.eval_shape(lambda: decoder.init_params(config, jax.random.key(0)))
  sizes = flop_counts.matrix_sizes(params, subtree.make_subtree(params, "last:1", "experts"))
  assert sizes.chosen == sizes.subtree == 4 * 3 * 12 * 14 and len(sizes.matrices) == 12
  assert sizes.below == sizes.above == 2 * 24 * 12 + 2 * 12 * 12 + 12 * 4 + 4 * 3 * 12 * 14
  own = flop_counts.matrix_sizes(params, subtree.make_subtree(params, "last:1", "experts"), 0.25)
  assert own.chosen == sizes.chosen and own.computed.chosen == sizes.chosen / 4
  assert own.computed.above == sizes.above - 0.75 * sizes.chosen == own.computed.below


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jvp", "ggn"])
def test_flops_are_xlas_within_six_per_cent(kind, monkeypatch):
  monkeypatch.setattr(experts, "blocks", lambda *_: None)
  config = tiny.make_config(hidden_size=96, intermediate_size=128, num_heads=4, head_dim=24, **OPTIONS)
  t = tiny.make_tiny("1", "all", jnp.float32, config)
  batch = tiny.make_batch(config, num_tokens=32, num_responses=12)
  function = {"jvp": gradients.losses_and_jvp_scores, "ggn": gradients.ggn_product}[kind]
  program = jax.jit(lambda sub, frozen, batch, v: function(t.objective, sub, frozen, batch, v))
  counted = program.lower(t.sub, t.frozen, batch, t.sub).compile().cost_analysis()["flops"]
  sizes = flop_counts.matrix_sizes(t.params, t.subtree)
  slots = batch.target.size if batch.slots is None else batch.slots.size
  work = flop_counts.Work(batch.tokens.size, batch.tokens.size * 32, slots, 6, 1)
  assert 0.94 < counted / flop_counts.pass_flops(sizes, kind, work, False) < 1.06


@pytest.mark.slow
def test_a_model_with_experts_is_trained_and_its_examples_are_scored(tmp_path):
  config = dataclasses.replace(tiny.CONFIG, num_experts=4, experts_per_token=2, norm_gates=True)
  s = tiny.run_settings(tmp_path, config, epochs=1.0, modules="experts", sketch_size=4)
  session = tiny.open_session(s)
  assert session.model.config.model_type == "mixtral"
  checkpoint = finetune.run(s.replace(run_dir=str(tmp_path / "full")), session)
  select.run(s.replace(checkpoint=checkpoint, budget="0.25"), session)
  assert len((tmp_path / "run" / "coreset.jsonl").read_text().splitlines()) == 10


def test_an_impossible_number_of_experts_is_refused():
  with pytest.raises(UserError, match="cannot go through 5 of 4 experts"):
    tiny.smaller_config(**(OPTIONS | {"experts_per_token": 5}))


def test_a_tokens_experts_alone_give_what_all_of_them_give(x64, monkeypatch):
  """Values and derivatives: mapped over examples, forward, backward, both; in groups, over several chunks of blocks."""
  changes = {"hidden_size": 6, "intermediate_size": 5, "num_layers": 1, "num_experts": 9, "experts_per_token": 2}
  config = tiny.smaller_config(**(OPTIONS | changes), norm_gates=True)
  mlp = jax.tree.map(lambda leaf: leaf[0], tiny.make_params(config, jnp.float64)["layers"]["mlp"])
  x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 80, 6)))
  direction = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), mlp)

  def derivatives():
    loss = lambda p, x: jnp.sum(jnp.sin(decoder.Mixture(config).apply({"params": p}, x)))  # noqa: E731
    each = lambda p, x: jax.vmap(jax.grad(loss), (None, 0))(p, x[:, None])  # noqa: E731

    def every(p, x):
      gradient, product = jax.jvp(jax.grad(loss, (0, 1)), (p, x), (direction, jnp.cos(x)))
      scores = jax.vmap(lambda row: jax.jvp(lambda p: loss(p, row), (p,), (direction,))[1])(x[:, None])
      return gradient, product, each(p, x), scores

    return jax.jit(every)(mlp, x)

  cut = experts.blocks(6, 80, 2, 9)
  assert cut.groups == 2 and cut.count > cut.together and experts.share(6, 80, 2, 9) < 0.7
  assert experts.blocks(1, 80, 2, 9), "also when it is mapped over examples"
  found = derivatives()
  monkeypatch.setattr(experts, "blocks", lambda *_: None)
  for got, want in zip(found, derivatives(), strict=True):
    tiny.assert_trees_close(got, want, 1e-9)


def test_few_tokens_or_few_experts_are_not_sorted():
  assert experts.blocks(1, 16, 2, 8) is None and experts.blocks(8, 512, 3, 4) is None
  assert experts.share(8, 512, 3, 4) == 1 and 2 / 8 < experts.share(16, 512, 2, 8) < 0.35
