"""Decoding at full size on a GPU, against what its memory allows.

  python -m experiments.benchmarks.decode_gpu [--preset gpt-oss-20b]
      [--layers N] [--batch N ...]

Random weights, made on the device: experts in MXFP4, all else in bfloat16. A
prompt is read, then new tokens are decoded in one compiled loop. Prints one
JSON line for each batch: tokens a second, and the fraction of the bandwidth
bound, that is of the steps a second if each only read what it must at the rate
of a large copy: all weights but the embedding's other rows and the experts
that no sequence visits (if each chose at random), and the cache. `--preset
tiny` is a gpt-oss small enough for a CPU.
"""
import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxlm
from experiments.benchmarks.decode import timed
from experiments.benchmarks.gpu_timing import copy_rate, report
from experiments.benchmarks.kernels_gpu_experts import random_mxfp4
from jaxlm.config import ModelConfig
from jaxlm.model.costs import cache_bytes
from jaxlm.model.transformer import Execution, abstract_params, per_layer
from pallas_kernels.quant import is_quantized


def model(preset: str, layers: int | None) -> ModelConfig:
  config = jaxlm.preset("gpt-oss-20b" if preset == "tiny" else preset)
  if preset == "tiny":
    config = dataclasses.replace(
        config, vocab_size=500, d_model=64, num_layers=2,
        attention=dataclasses.replace(config.attention, num_heads=4,
                                      num_kv_heads=2, head_dim=16),
        moe=dataclasses.replace(
            config.moe, num_experts=8, experts_per_token=2,
            expert=dataclasses.replace(config.moe.expert, d_ff=96)))
  return config if layers is None else dataclasses.replace(
      config, num_layers=layers)


def random_params(config: ModelConfig) -> dict:
  """`per_layer`, of about the initial scales."""
  @functools.partial(jax.jit, static_argnums=1)
  def normal(key, shape, fan_in):
    return fan_in ** -0.5 * jax.random.normal(key, shape, jnp.bfloat16)

  experts = jax.jit(random_mxfp4, static_argnums=(1, 2, 3))

  def leaf(path, x, i):
    name, key = path[-1].key, jax.random.key(i)
    if x.ndim == 3 and name in ("gate_up", "down"):
      return experts(key, *x.shape)
    if x.ndim == 1:
      return jnp.full(x.shape, name == "scale", jnp.bfloat16)
    return normal(key, x.shape, config.d_model)

  abstract = jax.eval_shape(functools.partial(per_layer, config),
                            abstract_params(config))
  paths, tree = jax.tree.flatten_with_path(abstract)
  return jax.tree.unflatten(tree, [leaf(path, x, i) for i, (path, x)
                                   in enumerate(paths)])


def bytes_read(config: ModelConfig, params: dict, batch: int,
               length: int) -> float:
  """Of a step: weights, and the cache when sequences have `length` tokens."""
  moe = config.moe
  visited = 1 - (1 - moe.experts_per_token / moe.num_experts) ** batch
  leaves = jax.tree.leaves(params, is_leaf=is_quantized)
  weights = sum(x.nbytes * (visited if is_quantized(x) else 1) for x in leaves)
  if not config.tie_embeddings:
    weights -= params["embed"]["embedding"].nbytes
  return weights + batch * cache_bytes(config, length, 2)


def steps_per_second(config, params, batch: int, prompt: int, new: int,
                     repeats: int) -> float:
  """Of the decoding loop alone, the best of `repeats`."""
  tokens = np.random.default_rng(0).integers(
      0, config.vocab_size, (batch, prompt), dtype=np.int32)
  execution = Execution(dtype="bfloat16", scan_layers=False)
  _, times = timed(config, params, tokens, new, execution, repeats)
  return (new - 1) / min(times)


def main():
  parser = argparse.ArgumentParser(
      description=__doc__.split("\n")[0],
      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
  parser.add_argument("--preset", default="gpt-oss-20b",
                      help="a preset with experts, or tiny")
  parser.add_argument("--layers", type=int, help="so many instead of all")
  parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
  parser.add_argument("--prompt", type=int, default=128, help="its tokens")
  parser.add_argument("--new", type=int, default=128, help="tokens decoded")
  parser.add_argument("--repeats", type=int, default=3)
  flags = parser.parse_args()
  config = model(flags.preset, flags.layers)
  params = random_params(config)
  copied = copy_rate(flags.repeats)
  for batch in flags.batch:
    steps = steps_per_second(config, params, batch, flags.prompt, flags.new,
                             flags.repeats)
    needed = bytes_read(config, params, batch, flags.prompt + flags.new // 2)
    report(figure="decode, MXFP4 experts", model=flags.preset,
           layers=config.num_layers, batch=batch,
           tokens_per_second=round(batch * steps, 1),
           gb_per_step=round(needed / 1e9, 3),
           copy_gb_per_second=round(copied / 1e9, 1),
           of_bandwidth_bound=round(steps * needed / copied, 3))


if __name__ == "__main__":
  main()
