"""The kernels, compiled for real TPUs at the published models' shapes."""
import functools

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import tpu_static
from pallas_kernels.expert_matmul import expert_matmul
from pallas_kernels.windowed_attention import windowed_attention

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


def kernels(compiled) -> int:
  """How many Pallas kernels a compiled program calls."""
  return compiled.as_text().count('custom_call_target="tpu_custom_call"')


@GENERATIONS
@pytest.mark.parametrize("shape", ATTENTION)
def test_windowed_attention_and_its_gradient(shape, generation):
  heads, kv_heads, head_dim, window, sinks = ATTENTION[shape]
  q = struct(1, LENGTH, heads, head_dim)
  k = struct(1, LENGTH, kv_heads, head_dim)

  def run(q, k, v, sinks_N, do):
    o, vjp = jax.vjp(functools.partial(
        windowed_attention, window=window, scale=head_dim ** -0.5),
        q, k, v, **({"sinks_N": sinks_N} if sinks else {}))
    return o, vjp(do)

  compiled = tpu_static.compile_for(
      generation, run, q, k, k, struct(heads, dtype=jnp.float32), q)
  assert kernels(compiled) >= 2
