"""Backward pass on GPUs: two kernels, both recompute the scores they need.

dq: a program owns a tile of queries, as in the forward pass, and walks over
the keys of its band. It reads o too and writes delta = sum(o do) beside dq, so
that no pass over o and do is spent on delta alone.

dk and dv: a program owns a block of keys and walks over the queries that see
them, the heads of its kv head in turn, so that the sum over query heads stays
in registers: no atomics and nothing of size [N, S] in memory. It works on
transposed scores [keys, rows], the shape in which both of its products have
them on the left, from registers. Past a head_dim of 128 the two sums fill the
registers (2 * 64 * 256 floats are 256 for each of 128 threads), and dk and dv
are found one after the other: five products instead of four.

At gpt-oss's window (D 64, W 128, 8 query heads to a kv head, bfloat16) dq
takes 160 scores a query, as the forward pass does; dk and dv 191, since 64
keys are seen by 64 + 127 tokens. These are 3 and 4 products of 2 * 64 flops a
score; one kernel for both would spare two, but has either dq or dk and dv to
add up in memory. Per token and head the first moves 512 bytes (q, o, do, dq)
and the second 256 (q, do) three times, twice of them from the L2 cache.
"""
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import vma
from pallas_kernels.windowed_attention import gpu_tiles
from pallas_kernels.windowed_attention.gpu_tiles import (LOG2_E, Problem,
                                                         flat_spec)


def _score_gradient(problem: Problem, p, s, dp, delta):
  """Of the products q k, but for the factor `scale`."""
  ds = p * (dp - delta)
  return ds if problem.options.soft_cap is None else ds * (1 - s * s)


def _dq_kernel(q_ref, k_ref, v_ref, q_segments_ref, k_segments_ref, o_ref,
               lse_ref, do_ref, dq_ref, delta_ref, *, problem: Problem):
  p = problem
  first_token, first_head, kv_head = p.first_row()
  token_R, head_R, valid_R = p.rows(first_token, first_head)
  q_row_R = token_R * p.num_heads + head_R
  stat_R = head_R * p.num_queries + token_R
  q_RH = p.load(q_ref, q_row_R, p.head_dim, valid_R)
  do_RH = p.load(do_ref, q_row_R, p.v_head_dim, valid_R)
  o_RH = p.load(o_ref, q_row_R, p.v_head_dim, valid_R)
  delta_R = jnp.sum(o_RH.astype(jnp.float32) * do_RH.astype(jnp.float32), 1)
  p.store_row(delta_ref, stat_R, delta_R, valid_R)
  lse_R = p.load_row(lse_ref, stat_R, valid_R) * LOG2_E
  position_R = token_R + p.options.q_offset
  segment_R = None
  if p.segmented:
    segment_R = p.load_row(q_segments_ref, token_R, valid_R)[:, None]

  first_key, count, first_full, last_full = p.key_blocks(first_token)

  def step(i, dq_RH):
    key_C = first_key + i * p.tile.keys + lax.iota(jnp.int32, p.tile.keys)
    k_valid_C = key_C < p.num_keys
    k_row_C = key_C * p.num_kv_heads + kv_head
    k_CH = p.load(k_ref, k_row_C, p.head_dim, k_valid_C)
    v_CH = p.load(v_ref, k_row_C, p.v_head_dim, k_valid_C)
    s_RC = p.score(q_RH, k_CH)
    def seen_RC():
      segment_C = None
      if p.segmented:
        segment_C = p.load_row(k_segments_ref, key_C, k_valid_C)[None]
      return p.seen(position_R[:, None], key_C[None], segment_R, segment_C)
    p_RC = p.masked(p.exp2(s_RC, lse_R[:, None]), 0.0,
                    (first_full <= i) & (i < last_full), seen_RC)
    ds_RC = _score_gradient(p, p_RC, s_RC, p.dot(do_RH, v_CH.T),
                            delta_R[:, None])
    return dq_RH + p.dot(ds_RC.astype(k_CH.dtype), k_CH)

  dq_RH = jnp.zeros((p.tile.rows, gpu_tiles.padded(p.head_dim)), jnp.float32)
  dq_RH = lax.fori_loop(0, count, step, dq_RH)
  p.store(dq_ref, q_row_R, p.head_dim, dq_RH * p.options.scale, valid_R)


def _dkv_kernel(q_ref, k_ref, v_ref, q_segments_ref, k_segments_ref, lse_ref,
                delta_ref, do_ref, dk_ref, dv_ref, *, problem: Problem):
  p = problem
  i, kv_head = gpu_tiles.divided(pl.program_id(0), p.num_kv_heads)
  first_key = i * p.tile.keys
  key_C = first_key + lax.iota(jnp.int32, p.tile.keys)
  k_valid_C = key_C < p.num_keys
  k_row_C = key_C * p.num_kv_heads + kv_head
  k_CH = p.load(k_ref, k_row_C, p.head_dim, k_valid_C)
  v_CH = p.load(v_ref, k_row_C, p.v_head_dim, k_valid_C)
  segment_C = None
  if p.segmented:
    segment_C = p.load_row(k_segments_ref, key_C, k_valid_C)[:, None]

  head_tiles = p.group // p.pack
  first_query, count, first_full, last_full = p.query_blocks(first_key)

  def step(i, carry):
    dk_CH, dv_CH = carry
    i, head_tile = gpu_tiles.divided(i, head_tiles)
    first_token = first_query + i * p.tokens
    first_head = kv_head * p.group + head_tile * p.pack
    token_R, head_R, valid_R = p.rows(first_token, first_head)
    q_row_R = token_R * p.num_heads + head_R
    stat_R = head_R * p.num_queries + token_R
    q_RH = p.load(q_ref, q_row_R, p.head_dim, valid_R)
    do_RH = p.load(do_ref, q_row_R, p.v_head_dim, valid_R)
    lse_R = p.load_row(lse_ref, stat_R, valid_R) * LOG2_E
    s_CR = p.score(k_CH, q_RH)
    def seen_CR():
      position_R = token_R + p.options.q_offset
      segment_R = None
      if p.segmented:
        segment_R = p.load_row(q_segments_ref, token_R, valid_R)[None]
      return p.seen(position_R[None], key_C[:, None], segment_R, segment_C)
    p_CR = p.masked(p.exp2(s_CR, lse_R[None]), 0.0,
                    (first_full <= i) & (i < last_full), seen_CR)
    if dv_ref is not None:
      dv_CH += p.dot(p_CR.astype(do_RH.dtype), do_RH)
    if dk_ref is not None:
      delta_R = p.load_row(delta_ref, stat_R, valid_R)
      ds_CR = _score_gradient(p, p_CR, s_CR, p.dot(v_CH, do_RH.T),
                              delta_R[None])
      dk_CH += p.dot(ds_CR.astype(q_RH.dtype), q_RH)
    return dk_CH, dv_CH

  zeros = lambda ref, dim: None if ref is None else jnp.zeros(
      (p.tile.keys, gpu_tiles.padded(dim)), jnp.float32)
  dk_CH, dv_CH = lax.fori_loop(
      0, count * head_tiles, step,
      (zeros(dk_ref, p.head_dim), zeros(dv_ref, p.v_head_dim)))
  if dk_ref is not None:
    p.store(dk_ref, k_row_C, p.head_dim, dk_CH * p.options.scale, k_valid_C)
  if dv_ref is not None:
    p.store(dv_ref, k_row_C, p.v_head_dim, dv_CH, k_valid_C)


def dq_and_delta(q_BX, k_BX, v_BX, segments, o_BX, lse_BX, do_BX,
                 problem: Problem):
  """dq and sum(o do), flat but for B."""
  p = problem
  inputs = (q_BX, k_BX, v_BX, *segments, o_BX, lse_BX, do_BX)
  outputs = (vma.shape_like(q_BX, q_BX.shape),
             vma.shape_like(lse_BX, lse_BX.shape))
  tiles = pl.cdiv(p.num_queries, p.tokens) * (p.num_heads // p.pack)
  return _call(_dq_kernel, "windowed_attention_dq", tiles, inputs, outputs,
               problem=p)


def dk_and_dv(q_BX, k_BX, v_BX, segments, lse_BX, delta_BX, do_BX,
              problem: Problem):
  """dk and dv, flat but for B."""
  p = problem
  inputs = (q_BX, k_BX, v_BX, *segments, lse_BX, delta_BX, do_BX)
  dk, dv = vma.shape_like(k_BX, k_BX.shape), vma.shape_like(v_BX, v_BX.shape)
  tiles = pl.cdiv(p.num_keys, p.tile.keys) * p.num_kv_heads
  run = functools.partial(_call, _dkv_kernel, "windowed_attention_dkv", tiles,
                          inputs, problem=p)
  if max(gpu_tiles.padded(p.head_dim), gpu_tiles.padded(p.v_head_dim)) <= 128:
    return run((dk, dv))
  return run((dk, None))[0], run((None, dv))[1]


def _call(kernel, name, tiles, inputs, outputs, *, problem):
  return pl.pallas_call(
      functools.partial(kernel, problem=problem), out_shape=outputs,
      grid=(tiles, inputs[0].shape[0]),
      in_specs=[None if x is None else flat_spec(x) for x in inputs],
      out_specs=[None if x is None else flat_spec(x) for x in outputs],
      compiler_params=problem.grid_params(),
      interpret=problem.options.interpret, name=name)(*inputs)
