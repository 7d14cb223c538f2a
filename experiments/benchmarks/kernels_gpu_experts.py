"""MXFP4 expert matmuls on a GPU, against its copies and its matmuls.

  python -m experiments.benchmarks.kernels_gpu experts
  python -m experiments.benchmarks.kernels_gpu_experts --models tiny

Both matmuls of a layer, random weights and router. Decode, 1 to 64 tokens: the
packed bytes of the experts in use a second, as a fraction of the bytes that a
large copy reads and writes in the same run. Prefill: FLOPs a second, as a
fraction of a large bfloat16 matmul's. The second form runs anywhere, where
there is no GPU interpreted.
"""
import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.gpu_timing import copy_rate, report, seconds
from pallas_kernels.expert_matmul import expert_matmul
from pallas_kernels.quant import MXFP4

# Experts, experts a token, d_model, d_expert, SwiGLU's limit.
MODELS = {
    "gpt-oss-20b": (32, 4, 2880, 2880, 7.0),
    "gpt-oss-120b": (128, 4, 2880, 2880, 7.0),
    "Qwen3-30B-A3B": (128, 8, 2048, 768, None),
    "tiny": (4, 2, 64, 96, 7.0),
}
DECODE, PREFILL = (1, 8, 16, 64), (4096, 16384)
# Calls timed together, each with other experts: what the L2 cache holds of
# one call is not read by the next.
CALLS = 32


def matmul_rate(repeats: int, size: int = 8192) -> float:
  """FLOPs a second of a square bfloat16 matmul of random numbers."""
  a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16)
          for i in range(2))
  multiply = jax.jit(jnp.matmul)
  return 2 * size ** 3 / seconds(lambda: multiply(a, b), repeats)


def random_mxfp4(key, *shape) -> MXFP4:
  """Made on the device; [E, in, out] of about unit variance over the input."""
  blocks, scales = MXFP4.part_shapes(shape)
  a, b = jax.random.split(key)
  # e2m1's codes have a root mean square of 2.9.
  middle = 127 - round(np.log2(2.9 * shape[-2] ** 0.5))
  return MXFP4(jax.random.bits(a, blocks, jnp.uint8),
               jax.random.randint(b, scales, middle - 1, middle + 2).astype(
                   jnp.uint8))


def group_sizes(tokens: int, experts: int, each: int) -> np.ndarray:
  """[CALLS, E] of tokens that choose `each` experts at random."""
  random = np.random.default_rng(tokens)
  chosen = random.random((CALLS, tokens, experts)).argsort(-1)[..., :each]
  return np.stack([np.bincount(c.ravel(), minlength=experts)
                   for c in chosen]).astype(np.int32)


def layer(x_MD, weights, sizes_E, interpret: bool, limit):
  """Both matmuls, fused as the model has them."""
  gate_up, gate_up_bias, down, down_bias, row_weights_M = weights
  run = functools.partial(expert_matmul, implementation="pallas-gpu",
                          interpret=interpret)
  h_MF = run(x_MD, gate_up, sizes_E, bias=gate_up_bias, swiglu_limit=limit)
  if limit is None:
    gate, up = jnp.split(h_MF, 2, 1)
    h_MF = jax.nn.silu(gate) * up
  return run(h_MF, down, sizes_E, bias=down_bias, row_weights_M=row_weights_M)


def timed(model: str, tokens: int, repeats: int) -> tuple[float, np.ndarray]:
  """Seconds of a layer's call, and the group sizes [CALLS, E]."""
  experts, each, d_model, d_expert, limit = MODELS[model]
  keys, rows = jax.random.split(jax.random.key(0), 6), tokens * each
  interpret = jax.default_backend() != "gpu"
  normal = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
  x_MD = normal(keys[0], (rows, d_model))
  weights = (random_mxfp4(keys[1], experts, d_model, 2 * d_expert),
             normal(keys[2], (experts, 2 * d_expert)),
             random_mxfp4(keys[3], experts, d_expert, d_model),
             normal(keys[4], (experts, d_model)),
             jax.random.uniform(keys[5], (rows,)))
  sizes_CE = group_sizes(tokens, experts, each)

  @jax.jit
  def calls(x_MD, weights, sizes_CE):
    def body(i, total):
      y_MD = layer(x_MD, weights, sizes_CE[i], interpret, limit)
      return total + y_MD[0, 0].astype(jnp.float32)
    return jax.lax.fori_loop(0, len(sizes_CE), body, jnp.float32(0))

  took = seconds(lambda: calls(x_MD, weights, sizes_CE), repeats)
  return took / CALLS, sizes_CE


def run(flags, copied: float, models=None):
  """Prints one figure for each model and number of tokens."""
  models = models or [name for name in MODELS if name != "tiny"]
  multiplied = matmul_rate(flags.repeats, 256 if models == ["tiny"] else 8192)
  for model in models:
    experts, each, d_model, d_expert, _ = MODELS[model]
    values = 3 * d_model * d_expert  # of an expert
    for tokens in (*DECODE, *((256,) if model == "tiny" else PREFILL)):
      took, sizes_CE = timed(model, tokens, flags.repeats)
      about = {"model": model, "tokens": tokens,
               "microseconds": round(took * 1e6, 1)}
      if tokens in DECODE:
        used = float(np.mean(np.sum(sizes_CE > 0, 1)))
        rate = used * values * 17 / 32 / took
        report(figure="mxfp4 experts, decode", **about,
               experts_used=round(used, 1),
               packed_gb_per_second=round(rate / 1e9, 1),
               copy_gb_per_second=round(copied / 1e9, 1),
               of_copy=round(rate / copied, 3))
      else:
        rate = 2 * tokens * each * values / took
        report(figure="mxfp4 experts, prefill", **about,
               tflops=round(rate / 1e12, 1),
               matmul_tflops=round(multiplied / 1e12, 1),
               of_matmul=round(rate / multiplied, 3))


def main():
  parser = argparse.ArgumentParser(
      description=__doc__.split("\n")[0],
      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
  parser.add_argument("--models", nargs="+", choices=MODELS,
                      default=[name for name in MODELS if name != "tiny"])
  parser.add_argument("--repeats", type=int, default=9, help="runs timed")
  flags = parser.parse_args()
  run(flags, copy_rate(flags.repeats), flags.models)


if __name__ == "__main__":
  main()
