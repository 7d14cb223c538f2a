import dataclasses
import subprocess
import sys

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.config import (AttentionConfig, MLAConfig, MLPConfig, ModelConfig,
                          MoEConfig, NormConfig, RopeConfig, RouterConfig)
from jaxlm.model import costs
from jaxlm.model.cache import empty_cache
from jaxlm.model.transformer import (Execution, abstract_params, forward,
                                     logits)
from pallas_kernels.windowed_attention import reference

ROPE = RopeConfig(150000.0)


def gpt_oss(num_layers, num_experts):
  return ModelConfig(
      201088, 2880, num_layers,
      AttentionConfig(64, 8, 64, ROPE, ROPE, sliding_window=128,
                      biases=("q", "k", "v", "o"), sinks=True),
      moe=MoEConfig(num_experts, 4,
                    MLPConfig(2880, "clamped_swiglu", bias=True,
                              interleaved=True),
                    RouterConfig("topk_softmax", bias=True)),
      layer_pattern=("sliding", "full"))


QWEN3_30B = ModelConfig(
    151936, 2048, 48, AttentionConfig(32, 4, 128, ROPE, qk_norm=True),
    moe=MoEConfig(128, 8, MLPConfig(768), RouterConfig(renormalize=True)))
MIXTRAL = ModelConfig(
    32000, 4096, 32, AttentionConfig(32, 8, 128, ROPE),
    moe=MoEConfig(8, 2, MLPConfig(14336), RouterConfig("topk_softmax")))


def test_published_counts():
  small = costs.parameter_counts(gpt_oss(24, 32))
  large = costs.parameter_counts(gpt_oss(36, 128))
  qwen3 = costs.parameter_counts(QWEN3_30B)
  mixtral = costs.parameter_counts(MIXTRAL)
  assert (small.total, small.active) == (20_914_757_184, 3_608_307_264)
  assert (large.total, large.active) == (116_829_156_672, 5_132_849_472)
  # Their cards count the lookup table among the active parameters.
  assert qwen3.total == 30_532_122_624
  assert qwen3.active_with_embedding == 3_353_032_704
  assert mixtral.total == 46_702_792_704
  assert mixtral.active_with_embedding == 12_879_925_248


def test_tied_table_counts_once_and_as_active():
  untied = costs.parameter_counts(MIXTRAL)
  tied = costs.parameter_counts(
      dataclasses.replace(MIXTRAL, tie_embeddings=True))
  assert untied.total - tied.total == 32000 * 4096
  assert untied.active == tied.active == tied.active_with_embedding


def mlps(gated):
  return st.builds(
      MLPConfig, d_ff=st.integers(1, 9), gated=st.just(gated),
      activation=st.just("silu"), bias=st.booleans())


@st.composite
def grouped_attentions(draw):
  return AttentionConfig(
      *draw(st.sampled_from([(6, 2), (3, 3), (5, 1)])),
      head_dim=draw(st.sampled_from([4, 7])), sliding_window=5,
      biases=tuple(draw(st.sets(st.sampled_from("qkvo")))),
      qk_norm=draw(st.booleans()), sinks=draw(st.booleans()))


@st.composite
def latent_attentions(draw):
  kv_rank, nope, rope, value = (draw(st.sampled_from(sizes)) for sizes in (
      (3, 8), (5, 7), (2, 6), (4, 9)))
  return MLAConfig(draw(st.integers(1, 4)), kv_rank, nope, rope, value,
                   draw(st.sampled_from([None, 10])))


@st.composite
def configs(draw):
  attention = draw(grouped_attentions() | latent_attentions())
  num_layers = draw(st.integers(1, 5))
  mlp, moe, num_dense = draw(st.booleans().flatmap(mlps)), None, 0
  if draw(st.booleans()):
    kind = draw(st.sampled_from(["softmax_topk", "sigmoid_topk",
                                 "topk_softmax", "noisy_topk",
                                 "expert_choice"]))
    router = RouterConfig(
        kind, bias=draw(st.booleans()),
        balance_bias=kind in ("softmax_topk", "sigmoid_topk")
        and draw(st.booleans()))
    num_experts = draw(st.integers(1, 7))
    gated = st.booleans().flatmap(mlps)
    moe = MoEConfig(num_experts, draw(st.integers(1, num_experts)),
                    draw(gated), router, draw(st.none() | gated))
    num_dense = draw(st.integers(0, num_layers))
    mlp = mlp if num_dense else None
  norm = NormConfig(draw(st.sampled_from(["rmsnorm", "layernorm"])),
                    placement=draw(st.sampled_from(["pre", "pre_and_post",
                                                    "post"])))
  pattern = ("full",) if isinstance(attention, MLAConfig) else draw(
      st.sampled_from([("full",), ("sliding", "full"),
                       ("sliding", "sliding", "full")]))
  return ModelConfig(
      draw(st.integers(1, 41)), draw(st.integers(1, 19)), num_layers,
      attention, mlp, moe, num_dense, pattern, norm,
      draw(st.sampled_from([0, 13])), draw(st.booleans()))


def by_part(tree, config):
  """Sizes of an abstract tree's leaves, summed by the part they belong to."""
  parts = dict.fromkeys((f.name for f in dataclasses.fields(costs.Counts)), 0)
  for path, leaf in jax.tree.leaves_with_path(tree):
    names = [entry.key for entry in path]
    if "attention" in names:
      part = "attention"
    elif names[0] == "unembedding":
      part = "unembedding"
    elif names[-2].endswith("norm"):
      part = "norms"
    elif "shared" in names or "mlp" in names:
      part = "mlp"
    elif names[-1].startswith(("router", "balance")):
      part = "router"
    elif "moe" in names:
      idle = config.moe.num_experts - config.moe.experts_per_token
      parts["idle_experts"] += leaf.size // config.moe.num_experts * idle
      parts["experts"] -= leaf.size // config.moe.num_experts * idle
      part = "experts"
    elif names[-1] == "embedding" and config.tie_embeddings:
      part = "unembedding"
    else:
      part = "embedding"
    parts[part] += leaf.size
  return costs.Counts(**parts)


@settings(deadline=None, max_examples=15)
@given(configs())
def test_counts_are_those_of_the_tree(config):
  tree = abstract_params(config)
  assert costs.parameter_counts(config) == by_part(tree, config)


@pytest.mark.parametrize("window,seq_len", [(5, 23), (23, 23), (31, 7), (1, 9)])
def test_keys_seen_are_those_of_the_mask(window, seq_len):
  config = ModelConfig(
      29, 8, 2, AttentionConfig(3, 1, 4, sliding_window=window),
      MLPConfig(17), layer_pattern=("sliding", "full"))
  at = np.arange(seq_len)
  for kind, reach in (("sliding", window), ("full", None)):
    assert costs.keys_seen(config, kind, seq_len) == np.sum(
        reference.visible(at, at, reach))


def jaxprs(value):
  if isinstance(value, (list, tuple)):
    for item in value:
      yield from jaxprs(item)
  elif hasattr(value, "jaxpr"):
    yield value.jaxpr
  elif hasattr(value, "eqns"):
    yield value


def dot_flops(jaxpr) -> int:
  """FLOPs of the matmuls in a jaxpr; ragged ones run each row once."""
  total = 0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name in ("dot_general", "ragged_dot_general"):
      lhs, rhs = (v.aval.shape for v in equation.invars[:2])
      if name == "dot_general":
        (_, contract), (_, batch) = params["dimension_numbers"]
        skip = {*contract, *batch}
      else:
        dims = params["ragged_dot_dimension_numbers"]
        (_, contract), _ = dims.dot_dimension_numbers
        skip = {*contract, *dims.rhs_group_dimensions}
      free = [n for i, n in enumerate(rhs) if i not in skip]
      total += 2 * int(np.prod(lhs)) * int(np.prod(free))
      continue
    inner = [dot_flops(j) for value in params.values() for j in jaxprs(value)]
    assert not any(inner) or name not in ("while", "cond"), name
    total += sum(inner) * (params["length"] if name == "scan" else 1)
  return total


def model(**changes):
  config = ModelConfig(
      61, 24, 5, AttentionConfig(6, 2, 10, ROPE, ROPE, sliding_window=7),
      MLPConfig(39), layer_pattern=("sliding", "full"))
  return dataclasses.replace(config, **changes)


MODELS = {
    "dense": model(),
    "gpt2": model(mlp=MLPConfig(39, "gelu", gated=False, bias=True),
                  max_positions=31, tie_embeddings=True),
    "experts": model(
        mlp=None, moe=MoEConfig(9, 4, MLPConfig(13),
                                RouterConfig("topk_softmax", bias=True))),
    "shared, dense first": model(
        moe=MoEConfig(9, 3, MLPConfig(13), shared=MLPConfig(17)),
        num_dense_layers=2),
    "latent": model(
        attention=MLAConfig(6, 11, 5, 8, 7, q_rank=15), num_dense_layers=2,
        layer_pattern=("full",), moe=MoEConfig(
            9, 3, MLPConfig(13), RouterConfig(
                "sigmoid_topk", renormalize=True, balance_bias=True,
                num_groups=3, groups_per_token=2), MLPConfig(17))),
    "latent, direct queries": model(attention=MLAConfig(6, 11, 5, 8, 7),
                                    layer_pattern=("full",)),
    "noisy": model(mlp=None, moe=MoEConfig(9, 3, MLPConfig(13),
                                           RouterConfig("noisy_topk"))),
}
EXECUTION = Execution(attention="reference", experts="ragged")


def executed(config, seq_len, backward):
  """The FLOPs a token of what runs: the reference makes all T x S scores."""
  flops = costs.flops_per_token(config, seq_len, backward)
  attention = config.attention
  scores = (2 * attention.num_heads * seq_len
            * (attention.head_dim + attention.v_head_dim)
            * config.num_layers * (3 if backward else 1))
  return dataclasses.replace(flops, attention_scores=scores)


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_of_the_training_steps_matmuls(name):
  config, batch, seq_len = MODELS[name], 3, 11

  def loss(params):
    hidden = forward(config, params, jnp.zeros((batch, seq_len), jnp.int32),
                     execution=EXECUTION, key=jax.random.key(3)).hidden_BTD
    return jnp.sum(logits(config, params, hidden))

  jaxpr = jax.make_jaxpr(jax.grad(loss))(abstract_params(config))
  expected = executed(config, seq_len, backward=True)
  assert dot_flops(jaxpr.jaxpr) == expected.total * batch * seq_len


@pytest.mark.parametrize("name", ["dense", "experts", "latent"])
def test_forward_flops_are_xlas(name):
  """XLA counts a loop's body once, so layers are unrolled; with one expert
  its ragged matmuls, which run every expert on every row, do no more."""
  config = model(d_model=272, vocab_size=1031, num_layers=2,
                 attention=AttentionConfig(6, 2, 46), mlp=MLPConfig(701),
                 layer_pattern=("full",))
  if name == "experts":
    config = dataclasses.replace(
        config, mlp=None, moe=MoEConfig(1, 1, config.mlp))
  if name == "latent":
    config = dataclasses.replace(
        config, attention=MLAConfig(6, 67, 39, 26, 53, q_rank=89))
  seq_len = 37
  execution = dataclasses.replace(EXECUTION, scan_layers=False)

  def run(params, tokens_BT):
    hidden = forward(config, params, tokens_BT, execution=execution)
    return logits(config, params, hidden.hidden_BTD)

  tokens_BT = jax.ShapeDtypeStruct((2, seq_len), jnp.int32)
  compiled = jax.jit(run).lower(abstract_params(config), tokens_BT).compile()
  expected = executed(config, seq_len, backward=False).total * 2 * seq_len
  found = compiled.cost_analysis()["flops"]
  assert expected < found < 1.01 * expected


def test_training_costs_three_forward_passes_in_every_part():
  for config in MODELS.values():
    forward_only = costs.flops_per_token(config, 19, backward=False)
    training = costs.flops_per_token(config, 19)
    for field in dataclasses.fields(training):
      assert getattr(training, field.name) == pytest.approx(
          3 * getattr(forward_only, field.name))


def test_latents_are_one_57th_of_the_cache_that_heads_would_need():
  # Of DeepSeek-V3: 512 + 64 values for 128 heads of 128 + 128.
  config = jaxlm.preset("deepseek-v3")
  assert costs.kv_bytes_per_token(config, 1000) == 61 * 576 * 2
  heads = dataclasses.replace(config, attention=AttentionConfig(128, 128, 128))
  assert (costs.cache_bytes(heads, 10) / costs.cache_bytes(config, 10)
          == pytest.approx(56.9, abs=0.05))


def test_windows_halve_the_cache_of_gpt_oss():
  config, length = jaxlm.preset("gpt-oss-20b"), 131072
  everywhere = dataclasses.replace(config, layer_pattern=("full",))
  # 2 (k and v) x 8 heads x 64 x 2 bytes = 2048 a token and layer.
  assert costs.cache_bytes(everywhere, length) == 24 * 131072 * 2048
  assert costs.cache_bytes(config, length) == 12 * (131072 + 128) * 2048
  windows = 12 * 128 * 2048
  assert costs.cache_bytes(config, length) - windows == (
      costs.cache_bytes(everywhere, length) / 2)
  assert costs.kv_bytes_per_token(config, length) == 12 * 2048 * 1025 / 1024
  assert costs.kv_bytes_per_token(config, 100) == 24 * 2048


@settings(deadline=None, max_examples=40)
@given(configs(), st.integers(1, 11), st.sampled_from(["float32", "bfloat16"]))
def test_cache_is_as_large_as_counted(config, length, dtype):
  cache = jax.eval_shape(lambda: empty_cache(config, 1, length, dtype))
  size = sum(x.size * x.dtype.itemsize
             for layer in cache for x in layer if x is not layer.positions_BS)
  assert size == costs.cache_bytes(config, length, jnp.dtype(dtype).itemsize)


def test_counting_loads_no_jax():
  code = "import sys, jaxlm.model.costs; assert 'jax' not in sys.modules"
  subprocess.run([sys.executable, "-c", code], check=True)
