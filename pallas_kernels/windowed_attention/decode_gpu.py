"""Attention over a cache on GPUs: what counts is that the cache is read once,
at the memory's speed.

A program takes the queries of one kv head, T * G rows (8 at gpt-oss, padded
to the 16 of a tensor-core tile), over a part of the cache's slots. At H 64 in
bfloat16 a block of 64 slots is 8 KB of keys and 8 KB of values, 128 bytes a
slot, next to those that the programs of the other kv heads read; with three
stages four programs a multiprocessor have 128 KB in flight, where 4.8 TB/s over
132 multiprocessors and a microsecond's latency ask for 36.

Few rows and kv heads are few programs, so that the slots of a long cache are
split, each part's unnormalised output goes to memory with its maximum and sum
(1/64 of what it read, at 4096 slots and 8 heads), and a second kernel joins
them. A part first looks through its slots' positions, 4 bytes a slot and kv
head, and leaves out what is before the first and after the last that is seen:
of a cache half full, half is read.

The queries' own keys and the sinks belong to the first part.
"""
import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import vma
from pallas_kernels.windowed_attention import gpu, gpu_tiles
from pallas_kernels.windowed_attention.gpu_tiles import (LOG2_E, Problem, Tile,
                                                         flat_spec, padded)
from pallas_kernels.windowed_attention.options import CacheOptions

MAX_ROWS = 64  # of a program
MAX_SLOTS = 4096  # of a program: it holds their positions at once
BLOCK_BYTES = 2 ** 15  # of keys and values, of which `stages` are held
PROGRAMS = 4 * 132  # that fill a Hopper: four a multiprocessor
NOWHERE = 2 ** 30  # a position in nobody's past


@dataclasses.dataclass(frozen=True)
class DecodeBlocks:
  """Slots read at once, warps, loads in flight, and parts of a cache (None
  takes as many as fill the GPU)."""
  slots: int = 64
  warps: int = 4
  stages: int = 3
  parts: int | None = None

  def __post_init__(self):
    self.tile(16)
    if self.parts is not None and self.parts < 1:
      raise ValueError(f"parts={self.parts}: use at least one")

  def tile(self, rows: int) -> Tile:
    return Tile(rows, self.slots, self.warps, self.stages)


def unsupported(q_BTNH, k_BTKH, v_BTKH, k_BSKH, v_BSKH, q_positions_BT,
                k_positions_BS, options: CacheOptions) -> str | None:
  """Why this kernel cannot do this; None if it can."""
  if options.blocks is not None and not isinstance(options.blocks,
                                                   DecodeBlocks):
    raise ValueError(f"blocks={options.blocks}: expected "
                     "pallas_kernels.windowed_attention.decode_gpu."
                     "DecodeBlocks")
  if v_BSKH is None:
    return "the values are part of the keys: give them as an array"
  return gpu.unsupported(q_BTNH, k_BSKH, v_BSKH, None,
                         options._replace(blocks=None))


def _plan(q_BTNH, k_BSKH, v_BSKH, options: CacheOptions):
  """The problem, the number of row tiles, of parts and of blocks in a part."""
  batch, length, num_heads, head_dim = q_BTNH.shape
  slot_bytes = q_BTNH.dtype.itemsize * (padded(head_dim)
                                        + padded(v_BSKH.shape[3]))
  blocks = options.blocks or DecodeBlocks(min(64, BLOCK_BYTES // slot_bytes))
  slots, num_kv_heads = k_BSKH.shape[1:3]
  rows = length * num_heads // num_kv_heads
  tile = blocks.tile(min(MAX_ROWS, padded(rows)))
  row_tiles = pl.cdiv(rows, tile.rows)
  num_blocks = pl.cdiv(slots, tile.keys)
  parts = blocks.parts or pl.cdiv(PROGRAMS, batch * num_kv_heads * row_tiles)
  # At least two blocks a part, unless it was said otherwise.
  least = 1 if blocks.parts else 2
  per_part = min(max(pl.cdiv(num_blocks, parts), least),
                 MAX_SLOTS // tile.keys)
  problem = Problem(length, slots, num_heads, num_kv_heads, head_dim,
                    v_BSKH.shape[3], q_BTNH.dtype, False, options, tile)
  return problem, row_tiles, pl.cdiv(num_blocks, per_part), per_part


def _kernel(q_ref, k_own_ref, v_own_ref, k_ref, v_ref, q_positions_ref,
            k_positions_ref, sinks_ref, o_ref, top_ref, total_ref, *,
            problem: Problem, row_tiles: int, per_part: int):
  p = problem
  unit, slots, rows = p.score_unit, p.tile.keys, p.num_queries * p.group
  i, kv_head = gpu_tiles.divided(pl.program_id(0), p.num_kv_heads)
  part, row_tile = gpu_tiles.divided(i, row_tiles)
  row_R = row_tile * p.tile.rows + lax.iota(jnp.int32, p.tile.rows)
  valid_R = row_R < rows
  token_R, head_R = gpu_tiles.divided(row_R, p.group)
  head_R += kv_head * p.group
  q_row_R = token_R * p.num_heads + head_R
  q_RH = p.load(q_ref, q_row_R, p.head_dim, valid_R)
  position_R = p.load_row(q_positions_ref, token_R, valid_R)
  position_R = jnp.where(valid_R, position_R, -1)
  own_U = lax.iota(jnp.int32, padded(p.num_queries))
  own_valid_U = own_U < p.num_queries
  own_position_U = p.load_row(q_positions_ref, own_U, own_valid_U)
  own_position_U = jnp.where(own_valid_U & (own_position_U >= 0),
                             own_position_U, NOWHERE)
  first = jnp.min(own_position_U)

  def attend(carry, k_ref, v_ref, slot_C, valid_C, k_position_C):
    o_RH, top_R, total_R = carry
    k_row_C = slot_C * p.num_kv_heads + kv_head
    s_RC = p.score(q_RH, p.load(k_ref, k_row_C, p.head_dim, valid_C))
    s_RC = jnp.where(p.seen(position_R[:, None], k_position_C[None], 0, 0),
                     s_RC, -jnp.inf)
    new_top_R = jnp.maximum(top_R, jnp.max(s_RC, 1))
    p_RC = p.exp2(s_RC, (new_top_R * unit)[:, None])
    shrink_R = p.exp2(top_R - new_top_R, 0.0)
    v_CH = p.load(v_ref, k_row_C, p.v_head_dim, valid_C)
    o_RH = o_RH * shrink_R[:, None] + p.dot(p_RC.astype(v_CH.dtype), v_CH)
    return o_RH, new_top_R, total_R * shrink_R + jnp.sum(p_RC, 1)

  def past(slot_C):
    """Whether there are these slots, and their positions, if they count."""
    valid_C = slot_C < p.num_keys
    position_C = p.load_row(k_positions_ref, slot_C, valid_C)
    counts_C = valid_C & (position_C >= 0) & (position_C < first)
    return valid_C, jnp.where(counts_C, position_C, NOWHERE)

  first_slot = part * per_part * slots
  start, stop = 0, jnp.minimum(pl.cdiv(p.num_keys - first_slot, slots),
                               per_part)
  if per_part > 4:
    slot_P = lax.iota(jnp.int32, padded(per_part * slots))
    _, position_P = past(first_slot + slot_P)
    last = jnp.max(position_R)
    seen_P = (slot_P < per_part * slots) & (position_P <= last)
    if p.options.window is not None:
      seen_P &= first - position_P < p.window
    start = jnp.min(jnp.where(seen_P, slot_P, per_part * slots)) // slots
    stop = jnp.minimum(stop, jnp.max(jnp.where(seen_P, slot_P + slots, 0))
                       // slots)

  def step(i, carry):
    slot_C = first_slot + i * slots + lax.iota(jnp.int32, slots)
    valid_C, k_position_C = past(slot_C)
    return attend(carry, k_ref, v_ref, slot_C, valid_C, k_position_C)

  def own(carry):
    o_RH, top_R, total_R = carry
    if sinks_ref is not None:
      top_R = jnp.maximum(
          p.load_row(sinks_ref, head_R, valid_R) * (LOG2_E / unit),
          gpu_tiles.LOWEST)
      total_R = jnp.where(top_R > gpu_tiles.LOWEST, 1.0, 0.0)
    return attend((o_RH, top_R, total_R), k_own_ref, v_own_ref, own_U,
                  own_valid_U, own_position_U)

  carry = (jnp.zeros((p.tile.rows, padded(p.v_head_dim)), jnp.float32),
           jnp.full(p.tile.rows, gpu_tiles.LOWEST, jnp.float32),
           jnp.zeros(p.tile.rows, jnp.float32))
  carry = lax.cond(part == 0, own, lambda carry: carry, carry)
  o_RH, top_R, total_R = lax.fori_loop(start, stop, step, carry)
  if top_ref is None:
    o_RH *= (1 / jnp.where(total_R == 0, 1.0, total_R))[:, None]
  else:
    q_row_R += part * p.num_queries * p.num_heads
    p.store_row(top_ref, q_row_R, top_R, valid_R)
    p.store_row(total_ref, q_row_R, total_R, valid_R)
  p.store(o_ref, q_row_R, p.v_head_dim, o_RH, valid_R)


def _join_kernel(parts_ref, top_ref, total_ref, o_ref, *, problem: Problem,
                 parts: int):
  """One row of the output: the sum of its parts, weighed by their maxima."""
  p = problem
  rows, row = p.num_queries * p.num_heads, pl.program_id(0)
  part_P = lax.iota(jnp.int32, padded(parts))
  valid_P = part_P < parts
  row_P = part_P * rows + row
  top_P = jnp.where(valid_P, p.load_row(top_ref, row_P, valid_P),
                    gpu_tiles.LOWEST)
  weight_P = p.exp2(top_P - jnp.max(top_P), 0.0)
  total = jnp.sum(weight_P * p.load_row(total_ref, row_P, valid_P))
  o_PH = p.load(parts_ref, row_P, p.v_head_dim, valid_P)
  o_H = jnp.sum(weight_P[:, None] * o_PH, 0) / jnp.where(total == 0, 1.0,
                                                         total)
  column_H = lax.iota(jnp.int32, padded(p.v_head_dim))
  p.store_row(o_ref, row * p.v_head_dim + column_H, o_H.astype(o_ref.dtype),
              column_H < p.v_head_dim)


def forward(q_BTNH, k_BTKH, v_BTKH, k_BSKH, v_BSKH, q_positions_BT,
            k_positions_BS, sinks_N, options: CacheOptions):
  """[B, T, N, the values' head_dim], of q's dtype."""
  p, row_tiles, parts, per_part = _plan(q_BTNH, k_BSKH, v_BSKH, options)
  batch, length, num_heads, _ = q_BTNH.shape
  rows = length * num_heads
  inputs = [x.reshape(batch, -1) for x in (
      q_BTNH, k_BTKH, v_BTKH, k_BSKH, v_BSKH,
      q_positions_BT.astype(jnp.int32), k_positions_BS.astype(jnp.int32))]
  in_specs = [flat_spec(x) for x in inputs]
  if sinks_N is not None:
    sinks_N = sinks_N.astype(jnp.float32)
  sinks_spec = None if sinks_N is None else pl.BlockSpec(
      sinks_N.shape, lambda _, batch: (0,))
  o = vma.shape_like(q_BTNH, (batch, rows * p.v_head_dim))
  outputs = [o, None, None]
  if parts > 1:
    outputs = [vma.shape_like(q_BTNH, (batch, parts * size), jnp.float32)
               for size in (rows * p.v_head_dim, rows, rows)]
  out_specs = [None if x is None else flat_spec(x) for x in outputs]
  found = pl.pallas_call(
      functools.partial(_kernel, problem=p, row_tiles=row_tiles,
                        per_part=per_part),
      out_shape=outputs, grid=(parts * row_tiles * p.num_kv_heads, batch),
      in_specs=[*in_specs, sinks_spec], out_specs=out_specs,
      compiler_params=p.grid_params(), interpret=options.interpret,
      name="cached_attention")(*inputs, sinks_N)
  if parts > 1:
    found = pl.pallas_call(
        functools.partial(_join_kernel, problem=p, parts=parts),
        out_shape=[o], grid=(rows, batch), in_specs=out_specs,
        out_specs=[flat_spec(o)], compiler_params=p.grid_params(),
        interpret=options.interpret, name="cached_attention_join")(*found)
  return found[0].reshape(batch, length, num_heads, p.v_head_dim)
