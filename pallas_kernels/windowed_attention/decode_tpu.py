"""Attention over a cache on a TPU: one read of the cache, at its speed.

Decoding is bound by the cache's bytes. gpt-oss's ring (K = 8, H = 64, W = 128,
bfloat16) is 262 KB a sequence: 480 cycles of a v5e's memory, 280 of a v6e's,
156 of one core's of a 7x. In that time all else must hide, so:

- The cache lies as [B, S, K * H]: 64 numbers of a head alone would be padded
  to 128, and a new token is one row to write.
- One matmul takes all heads. The queries stand block-diagonally in
  [K * H, R], R = K T G, with zeros where row and column belong to different
  key heads. A matmul per head would use 64 of 128 or 256 rows of the MXU.
- Scores are transposed, [slots, R]: keys stream through the MXU as they lie,
  the queries are its weights, and the softmax runs down the sublanes. So
  maxima and sums are plain vector operations and give one row [1, R], of one
  register, where lanes would have to be reduced by the cross-lane unit and
  give a column for each 8 queries. Of P @ V the blocks on the diagonal are
  kept; for that P alone is transposed, 17 registers a sequence.
- The new tokens' own keys and values are T more rows of the same matmuls.
- What a query sees comes as bits, 32 slots a word and a word for each lane:
  a shift brings a slot's bit to the sign. 16 bytes a slot, where keys and
  values have 2048.
- Several sequences a step, their three stages interleaved: the scores of one
  lead the softmax of another, and that the values of a third.

A cache of more slots than a step takes has a running softmax. What it has
summed is kept normalised, so that a step needs one factor a row for it. Blocks
past the last slot that a row has filled are neither loaded nor computed.
"""
import dataclasses
import functools
import math
import typing

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.windowed_attention import reference

LOG2E = math.log2(math.e)
LOWEST = -1e30  # a finite maximum, for a query that sees nothing
WORD = 32
VMEM_LIMIT = 36 << 20


@dataclasses.dataclass(frozen=True)
class Blocks:
  """What one step of the grid takes.

  sequences: rows of the batch. slots: of their caches; all of them in one step
  if they have no more. lead: of how many sequences the scores are computed
  before the first softmax, and the softmax before the first values.
  skip: leaves out blocks past what the rows have filled, which libtpu's static
  profiler cannot follow.
  """
  sequences: int
  slots: int
  lead: int = 2
  skip: bool = True


class _Plan(typing.NamedTuple):
  """What a kernel is compiled for.

  block: slots of a step. slots: of the cache, if the last block is not full.
  columns: how many numbers
  of a cached value are multiplied. shared: the values are the keys' first.
  """
  num_kv_heads: int
  v_head_dim: int
  columns: int
  sequences: int
  block: int
  steps: int
  slots: int | None
  shared: bool
  scale: float
  soft_cap: float | None
  lead: int
  skip: bool


def _matmul(a, b):
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jnp.dot(a, b, precision=precision,
                 preferred_element_type=jnp.float32)


def _scores(plan: _Plan, q_HR, k_own_TI, k_SI):
  """[S + T, R], in units of log 2."""
  rows = q_HR.shape[1]
  head = lax.broadcasted_iota(jnp.int32, (1, rows), 1) // (
      rows // plan.num_kv_heads)
  q_IR = jnp.concatenate([jnp.where(head == h, q_HR, jnp.zeros_like(q_HR))
                          for h in range(plan.num_kv_heads)], 0)
  s = _matmul(jnp.concatenate([k_SI, k_own_TI], 0), q_IR)
  if plan.soft_cap is None:
    return s * (plan.scale * LOG2E)
  return jnp.tanh(s * (plan.scale / plan.soft_cap)) * (plan.soft_cap * LOG2E)


def _softmax(s, words, top, total):
  """Probabilities [S + T, R], what becomes of those before, and the maximum
  and the sum [1, R] after `top` and `total`."""
  slots, rows = s.shape
  shift = WORD - 1 - lax.broadcasted_iota(jnp.int32, (WORD, rows), 0)
  seen = jnp.concatenate([
      jnp.broadcast_to(words[i:i + 1], (min(WORD, slots - WORD * i), rows))
      << shift[:slots - WORD * i] for i in range(-(-slots // WORD))], 0) < 0
  s = jnp.where(seen, s, -jnp.inf)
  new_top = jnp.maximum(top, jnp.max(s, 0, keepdims=True))
  p = jnp.exp2(s - new_top)
  kept = total * jnp.exp2(top - new_top)
  total = kept + jnp.sum(p, 0, keepdims=True)
  factor = 1 / jnp.where(total == 0, 1, total)
  return p * factor, kept * factor, new_top, total


def _values(plan: _Plan, p_RS, v_own_TI, v_SI, first_slot):
  """[R, v_head_dim]: of each row the columns of its own key head."""
  if plan.slots is not None:
    slot = first_slot + lax.broadcasted_iota(jnp.int32, (v_SI.shape[0], 1), 0)
    v_SI = jnp.where(slot < plan.slots, v_SI, jnp.zeros_like(v_SI))
  o_RI = _matmul(p_RS.astype(v_SI.dtype),
                 jnp.concatenate([v_SI, v_own_TI], 0))
  size = o_RI.shape[0] // plan.num_kv_heads
  return jnp.concatenate([
      o_RI[h * size:(h + 1) * size,
           h * plan.columns:h * plan.columns + plan.v_head_dim]
      for h in range(plan.num_kv_heads)], 0)


def _kernel(plan: _Plan, *refs):
  """Grid (sequences, slots)."""
  refs = list(refs)
  used_ref = refs.pop(0) if plan.skip else None
  seen_ref, sinks_ref, q_ref, k_own_ref, k_ref = refs[:5]
  v_own_ref, v_ref = refs[3:5] if plan.shared else refs[5:7]
  o_ref, *state = refs[5 if plan.shared else 7:]
  step = pl.program_id(1)

  def scores(b):
    return _scores(plan, q_ref[b], k_own_ref[b], k_ref[b])

  def softmax(b, s):
    if not state:
      top, total = sinks_ref[0:1], sinks_ref[1:2]
      p, *_ = _softmax(s, seen_ref[0, b], top, total)
      return p.T, None
    top_ref, total_ref, _ = state
    p, kept, top_ref[b], total_ref[b] = _softmax(
        s, seen_ref[0, b], top_ref[b], total_ref[b])
    # What is kept joins the transpose, to be a column.
    p = jnp.concatenate([p, kept], 0).T
    return p[:, :-1], p[:, -1:]

  def values(b, p, kept):
    at = slice(None)
    if plan.num_kv_heads == 1:
      at = slice(0, plan.v_head_dim)
    o = _values(plan, p, v_own_ref[b, :, at], v_ref[b, :, at], step * plan.block)
    if state:
      mean_ref = state[2]
      mean_ref[b] = kept * mean_ref[b] + o
    else:
      o_ref[b] = o.astype(o_ref.dtype)

  def attend():
    lead, scored, weighed = plan.lead, {}, {}
    for n in range(plan.sequences + 2 * lead):
      if n < plan.sequences:
        scored[n] = scores(n)
      if 0 <= n - lead < plan.sequences:
        weighed[n - lead] = softmax(n - lead, scored.pop(n - lead))
      if n >= 2 * lead:
        values(n - 2 * lead, *weighed.pop(n - 2 * lead))

  if not state:
    return attend()

  @pl.when(step == 0)
  def _start():
    for ref, start in zip(state, (sinks_ref[0:1], sinks_ref[1:2], 0.)):
      ref[...] = jnp.broadcast_to(start, ref.shape)

  if plan.skip:
    pl.when(step < used_ref[pl.program_id(0)])(attend)
  else:
    attend()

  @pl.when(step == plan.steps - 1)
  def _finish():
    o_ref[...] = state[2][...].astype(o_ref.dtype)


def _words(seen_BTS, num_own: int, block: int, steps: int, num_kv_heads: int,
           group: int):
  """Which of a step's slots and own keys each query sees, as the bits of
  [steps, B, words, R]."""
  slots = seen_BTS.shape[2] - num_own
  cached = jnp.pad(seen_BTS[..., :slots],
                   ((0, 0), (0, 0), (0, steps * block - slots)))
  cached = cached.reshape(*cached.shape[:2], steps, block)
  own = jnp.pad(seen_BTS[:, :, None, slots:],
                ((0, 0), (0, 0), (0, steps - 1), (0, 0)))
  bits = jnp.concatenate([cached, own], -1).astype(jnp.uint32)
  # Of words 8 make a tile.
  bits = jnp.pad(bits, ((0, 0),) * 3 + ((0, -bits.shape[-1] % (8 * WORD)),))
  bits = bits.reshape(*bits.shape[:3], -1, WORD)
  words_BTSJ = jnp.sum(bits << jnp.arange(WORD, dtype=jnp.uint32), -1,
                       dtype=jnp.uint32)
  words_SBJT = lax.bitcast_convert_type(words_BTSJ, jnp.int32).transpose(
      2, 0, 3, 1)
  words = jnp.broadcast_to(
      words_SBJT[..., None, :, None],
      (*words_SBJT.shape[:3], num_kv_heads, num_own, group))
  return words.reshape(*words.shape[:3], -1)


def _used_blocks(seen_BTS, block: int, sequences: int):
  """How many blocks of slots each group of sequences needs, at least one."""
  slot = jnp.arange(seen_BTS.shape[2]) + 1
  last_B = jnp.max(jnp.where(jnp.any(seen_BTS, 1), slot, 1), -1)
  last_B = jnp.pad(last_B, (0, -len(last_B) % sequences), constant_values=1)
  return (jnp.max(last_B.reshape(-1, sequences), 1) + block - 1) // block


def _flat(x_BSKH):
  return x_BSKH.reshape(*x_BSKH.shape[:2], -1)


def forward(q_BTNH, k_BTKH, v_BTKH, k_BSKH, v_BSKH, q_positions_BT,
            k_positions_BS, sinks_N, options):
  """[B, T, N, the values' head_dim], of q's dtype."""
  batch, length, num_heads, _ = q_BTNH.shape
  plan = make_plan(q_BTNH, k_BSKH, v_BSKH, options)
  o_BRH = call(plan, options.interpret, *prepare(
      plan, q_BTNH, k_BTKH, v_BTKH, k_BSKH, v_BSKH, q_positions_BT,
      k_positions_BS, sinks_N, options.window))
  o_BKTGH = o_BRH.reshape(batch, plan.num_kv_heads, length, -1,
                          plan.v_head_dim)
  return reference.ungrouped(o_BKTGH.swapaxes(2, 3))


def make_plan(q_BTNH, k_BSKH, v_BSKH, options) -> _Plan:
  batch, slots, num_kv_heads, head_dim = k_BSKH.shape
  shared = v_BSKH is None
  v_head_dim = options.v_head_dim if shared else v_BSKH.shape[3]
  blocks = _blocks(k_BSKH, v_BSKH, options)
  block = min(blocks.slots, slots)
  steps = -(-slots // block)
  return _Plan(
      num_kv_heads, v_head_dim,
      head_dim if shared and num_kv_heads > 1 else v_head_dim,
      blocks.sequences, block, steps, slots if slots % block else None, shared,
      options.scale, options.soft_cap, blocks.lead, blocks.skip and steps > 1)


def prepare(plan: _Plan, q_BTNH, k_BTKH, v_BTKH, k_BSKH, v_BSKH,
            q_positions_BT, k_positions_BS, sinks_N, window):
  """The operands of `call`. Nothing of the caches is moved."""
  batch, length, num_heads, head_dim = q_BTNH.shape
  num_kv_heads, block = plan.num_kv_heads, plan.block
  group, rows = num_heads // num_kv_heads, num_heads * length
  seen_BTS = reference.visible_in_cache(q_positions_BT, k_positions_BS,
                                        window)
  used = ()
  if plan.skip:
    used = (_used_blocks(seen_BTS, block, plan.sequences),)
  words = _words(
      jnp.concatenate([seen_BTS, reference.visible_of_own(
          q_positions_BT, window)], -1),
      length, block, plan.steps, num_kv_heads, group)
  sinks = jnp.broadcast_to(jnp.array([[LOWEST], [0.]], jnp.float32), (2, rows))
  if sinks_N is not None:
    sinks_KG = sinks_N.astype(jnp.float32).reshape(num_kv_heads, 1, group)
    sinks_R = jnp.broadcast_to(LOG2E * sinks_KG, (num_kv_heads, length, group))
    sinks = jnp.stack([sinks_R.reshape(-1), jnp.ones(rows)])
  q_BKTGH = reference.grouped(q_BTNH, num_kv_heads).swapaxes(2, 3)
  q_BHR = q_BKTGH.reshape(batch, rows, head_dim).swapaxes(1, 2)
  own, cached = [_flat(k_BTKH)], [_flat(k_BSKH)]
  if not plan.shared:
    own.append(_flat(v_BTKH))
    cached.append(_flat(v_BSKH))
  return (*used, words, sinks, q_BHR,
          *(x for pair in zip(own, cached) for x in pair))


def call(plan: _Plan, interpret, *operands):
  """The kernel alone: [B, R, v_head_dim]."""
  used, operands = operands[:plan.skip], operands[plan.skip:]
  words, sinks, q_BHR, *keys_and_values = operands
  (batch, _, rows), size = q_BHR.shape, plan.sequences

  def at(i, s, *used):
    return jnp.minimum(s, used[0][i] - 1) if used else s

  def row(x):
    return pl.BlockSpec((size, *x.shape[1:]), lambda i, s, *_: (i, 0, 0))

  def cache(x):
    return pl.BlockSpec((size, plan.block, x.shape[2]),
                        lambda i, s, *used: (i, at(i, s, *used), 0))

  in_specs = [
      pl.BlockSpec((1, size, *words.shape[2:]),
                   lambda i, s, *used: (at(i, s, *used), i, 0, 0)),
      pl.BlockSpec(sinks.shape, lambda *_: (0, 0)), row(q_BHR),
      *(cache(x) if i % 2 else row(x) for i, x in enumerate(keys_and_values))]
  out = jax.ShapeDtypeStruct((batch, rows, plan.v_head_dim), q_BHR.dtype)
  state = []
  if plan.steps > 1:
    state = [pltpu.VMEM((size, 1, rows), jnp.float32)] * 2 + [
        pltpu.VMEM((size, rows, plan.v_head_dim), jnp.float32)]
  return pl.pallas_call(
      functools.partial(_kernel, plan), out_shape=out,
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=len(used), scratch_shapes=state,
          grid=(pl.cdiv(batch, size), plan.steps), in_specs=in_specs,
          out_specs=row(out)),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "arbitrary"),
          vmem_limit_bytes=VMEM_LIMIT),
      interpret=interpret, name="cached_attention")(*used, *operands)


def _blocks(k_BSKH, v_BSKH, options) -> Blocks:
  """Those given, or such that two of each block take a third of VMEM_LIMIT.

  A ring is taken whole, up to 8 sequences at once; longer caches in steps.
  """
  if options.blocks is not None:
    return _checked(options.blocks, k_BSKH.shape[1])
  batch, slots, num_kv_heads, head_dim = k_BSKH.shape
  width = head_dim if v_BSKH is None else head_dim + v_BSKH.shape[3]
  slot_bytes = 2 * num_kv_heads * width * k_BSKH.dtype.itemsize
  fitting = VMEM_LIMIT // 3 // slot_bytes
  if slots > fitting:
    slots = max(128, fitting // 128 * 128)
  return Blocks(max(1, min(8, batch, fitting // slots)), slots)


def _checked(blocks, slots: int) -> Blocks:
  if not isinstance(blocks, Blocks):
    raise ValueError(f"blocks={blocks!r}: expected decode_tpu.Blocks")
  if blocks.sequences < 1 or blocks.slots < 1 or blocks.lead < 0:
    raise ValueError(f"{blocks}: expected at least one sequence and slot, and "
                     "no negative lead")
  if blocks.slots < slots and blocks.slots % WORD:
    raise ValueError(f"slots={blocks.slots}: of a cache of {slots} slots "
                     f"expected a multiple of {WORD}, or all")
  return blocks


def unsupported(q_BTNH, k_BTKH, v_BTKH, k_BSKH, v_BSKH, q_positions_BT,
                k_positions_BS, options) -> str | None:
  """Why not, or None."""
  dtypes = {x.dtype for x in (q_BTNH, k_BTKH, v_BTKH, k_BSKH, v_BSKH)
            if x is not None}
  if len(dtypes) > 1 or not dtypes <= {jnp.dtype("float32"),
                                       jnp.dtype("bfloat16")}:
    return (f"{sorted(map(str, dtypes))}: cast queries, keys and values to "
            "one of bfloat16 and float32")
  return None
