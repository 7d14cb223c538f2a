"""A model with quantized experts computes what its dequantized copy does."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import (AttentionConfig, MLPConfig, ModelConfig, MoEConfig,
                          RopeConfig, RouterConfig)
from jaxlm.model.cache import empty_cache
from jaxlm.model.transformer import (Execution, forward, forward_with_cache,
                                     init_params, logits, per_layer)
from pallas_kernels.quant import FORMATS, is_quantized

EXPERTS, PER_TOKEN, LENGTH = 13, 3, 41
CONFIG = ModelConfig(
    vocab_size=61, d_model=64, num_layers=2,
    attention=AttentionConfig(6, 2, 8, RopeConfig(), RopeConfig(),
                              sliding_window=5, sinks=True),
    moe=MoEConfig(EXPERTS, PER_TOKEN,
                  MLPConfig(96, "clamped_swiglu", bias=True, interleaved=True),
                  RouterConfig("topk_softmax", bias=True)),
    layer_pattern=("sliding", "full"))
TOKENS = np.random.default_rng(3).integers(0, 61, (2, LENGTH))

quick_jit = functools.partial(
    jax.jit, static_argnums=0,
    compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def models(kind):
  """Parameters with quantized experts, and the same dequantized."""
  # Larger than at init, so that routing and tokens depend on the context.
  params = jax.tree.map(lambda x: 2 * x,
                        quick_jit(init_params)(CONFIG, jax.random.key(1)))
  for layer in params["stack_0"].values():
    for name in ("gate_up", "down"):
      layer["moe"][name] = FORMATS[kind].quantize(layer["moe"][name])
    layer["moe"]["down_bias"] += 1
  plain = jax.tree.map(
      lambda x: x.dequantize("float32") if is_quantized(x) else x, params,
      is_leaf=is_quantized)
  return params, plain


def assert_close(ours, theirs, tolerance):
  assert float(jnp.abs(ours - theirs).max()
               / jnp.abs(theirs).max()) < tolerance


@quick_jit
def logits_of(execution, params):
  hidden = forward(CONFIG, params, TOKENS, execution=execution).hidden_BTD
  return logits(CONFIG, params, hidden)


@pytest.mark.parametrize("kind, scan_layers", [
    ("mxfp4", True), ("mxfp4", False), ("int8", False), ("fp8", False)])
def test_logits_equal_those_of_the_dequantized_model(kind, scan_layers):
  execution = Execution(scan_layers=scan_layers)
  quantized, plain = models(kind)
  # MXFP4's even and odd inputs are summed apart. Changing every parameter's
  # last bit moves these logits by 1e-5 to 3e-5 (one token is that sensitive).
  assert_close(logits_of(execution, quantized), logits_of(execution, plain),
               1e-5 if kind == "mxfp4" else 1e-6)


def cached_logits(execution, params):
  """The logits of two tokens, each decoded after the same prompt."""
  params = per_layer(CONFIG, params)
  cache = empty_cache(CONFIG, 2, LENGTH, jnp.dtype(execution.dtype))
  results = []
  for start, end in ((0, LENGTH - 2), (LENGTH - 2, LENGTH - 1),
                     (LENGTH - 1, LENGTH)):
    positions = jnp.broadcast_to(jnp.arange(start, end), (2, end - start))
    hidden, cache = forward_with_cache(CONFIG, params, cache,
                                       TOKENS[:, start:end], positions,
                                       execution=execution)
    results.append(logits(CONFIG, params, hidden[:, -1]))
  return jnp.stack(results, 1)


def test_decode_equals_the_dequantized_model():
  quantized, plain = models("mxfp4")
  run = quick_jit(cached_logits)
  ours = run(Execution(), quantized)
  assert_close(ours, run(Execution(), plain), 1e-5)
  assert_close(ours, logits_of(Execution(), quantized)[:, -3:], 1e-4)


def test_decode_dequantizes_one_expert_at_a_time(largest_array):
  """The largest array of a step is the even inputs of one expert, though
  rows go to several."""
  params = per_layer(CONFIG, models("mxfp4")[0])
  cache = empty_cache(CONFIG, 1, LENGTH)
  step = functools.partial(forward_with_cache, CONFIG)
  size = largest_array(lambda *x: step(*x)[0], params, cache,
                       np.zeros((1, 1), int), np.full((1, 1), 7))
  expert = CONFIG.d_model * 2 * CONFIG.moe.expert.d_ff
  assert size == expert // 2
