"""Forward pass on GPUs: a program owns a tile of queries and walks over the
keys of its band.

At gpt-oss's window (D 64, W 128, 8 query heads to a kv head, bfloat16) a tile
of 128 rows is 16 tokens of all 8 heads. Their band is 16 + 127 = 143 keys,
five blocks of 32 from the band's first key on: 160 scores a query, 1.25 times
what the window needs, where a tile of 128 tokens of one head would take 256.
A program moves 16 KB of q, 16 KB of o and 40 KB of k and v, these from the L2
cache, where other programs need them too: q and o are 134 of the 151 MB that
T = 8192 with 64 heads must move.

The softmax is online, in base 2, on unscaled products: exp2(c s - c m) is one
multiply-add and one exp2 a score. A sink starts the running maximum and sum
as a key without a value would. Of the five blocks, the three inside the band
skip the mask.
"""
import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import vma
from pallas_kernels.windowed_attention import gpu_tiles
from pallas_kernels.windowed_attention.gpu_tiles import (LOG2_E, Problem,
                                                         flat_spec)

LN_2 = math.log(2)


def _kernel(q_ref, k_ref, v_ref, sinks_ref, q_segments_ref, k_segments_ref,
            o_ref, lse_ref, *, problem: Problem):
  p = problem
  unit = p.score_unit
  first_token, first_head, kv_head = p.first_row()
  token_R, head_R, valid_R = p.rows(first_token, first_head)
  q_row_R = token_R * p.num_heads + head_R
  q_RH = p.load(q_ref, q_row_R, p.head_dim, valid_R)
  position_R = token_R + p.options.q_offset
  segment_R = None
  if p.segmented:
    segment_R = p.load_row(q_segments_ref, token_R, valid_R)[:, None]

  first_key, count, first_full, last_full = p.key_blocks(first_token)

  def attend(i, carry):
    o_RH, top_R, total_R = carry
    key_C = first_key + i * p.tile.keys + lax.iota(jnp.int32, p.tile.keys)
    k_valid_C = key_C < p.num_keys
    k_row_C = key_C * p.num_kv_heads + kv_head
    s_RC = p.score(q_RH, p.load(k_ref, k_row_C, p.head_dim, k_valid_C))
    def seen_RC():
      segment_C = None
      if p.segmented:
        segment_C = p.load_row(k_segments_ref, key_C, k_valid_C)[None]
      return p.seen(position_R[:, None], key_C[None], segment_R, segment_C)
    s_RC = p.masked(s_RC, -jnp.inf, (first_full <= i) & (i < last_full),
                    seen_RC)
    new_top_R = jnp.maximum(top_R, jnp.max(s_RC, 1))
    p_RC = p.exp2(s_RC, (new_top_R * unit)[:, None])
    # Exactly 1 while nothing is seen: LOWEST's rounding is beyond exp2.
    shrink_R = p.exp2(top_R - new_top_R, 0.0)
    v_CH = p.load(v_ref, k_row_C, p.v_head_dim, k_valid_C)
    o_RH = o_RH * shrink_R[:, None] + p.dot(p_RC.astype(v_CH.dtype), v_CH)
    return o_RH, new_top_R, total_R * shrink_R + jnp.sum(p_RC, 1)

  if sinks_ref is None:
    top_R = jnp.full(p.tile.rows, gpu_tiles.LOWEST, jnp.float32)
    total_R = jnp.zeros(p.tile.rows, jnp.float32)
  else:
    top_R = jnp.maximum(p.load_row(sinks_ref, head_R) * (LOG2_E / unit),
                        gpu_tiles.LOWEST)
    total_R = jnp.where(top_R > gpu_tiles.LOWEST, 1.0, 0.0)
  o_RH = jnp.zeros((p.tile.rows, gpu_tiles.padded(p.v_head_dim)), jnp.float32)
  o_RH, top_R, total_R = lax.fori_loop(0, count, attend,
                                       (o_RH, top_R, total_R))
  p.store(o_ref, q_row_R, p.v_head_dim, o_RH * (1 / total_R)[:, None], valid_R)
  p.store_row(lse_ref, head_R * p.num_queries + token_R,
              top_R * (unit * LN_2) + jnp.log(total_R), valid_R)


def forward(q_BX, k_BX, v_BX, sinks_N, segments, problem: Problem):
  """The output and the log of the denominator, all flat but for B."""
  p = problem
  batch = q_BX.shape[0]
  outputs = (
      vma.shape_like(q_BX, (batch, p.num_queries * p.num_heads * p.v_head_dim)),
      vma.shape_like(q_BX, (batch, p.num_heads * p.num_queries), jnp.float32))
  sinks_spec = None if sinks_N is None else pl.BlockSpec(
      sinks_N.shape, lambda _, batch: (0,))
  tiles = pl.cdiv(p.num_queries, p.tokens) * (p.num_heads // p.pack)
  return pl.pallas_call(
      functools.partial(_kernel, problem=p), out_shape=outputs,
      grid=(tiles, batch),
      in_specs=[flat_spec(q_BX), flat_spec(k_BX), flat_spec(v_BX), sinks_spec,
                *(None if x is None else flat_spec(x) for x in segments)],
      out_specs=[flat_spec(x) for x in outputs],
      compiler_params=p.grid_params(), interpret=p.options.interpret,
      name="windowed_attention_forward",
  )(q_BX, k_BX, v_BX, sinks_N, *segments)
