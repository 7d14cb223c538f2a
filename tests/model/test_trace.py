"""What a trace tells, against what is computed here from layers' inputs."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import (AttentionConfig, MLAConfig, MLPConfig, ModelConfig,
                          MoEConfig, RopeConfig, RouterConfig, YarnScaling)
from jaxlm.model import transformer
from jaxlm.model.rope import rope_table, rotate
from jaxlm.model.trace import trace
from jaxlm.model.transformer import Execution, Layer

pytestmark = pytest.mark.usefixtures("quick_compile")

BATCH, LENGTH, VOCAB, D_MODEL = 2, 139, 61, 14
ATTENTION = AttentionConfig(
    num_heads=6, num_kv_heads=2, head_dim=10, sliding_window=37, sinks=True,
    rope_full=RopeConfig(150000.0, YarnScaling()),
    rope_sliding=RopeConfig(10000.0), biases=("q", "k", "v", "o"))
MOE = MoEConfig(
    7, 3, MLPConfig(12, "clamped_swiglu", bias=True, interleaved=True),
    RouterConfig("topk_softmax", bias=True))
GPT_OSS = ModelConfig(VOCAB, D_MODEL, 4, ATTENTION, moe=MOE,
                      layer_pattern=("sliding", "full"))
GEMMA = dataclasses.replace(
    GPT_OSS, moe=None, mlp=MLPConfig(22), num_layers=3,
    attention=dataclasses.replace(ATTENTION, sinks=False, soft_cap=1.5,
                                  qk_norm=True))
DEEPSEEK = ModelConfig(
    VOCAB, D_MODEL, 3, MLAConfig(6, 11, 7, 4, 9, q_rank=8, rope=RopeConfig(
        interleaved=True)), mlp=MLPConfig(22), num_dense_layers=1,
    moe=dataclasses.replace(MOE, num_experts=6, router=RouterConfig(
        "sigmoid_topk", renormalize=True, balance_bias=True, num_groups=3,
        groups_per_token=2, weight_scale=2.5), shared=MLPConfig(12)))
PLAIN = Execution(experts="ragged")


@functools.cache
def params_of(config):
  """Random parameters, none of them 0 or 1, so that each matters."""
  random = np.random.default_rng(1)
  def leaf(path, like):
    centre = 1 if "scale" in jax.tree_util.keystr(path[-1:]) else 0
    return jnp.float32(centre + 0.3 * random.normal(size=like.shape))
  return jax.tree.map_with_path(leaf, transformer.abstract_params(config))


def tokens():
  return np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH))


def segments():
  """Two documents, then padding to the end of the first row."""
  ids_BT = np.ones((BATCH, LENGTH), np.int32)
  ids_BT[0, 53:], ids_BT[0, 131:], ids_BT[1, 7:] = 2, 0, 2
  return ids_BT


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_layer(config, kind, p, x_BTD, index, context):
  return Layer(config, kind, PLAIN).apply(
      {"params": p}, x_BTD, index, context, mutable=["intermediates"],
      capture_intermediates=lambda module, method: method == "__call__"
  )[1]["intermediates"]


def layers(config, found, segment_ids_BT=None):
  """Each layer run by itself on the hidden states before it: its parameters,
  and what its norms and its attention gave."""
  params = transformer.per_layer(config, params_of(config))
  context = transformer.make_context(config, tokens(), None, segment_ids_BT)
  x_BTD = params["embed"]["embedding"][tokens()]
  for index, kind in enumerate(config.layers):
    p = params["layers"][str(index)]
    seen = run_layer(config, kind, p, x_BTD, index, context)
    yield kind, p, jax.tree.map(np.asarray, seen)
    x_BTD = found.hidden_LBTD[index]


def test_hidden_states_are_those_of_the_layers():
  found = trace(GPT_OSS, params_of(GPT_OSS), tokens(), parts=("hidden",),
                execution=PLAIN)
  assert found.hidden_LBTD.shape == (4, BATCH, LENGTH, D_MODEL)
  assert found.expert_LBTA is found.first_key_LBTN is None
  scanned = transformer.forward(GPT_OSS, params_of(GPT_OSS), tokens())
  np.testing.assert_allclose(found.output.hidden_BTD, scanned.hidden_BTD,
                             rtol=1e-4, atol=1e-4)
  for x, (_, _, seen) in zip(found.hidden_LBTD,
                             layers(GPT_OSS, found)):
    np.testing.assert_allclose(x, seen["__call__"][0][0], rtol=1e-4, atol=1e-4)


def softmax_of_best(config, logits_TE):
  """Experts best first, and a softmax over their logits."""
  expert_TA = np.argsort(-logits_TE, -1)[:, :config.experts_per_token]
  kept_TA = np.exp(np.take_along_axis(logits_TE, expert_TA, -1))
  return expert_TA, kept_TA / kept_TA.sum(-1, keepdims=True)


def test_choices_are_the_router_s():
  found = trace(GPT_OSS, params_of(GPT_OSS), tokens(),
                parts=("experts", "hidden"), execution=PLAIN)
  assert found.expert_LBTA.shape == (4, BATCH, LENGTH, 3)
  for layer, (_, p, seen) in enumerate(layers(GPT_OSS, found)):
    h_BTD = seen["mlp_norm"]["__call__"][0]
    logits_TE = (h_BTD.reshape(-1, D_MODEL) @ p["moe"]["router"]
                 + p["moe"]["router_bias"])
    expert_TA, weight_TA = softmax_of_best(MOE, np.asarray(logits_TE))
    np.testing.assert_array_equal(found.expert_LBTA[layer].reshape(-1, 3),
                                  expert_TA)
    np.testing.assert_allclose(found.weight_LBTA[layer].reshape(-1, 3),
                               weight_TA, rtol=1e-4)
  # And what the model reports of its load is what these choices come to.
  load_LE = np.stack([np.bincount(x.reshape(-1), minlength=7)
                      for x in np.asarray(found.expert_LBTA)])
  np.testing.assert_allclose(found.output.router.load_E,
                             load_LE / (BATCH * LENGTH * 3), rtol=1e-6)


def test_layers_without_experts_are_not_counted():
  found = trace(DEEPSEEK, params_of(DEEPSEEK), tokens(), execution=PLAIN)
  assert found.expert_LBTA.shape == (2, BATCH, LENGTH, 3)
  np.testing.assert_allclose(np.sum(found.weight_LBTA, -1), 2.5, rtol=1e-5)
  dense = trace(GEMMA, params_of(GEMMA), tokens(), execution=PLAIN)
  assert dense.expert_LBTA is None


def test_expert_choice_tells_who_took_a_token():
  moe = dataclasses.replace(MOE, router=RouterConfig("expert_choice"))
  config = dataclasses.replace(GPT_OSS, moe=moe, num_layers=2)
  found = trace(config, params_of(config), tokens(),
                parts=("experts", "hidden"), execution=PLAIN)
  assert found.expert_LBTA.shape == (2, BATCH, LENGTH, 7)
  capacity = -(-BATCH * LENGTH * 3 // 7)
  for layer, (_, p, seen) in enumerate(layers(config, found)):
    h_TD = seen["mlp_norm"]["__call__"][0].reshape(-1, D_MODEL)
    probs_TE = np.asarray(jax.nn.softmax(h_TD @ p["moe"]["router"]))
    least_E = np.sort(probs_TE, 0)[-capacity]
    expert_TA = np.asarray(found.expert_LBTA[layer]).reshape(-1, 7)
    weight_TA = np.asarray(found.weight_LBTA[layer]).reshape(-1, 7)
    for t, probs_E in enumerate(probs_TE):
      takers = np.flatnonzero(probs_E >= least_E)
      takers = takers[np.argsort(-probs_E[takers])]
      np.testing.assert_array_equal(expert_TA[t, :len(takers)], takers)
      assert set(expert_TA[t, len(takers):]) <= {7}
      np.testing.assert_allclose(weight_TA[t, :len(takers)], probs_E[takers],
                                 rtol=1e-4)


def masses(q_BTNH, k_BTNH, window, scale, soft_cap, sinks_N, segment_ids_BT):
  """(what the first key gets, what the sink gets), [B, T, N], by softmax."""
  scores_BNTS = scale * np.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BTNH,
                                  dtype=np.float64)
  if soft_cap is not None:
    scores_BNTS = soft_cap * np.tanh(scores_BNTS / soft_cap)
  t, s = np.arange(LENGTH)[:, None], np.arange(LENGTH)
  seen_BTS = np.broadcast_to((s <= t) & (t - s < (window or LENGTH)),
                             (BATCH, LENGTH, LENGTH))
  if segment_ids_BT is not None:
    seen_BTS = seen_BTS & (segment_ids_BT[:, :, None]
                           == segment_ids_BT[:, None])
  exp_BNTS = np.exp(scores_BNTS) * seen_BTS[:, None]
  sink_N11 = (np.zeros((1, 1, 1)) if sinks_N is None
              else np.exp(np.float64(sinks_N))[:, None, None])
  total_BNT1 = exp_BNTS.sum(-1, keepdims=True) + sink_N11
  return ((exp_BNTS / total_BNT1)[..., 0].transpose(0, 2, 1),
          (sink_N11 / total_BNT1)[..., 0].transpose(0, 2, 1))


def queries_and_keys(config, kind, p, h_BTD):
  """As heads, rotated, each query head with the keys it meets."""
  attention = config.attention
  def rotated(x, rope):
    table = rope_table(rope, x.shape[-1], np.arange(LENGTH)[None])
    return np.asarray(rotate(jnp.asarray(x), table, rope.interleaved))
  def norm(x, scale, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale
  if isinstance(attention, MLAConfig):
    low = norm(h_BTD @ p["q_a_proj"], p["q_a_norm"]["scale"], 1e-6)
    q = np.einsum("BTR,RNH->BTNH", low, p["q_b_proj"])
    latent, common = np.split(h_BTD @ p["kv_a_proj"], [11], -1)
    latent = norm(latent, p["kv_a_norm"]["scale"], 1e-6)
    k = np.einsum("BTR,RNH->BTNH", latent, p["kv_b_proj"][..., :7])
    common = np.repeat(rotated(common[:, :, None], attention.rope), 6, 2)
    return (np.concatenate([q[..., :7], rotated(q[..., 7:], attention.rope)],
                           -1), np.concatenate([k, common], -1))
  q, k = (np.einsum("BTD,DNH->BTNH", h_BTD, p[f"{name}_proj"])
          + p[f"{name}_bias"] for name in "qk")
  if attention.qk_norm:
    q, k = (norm(x, p[f"{name}_norm"]["scale"], config.norm.eps)
            for name, x in (("q", q), ("k", k)))
  rope = (attention.rope_sliding if kind.attention == "sliding"
          else attention.rope_full)
  return rotated(q, rope), np.repeat(rotated(k, rope), 3, 2)


@pytest.mark.parametrize("config", [GPT_OSS, GEMMA, DEEPSEEK],
                         ids=["sinks", "soft cap and QK-norm", "latent"])
@pytest.mark.parametrize("segment_ids_BT", [None, segments()],
                         ids=["one document", "several"])
def test_mass_is_the_softmax_s(config, segment_ids_BT):
  found = trace(config, params_of(config), tokens(), execution=PLAIN,
                parts=("attention", "hidden"), segment_ids_BT=segment_ids_BT)
  attention = config.attention
  sinks = getattr(attention, "sinks", False)
  assert found.first_key_LBTN.shape == (config.num_layers, BATCH, LENGTH, 6)
  assert (found.sink_LBTN is not None) == sinks
  for layer, (kind, p, seen) in enumerate(
      layers(config, found, segment_ids_BT)):
    p = jax.tree.map(np.asarray, p["attention"])
    q, k = queries_and_keys(config, kind, p,
                            seen["attention_norm"]["__call__"][0])
    first, sink = masses(
        q, k, attention.sliding_window if kind.attention == "sliding" else None,
        attention.query_scale, getattr(attention, "soft_cap", None),
        p.get("sinks"), segment_ids_BT)
    np.testing.assert_allclose(found.first_key_LBTN[layer], first, rtol=1e-3,
                               atol=1e-5)
    if sinks:
      np.testing.assert_allclose(found.sink_LBTN[layer], sink, rtol=1e-3,
                                 atol=1e-5)


def test_unknown_parts_are_refused():
  with pytest.raises(ValueError, match=r"parts=\('experts', 'heads'\)"):
    trace(GPT_OSS, {}, tokens(), parts=("experts", "heads"))
