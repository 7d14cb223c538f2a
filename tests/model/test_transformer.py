import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import (AttentionConfig, MLAConfig, MLPConfig, ModelConfig,
                          MoEConfig, NormConfig, RopeConfig, RouterConfig,
                          YarnScaling)
from jaxlm.model import transformer
from jaxlm.model.transformer import Execution

pytestmark = pytest.mark.usefixtures("quick_compile")

ATTENTION = AttentionConfig(
    num_heads=6, num_kv_heads=2, head_dim=10, sliding_window=5,
    rope_full=RopeConfig(150000.0, YarnScaling()),
    rope_sliding=RopeConfig(10000.0), biases=("q", "k", "v", "o"), sinks=True)
MOE = MoEConfig(
    7, 3, MLPConfig(12, "clamped_swiglu", bias=True, interleaved=True),
    RouterConfig("topk_softmax", bias=True))
GPT_OSS = ModelConfig(61, 14, 4, ATTENTION, moe=MOE,
                      layer_pattern=("sliding", "full"))
DENSE_THEN_MOE = dataclasses.replace(
    GPT_OSS, num_layers=5, mlp=MLPConfig(22), num_dense_layers=2,
    layer_pattern=("sliding", "sliding", "full"))
GEMMA = ModelConfig(
    61, 14, 4, dataclasses.replace(ATTENTION, qk_norm=True, sinks=False,
                                   soft_cap=3.0),
    mlp=MLPConfig(22, "gelu_tanh"), layer_pattern=("sliding",) * 2 + ("full",),
    norm=NormConfig(scale_offset=1.0, placement="pre_and_post"),
    tie_embeddings=True, scale_embeddings=True, final_soft_cap=4.0)
GPT_2 = ModelConfig(
    61, 14, 2, AttentionConfig(7, 7, 2, biases=("q", "k", "v", "o")),
    mlp=MLPConfig(24, "gelu_tanh", gated=False, bias=True),
    norm=NormConfig("layernorm"), max_positions=31, tie_embeddings=True)
DEEPSEEK = ModelConfig(
    61, 14, 3, MLAConfig(6, 11, 7, 4, 9, q_rank=8, rope=RopeConfig(
        scaling=YarnScaling(40.0, mscale_all_dim=1.0), interleaved=True)),
    mlp=MLPConfig(22), num_dense_layers=1, moe=MoEConfig(
        6, 3, MLPConfig(12), RouterConfig(
            "sigmoid_topk", renormalize=True, balance_bias=True, num_groups=3,
            groups_per_token=2, weight_scale=2.5), shared=MLPConfig(12)))
# Quick to compile; that implementations agree is tested where they are.
PLAIN = Execution(experts="ragged")
MODELS = {"gpt-oss": GPT_OSS, "dense, then experts": DENSE_THEN_MOE,
          "gemma": GEMMA, "gpt-2": GPT_2, "deepseek": DEEPSEEK}


@functools.cache
def params_of(config):
  """Random parameters, none of them 0 or 1, so that each matters."""
  random = np.random.default_rng(1)
  def leaf(path, like):
    centre = 1 if "scale" in jax.tree_util.keystr(path[-1:]) else 0
    return jnp.float32(centre + 0.3 * random.normal(size=like.shape))
  return jax.tree.map_with_path(leaf, transformer.abstract_params(config))


def tokens(batch, length, vocab_size=61, seed=0):
  return np.random.default_rng(seed).integers(0, vocab_size, (batch, length))


@functools.partial(jax.jit, static_argnums=(0, 1))
def hidden(config, execution, params, tokens_BT, segment_ids_BT=None,
           positions_BT=None, key=None):
  return transformer.forward(
      config, params, tokens_BT, execution=execution, key=key,
      segment_ids_BT=segment_ids_BT, positions_BT=positions_BT).hidden_BTD


def reach(config, length, queries, segments=None):
  """Which tokens each of `queries` feels, by gradient: [queries, length]."""
  # Each token is another, so that a row of the embedding is a position.
  row = np.arange(length)[None]
  params = params_of(dataclasses.replace(config, vocab_size=length))
  direction = np.random.default_rng(0).normal(size=config.d_model)
  @jax.jit
  @jax.grad
  def felt(embedding, query):
    changed = params | {"embed": params["embed"] | {"embedding": embedding}}
    output = transformer.forward(config, changed, row, execution=PLAIN,
                                 segment_ids_BT=segments)
    return output.hidden_BTD[0, query] @ direction
  embedding = params["embed"]["embedding"]
  return np.array([np.any(felt(embedding, query) != 0, axis=1)
                   for query in queries])


@pytest.mark.parametrize("name", MODELS)
def test_causality_by_gradient(name):
  queries = np.arange(17)
  felt = reach(MODELS[name], 17, queries)
  # Nothing later is felt; with a full layer all that came before is.
  np.testing.assert_array_equal(felt, queries <= queries[:, None])


@pytest.mark.parametrize("name", MODELS)
def test_a_later_token_changes_nothing_before_it(name):
  config = MODELS[name]
  before = tokens(2, 23)
  after = before.copy()
  after[:, 15:] = (after[:, 15:] + 1) % 61
  a, b = (hidden(config, PLAIN, params_of(config), x)
          for x in (before, after))
  np.testing.assert_allclose(a[:, :15], b[:, :15], rtol=1e-5, atol=1e-5)
  assert np.all(np.any(np.abs(a - b)[:, 15:] > 1e-3, axis=-1))


def test_expert_choice_is_not_causal():
  config = dataclasses.replace(GPT_OSS, moe=dataclasses.replace(
      MOE, experts_per_token=1, router=RouterConfig("expert_choice")))
  before = tokens(1, 23)
  after = before.copy()
  after[:, 15:] = 3
  a, b = (hidden(config, PLAIN, params_of(config), x)
          for x in (before, after))
  assert np.max(np.abs(a - b)[:, :15]) > 1e-3


def test_a_sliding_layer_reaches_exactly_128_tokens_including_itself():
  config = dataclasses.replace(
      GEMMA, num_layers=1, layer_pattern=("sliding",),
      attention=dataclasses.replace(ATTENTION, sliding_window=128))
  queries = np.array([0, 126, 127, 128, 129, 200, 255, 256, 257, 280])
  distance = queries[:, None] - np.arange(281)
  np.testing.assert_array_equal(reach(config, 281, queries),
                                (0 <= distance) & (distance <= 127))


def test_segments_are_documents_of_their_own():
  lengths = [5, 11, 7]
  segments = np.repeat([4, 9, 2], lengths)[None]
  same = segments[0][:, None] == segments[0]
  queries = np.arange(23)
  np.testing.assert_array_equal(reach(GPT_OSS, 23, queries, segments),
                                same & (queries <= queries[:, None]))


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_document_is_as_if_alone(name):
  config, row = MODELS[name], tokens(2, 23)
  segments = np.tile(np.repeat([4, 9], [9, 14]), (2, 1))
  positions = np.tile(np.concatenate([np.arange(9), np.arange(14)]), (2, 1))
  run = functools.partial(hidden, config, PLAIN, params_of(config))
  packed = run(row, segments, positions)
  # What follows the document when it stands first has no say in it.
  alone = run(np.roll(row, -9, 1))
  np.testing.assert_allclose(packed[:, 9:], alone[:, :14], rtol=1e-4,
                             atol=1e-5)


@functools.partial(jax.jit, static_argnums=(0, 1))
def loss_and_gradients(config, execution, params, tokens_BT, key):
  def loss(params):
    output = transformer.forward(config, params, tokens_BT, key=key,
                                 execution=execution)
    scores = transformer.logits(config, params, output.hidden_BTD)
    balance = sum(jnp.sum(x) for x in output.router.losses.values())
    return (jnp.mean(jax.nn.logsumexp(scores, -1) - scores[..., 0]) + balance,
            (output.hidden_BTD, output.router))
  return jax.value_and_grad(loss, has_aux=True)(params)


# Dropout and router noise are in it: what is computed again must draw the
# same numbers again.
STOCHASTIC = dataclasses.replace(
    GPT_OSS, num_layers=3, mlp=MLPConfig(22), num_dense_layers=1, dropout=0.2,
    layer_pattern=("sliding",), moe=dataclasses.replace(
        MOE, router=RouterConfig("noisy_topk")))


@functools.cache
def run_stochastic(execution, per_layer=False):
  """Value, hidden states, router's report and gradients, in one form."""
  params = params_of(STOCHASTIC)
  if per_layer:
    params = transformer.per_layer(STOCHASTIC, params)
  aux, gradients = loss_and_gradients(STOCHASTIC, execution, params,
                                      tokens(2, 19), jax.random.key(2))
  return aux, transformer.per_layer(STOCHASTIC, gradients)


@pytest.mark.parametrize("execution, per_layer", [
    (Execution(), False),
    (dataclasses.replace(PLAIN, scan_layers=False), True),
    (dataclasses.replace(PLAIN, scan_layers=False, remat="full"), False),
    (dataclasses.replace(PLAIN, remat="dots"), False),
    (dataclasses.replace(PLAIN, remat="full"), False),
])
def test_execution_changes_nothing(execution, per_layer):
  expected = run_stochastic(PLAIN)
  found = run_stochastic(execution, per_layer)
  for (path, a), (_, b) in zip(*map(jax.tree.leaves_with_path,
                                    (found, expected)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4,
                               atol=1e-6 + 1e-5 * np.max(np.abs(b)),
                               err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_close_to_float32(name):
  config = MODELS[name]
  args = params_of(config), tokens(2, 23)
  exact = np.asarray(hidden(config, PLAIN, *args))
  half = hidden(config, dataclasses.replace(PLAIN, dtype="bfloat16"), *args)
  assert half.dtype == jnp.bfloat16
  error = np.abs(np.asarray(half, np.float32) - exact)
  # Eight sub-layers, each of which rounds about four times by up to 2^-9, add
  # up to about 2^-9 sqrt(32) = 0.011. The median, because a few tokens go to
  # another expert.
  assert np.median(error) <= 0.02 * exact.std()
  scores = transformer.logits(config, args[0], half)
  assert scores.dtype == jnp.float32


def test_router_reports_are_in_the_order_of_the_layers():
  config = dataclasses.replace(
      DENSE_THEN_MOE, num_layers=9, moe=dataclasses.replace(
          MOE, num_experts=7, experts_per_token=1))
  # Layers 2 to 7 are a period of three, twice; layer 8 is what remains.
  favourites = {("stack_1", 0): [0, 3], ("stack_1", 1): [1, 4],
                ("stack_1", 2): [2, 5], ("stack_2", 0): [6]}
  params = jax.tree.map(lambda x: x, params_of(config))
  for (stack, i), experts in favourites.items():
    bias = 1e3 * np.eye(7, dtype=np.float32)[experts]
    params[stack][f"layer_{i}"]["moe"]["router_bias"] = bias
  @jax.jit
  def report(params):
    return transformer.forward(config, params, tokens(1, 5),
                               execution=PLAIN).router
  router = report(params)
  np.testing.assert_array_equal(router.load_E, np.eye(7))
  assert router.dropped.shape == router.losses["switch"].shape == (7,)
  by_layer = list(transformer.per_layer(config, params)["layers"].values())
  assert [int(np.argmax(layer["moe"]["router_bias"]))
          for layer in by_layer[2:]] == list(range(7))
  assert ["moe" in layer for layer in by_layer] == [False] * 2 + [True] * 7


def test_dropout_needs_a_key_and_follows_it():
  run = functools.partial(hidden, STOCHASTIC, PLAIN, params_of(STOCHASTIC),
                          tokens(2, 19), None, None)
  without = hidden(dataclasses.replace(STOCHASTIC, dropout=0.0), PLAIN,
                   params_of(STOCHASTIC), tokens(2, 19))
  np.testing.assert_array_equal(run(), without)
  a, b = run(jax.random.key(1)), run(jax.random.key(2))
  np.testing.assert_array_equal(a, run(jax.random.key(1)))
  for x, y in ((a, b), (a, without)):
    assert np.mean(np.abs(x - y) > 1e-3) > 0.5


def test_errors_name_the_argument_and_its_values():
  with pytest.raises(ValueError, match="32 tokens, but the model has 31"):
    transformer.forward(GPT_2, {}, tokens(1, 32))
  with pytest.raises(ValueError, match="remat='all': use one of .*'dots'"):
    Execution(remat="all")
  with pytest.raises(ValueError, match="dtype='fp8': use 'float32'"):
    Execution(dtype="fp8")
