"""How the cost of a windowed attention layer grows with the sequence.

  python -m experiments.benchmarks.attention

Prints one JSON line per kind of layer: forward and backward at 2048 and 4096
tokens, and the ratio, which is 2 for work proportional to the band and 4 for
work proportional to the square.
"""
import json

import jax
import jax.numpy as jnp

from experiments.benchmarks.train_step import seconds
from pallas_kernels.windowed_attention import windowed_attention

HEADS, KV_HEADS, HEAD_DIM, WINDOW = 8, 2, 64, 128


def time_of(length: int, window: int | None) -> float:
  keys = jax.random.split(jax.random.key(0), 3)
  q, k, v = (jax.random.normal(key, (1, length, heads, HEAD_DIM))
             for key, heads in zip(keys, (HEADS, KV_HEADS, KV_HEADS)))

  def loss(q, k, v):
    o = windowed_attention(q, k, v, window=window, scale=HEAD_DIM ** -0.5,
                           sinks_N=jnp.zeros(HEADS))
    return jnp.sum(o * q)

  run = jax.jit(jax.grad(loss, (0, 1, 2)))
  return seconds(lambda: jax.block_until_ready(run(q, k, v)), 9)


def main():
  for name, window in (("sliding", WINDOW), ("full", None)):
    short, long = time_of(2048, window), time_of(4096, window)
    print(json.dumps({
        "figure": f"{name} attention, forward and backward",
        "milliseconds_2048": round(1e3 * short, 1),
        "milliseconds_4096": round(1e3 * long, 1),
        "ratio": round(long / short, 2)}), flush=True)


if __name__ == "__main__":
  main()
