"""The kernels, compiled for real TPUs at the published models' shapes."""
import functools

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import tpu_static
from pallas_kernels.expert_matmul import expert_matmul
from pallas_kernels.quant import MXFP4, MXFP4Pairs
from pallas_kernels.windowed_attention import (cached_attention,
                                               windowed_attention)

pytest.importorskip("libtpu", reason="Linux on x86 alone has libtpu")

GENERATIONS = pytest.mark.parametrize("generation", tpu_static.GENERATIONS)

# Query heads, key heads, head_dim, window, sinks.
ATTENTION = {
    "gpt-oss sliding": (64, 8, 64, 128, True),
    "gpt-oss full": (64, 8, 64, None, True),
    "gemma-3-27b sliding": (32, 16, 128, 1024, False),
    "gemma-3-27b full": (32, 16, 128, None, False),
    "gemma-3-12b sliding": (16, 8, 256, 1024, False),
    "qwen3-30b-a3b": (32, 4, 128, None, False),
}
LENGTH = 8192


def struct(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


def compiled(generation, kernels: int, function, *arguments):
  """The compiled program, which calls so many Pallas kernels."""
  lowered = tpu_static.lower_for(generation, function, *arguments)
  assert lowered.as_text().count("@tpu_custom_call") == kernels
  return lowered.compile()


@GENERATIONS
@pytest.mark.parametrize("shape", ATTENTION)
def test_windowed_attention_and_its_gradient(shape, generation):
  heads, kv_heads, head_dim, window, sinks = ATTENTION[shape]
  q = struct(1, LENGTH, heads, head_dim)
  k = struct(1, LENGTH, kv_heads, head_dim)

  def run(q, k, v, sinks_N, do):
    o, vjp = jax.vjp(lambda *args: windowed_attention(
        *args[:3], window=window, scale=head_dim ** -0.5,
        sinks_N=args[3] if sinks else None), q, k, v, sinks_N)
    return o, vjp(do)

  compiled(generation, 2, run, q, k, k, struct(heads, dtype=jnp.float32), q)


def packed(num_experts, dim_in, dim_out, **options):
  """The shapes of MXFP4 weights as a TPU wants them."""
  parts = MXFP4.part_shapes((num_experts, dim_in, dim_out))
  return jax.eval_shape(functools.partial(MXFP4Pairs.from_mxfp4, **options),
                        MXFP4(*(struct(*shape, dtype=jnp.uint8)
                                for shape in parts)))


def size(*trees) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trees))


@GENERATIONS
@pytest.mark.parametrize("num_experts, rows", [(32, 16384), (128, 64)])
def test_gpt_oss_experts_in_mxfp4(num_experts, rows, generation):
  gate_up = packed(num_experts, 2880, 5760, deinterleave=True)
  down = packed(num_experts, 2880, 2880)

  def run(x, gate_up, gate_up_bias, down, down_bias, sizes, row_weights):
    h = expert_matmul(x, gate_up, sizes, bias=gate_up_bias, swiglu_limit=7.0)
    return expert_matmul(h, down, sizes, bias=down_bias,
                         row_weights_M=row_weights)

  arguments = (struct(rows, 2880), gate_up, struct(num_experts, 5760), down,
               struct(num_experts, 2880), struct(num_experts, dtype=jnp.int32),
               struct(rows, dtype=jnp.float32))
  # The result of the first, the rows and biases in another layout: no weights.
  temporary = compiled(generation, 2, run, *arguments).memory_analysis(
      ).temp_size_in_bytes
  assert temporary < 3 * size(struct(rows, 2880)) + 2 * size(
      arguments[2], arguments[4]) + 2 ** 20


@GENERATIONS
@pytest.mark.parametrize("dims", [(2048, 1536), (768, 2048)])
def test_qwen3_experts_and_their_gradient(dims, generation):
  x, w = struct(16384, dims[0]), struct(128, *dims)

  def run(x, w, sizes, dy):
    y, vjp = jax.vjp(lambda x, w: expert_matmul(x, w, sizes), x, w)
    return y, vjp(dy)

  program = compiled(generation, 3, run, x, w, struct(128, dtype=jnp.int32),
                     struct(16384, dims[1]))
  # The gradient of the weights in float32, before it is cast to bfloat16.
  assert program.memory_analysis().temp_size_in_bytes < 2.1 * size(w)


@GENERATIONS
@pytest.mark.parametrize("batch, slots, queries, shape", [
    (64, 128, 1, "gpt-oss sliding"), (8, 8192, 1, "gpt-oss full"),
    (32, 1024, 4, "gemma-3-27b sliding"), (8, 8192, 1, "qwen3-30b-a3b")])
def test_attention_over_a_cache(batch, slots, queries, shape, generation):
  heads, kv_heads, head_dim, window, sinks = ATTENTION[shape]
  own = struct(batch, queries, kv_heads, head_dim)
  cached = struct(batch, slots, kv_heads * head_dim)

  def run(q, k, v, k_cached, v_cached, positions, k_positions, sinks_N):
    k_cached, v_cached = (x.reshape(batch, slots, kv_heads, head_dim)
                          for x in (k_cached, v_cached))
    return cached_attention(
        q, k, v, k_cached, v_cached, positions, k_positions, window=window,
        scale=head_dim ** -0.5, sinks_N=sinks_N if sinks else None)

  q = struct(batch, queries, heads, head_dim)
  program = compiled(
      generation, 1, run, q, own, own, cached, cached,
      struct(batch, queries, dtype=jnp.int32),
      struct(batch, slots, dtype=jnp.int32), struct(heads))
  # Queries and results in another layout, and masks: no cache.
  assert program.memory_analysis().temp_size_in_bytes < (
      4 * size(q) + size(cached) / 20)
