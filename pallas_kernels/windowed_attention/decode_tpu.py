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
  kept; for that P alone is transposed.
- The new tokens' own keys and values are T more rows of the same matmuls.
- What a query sees comes as bits, 32 slots a word and a word for each lane:
  a shift brings a slot's bit to the sign. 16 bytes a slot, where keys and
  values have 2048.
- Where a sequence has but 64 rows or fewer, several share the 128 lanes: as if
  they were one with more key heads.
- A loop over a step's sequences does three stages at once: values of some, the
  softmax of the next, the scores of those after, which wait for one another
  only from one turn to the next.

A cache of more slots than a step takes has a running softmax. What it has
summed is kept normalised, so that a step needs one factor a row for it. Blocks
past the last slot that a row has filled are neither loaded nor computed.
"""
import dataclasses
import functools
import math
import typing

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import vma
from pallas_kernels.windowed_attention import reference

LOG2E = math.log2(math.e)
LOWEST = -1e30  # a finite maximum, for a query that sees nothing
WORD = 32
LANES = 128
VMEM_LIMIT = 36 << 20


@dataclasses.dataclass(frozen=True)
class Blocks:
  """What one step of the grid takes.

  sequences: rows of the batch. slots: of their caches; all of them in one step
  if they have no more. together: how many registers' rows each stage takes at
  a time. skip: leaves out blocks past what the rows have filled, which libtpu's
  static profiler cannot follow.
  """
  sequences: int
  slots: int
  together: int = 2
  skip: bool = True


class _Plan(typing.NamedTuple):
  """What a kernel is compiled for.

  block: slots of a step. slots: of the cache, if the last block is not full.
  columns: how many numbers of a cached value are multiplied. shared: the
  values are the keys' first. pack: sequences that share a register's lanes.
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
  pack: int
  together: int
  skip: bool
  interpreted: bool


def _matmul(plan: _Plan, a, b):
  if plan.interpreted:
    # The products are the same, and a CPU knows not all of bfloat16's.
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jnp.dot(a, b, precision=precision,
                 preferred_element_type=jnp.float32)


def _scores(plan: _Plan, q_HR, k_own_TI, k_SI):
  """[S + T, R], in units of log 2."""
  rows, heads = q_HR.shape[1], plan.pack * plan.num_kv_heads
  head = lax.broadcasted_iota(jnp.int32, (1, rows), 1) // (rows // heads)
  q_IR = jnp.concatenate([jnp.where(head == h, q_HR, jnp.zeros_like(q_HR))
                          for h in range(heads)], 0)
  s = _matmul(plan, jnp.concatenate([k_SI, k_own_TI], 0), q_IR)
  if plan.soft_cap is None:
    return s * (plan.scale * LOG2E)
  return jnp.tanh(s * (plan.scale / plan.soft_cap)) * (plan.soft_cap * LOG2E)


def _softmax(s, words, top, total):
  """Probabilities [S + T, R], what becomes of those before, and the maximum
  and the sum [1, R] after `top` and `total`."""
  slots, rows = s.shape
  below = 7 - lax.broadcasted_iota(jnp.int32, (8, rows), 0)
  bits = []
  for i in range(0, slots, 8):
    word, first = words[i // WORD:i // WORD + 1], i % WORD
    bits.append((word << (WORD - 8 - first) << below)[:slots - i])
  seen = jnp.concatenate(bits, 0) < 0
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
  o_RI = _matmul(plan, p_RS.astype(v_SI.dtype),
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
  o_ref, s_ref, p_ref, *state = refs[5 if plan.shared else 7:]
  step, together = pl.program_id(1), plan.together

  def rows_of(pack):
    return [pack * plan.pack + j for j in range(plan.pack)]

  def scores(pack, u):
    k_own, k = (jnp.concatenate([ref[b] for b in rows_of(pack)], 1)
                for ref in (k_own_ref, k_ref))
    s_ref[u] = _scores(plan, q_ref[pack], k_own, k)

  def softmax(pack, u):
    words = seen_ref[0, pack]
    if not state:
      p, *_ = _softmax(s_ref[u], words, sinks_ref[0:1], sinks_ref[1:2])
      p_ref[u] = p.T.astype(p_ref.dtype)
      return
    top_ref, total_ref, _, kept_ref = state
    p, kept, top_ref[pack], total_ref[pack] = _softmax(
        s_ref[u], words, top_ref[pack], total_ref[pack])
    # What is kept joins the transpose, to be a column.
    p_RS = jnp.concatenate([p, kept], 0).T
    p_ref[u] = p_RS[:, :-1].astype(p_ref.dtype)
    kept_ref[u] = p_RS[:, -1:]

  def values(pack, u):
    # All columns, or of a single head those that are values.
    at = slice(plan.v_head_dim if plan.num_kv_heads == 1 else None)
    size = p_ref.shape[1] // plan.pack
    for j, b in enumerate(rows_of(pack)):
      own = slice(j * size, (j + 1) * size)
      o = _values(plan, p_ref[u, own], v_own_ref[b, :, at], v_ref[b, :, at],
                  step * plan.block)
      if state:
        _, _, mean_ref, kept_ref = state
        mean_ref[b] = kept_ref[u, own] * mean_ref[b] + o
      else:
        o_ref[b] = o.astype(o_ref.dtype)

  def stages(i, *wanted):
    # The last first: each reads what that before it will write.
    for behind, stage in ((2, values), (1, softmax), (0, scores)):
      if stage in wanted:
        for u in range(together):
          stage((i - behind) * together + u, u)

  def attend():
    count = plan.sequences // plan.pack // together
    stages(0, scores)
    if count > 1:
      stages(1, scores, softmax)
      lax.fori_loop(2, count, lambda i, _: stages(i, scores, softmax, values),
                    None)
      stages(count, softmax, values)
    else:
      stages(1, softmax)
    stages(count + 1, values)

  if not state:
    return attend()

  @pl.when(step == 0)
  def _start():
    for ref, start in zip(state[:3], (sinks_ref[0:1], sinks_ref[1:2], 0.)):
      ref[...] = jnp.broadcast_to(start, ref.shape)

  if plan.skip:
    pl.when(step < used_ref[pl.program_id(0)])(attend)
  else:
    attend()

  @pl.when(step == plan.steps - 1)
  def _finish():
    o_ref[...] = state[2][...].astype(o_ref.dtype)


def _words(plan: _Plan, seen_BTS, num_own: int, group: int):
  """Which of a step's slots and own keys each query sees, as the bits of
  [steps, packs, words, rows of a pack]."""
  block, steps = plan.block, plan.steps
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
  words_PpTSJ = lax.bitcast_convert_type(words_BTSJ, jnp.int32).reshape(
      -1, plan.pack, *words_BTSJ.shape[1:])
  words_SPJpT = words_PpTSJ.transpose(3, 0, 4, 1, 2)
  words = jnp.broadcast_to(
      words_SPJpT[..., None, :, None],
      (*words_SPJpT.shape[:4], plan.num_kv_heads, num_own, group))
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
  rows = q_BTNH.shape[1] * q_BTNH.shape[2]
  pack = _pack(rows, math.gcd(batch, blocks.sequences),
               num_kv_heads * head_dim)
  together = math.gcd(blocks.sequences // pack, blocks.together)
  return _Plan(
      num_kv_heads, v_head_dim,
      head_dim if shared and num_kv_heads > 1 else v_head_dim,
      blocks.sequences, block, steps, slots if slots % block else None, shared,
      options.scale, options.soft_cap, pack, together,
      blocks.skip and steps > 1, bool(options.interpret))


def _pack(rows: int, sequences: int, width: int) -> int:
  """How many sequences' rows share the lanes of a register."""
  pack = 1
  while 2 * pack * rows <= LANES and sequences % (2 * pack) == 0 and (
      width % LANES == 0):
    pack *= 2
  return pack


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
  words = _words(plan, jnp.concatenate([seen_BTS, reference.visible_of_own(
      q_positions_BT, window)], -1), length, group)
  sinks = jnp.broadcast_to(jnp.array([[LOWEST], [0.]], jnp.float32), (2, rows))
  if sinks_N is not None:
    sinks_KG = sinks_N.astype(jnp.float32).reshape(num_kv_heads, 1, group)
    sinks_R = jnp.broadcast_to(LOG2E * sinks_KG, (num_kv_heads, length, group))
    sinks = jnp.stack([sinks_R.reshape(-1), jnp.ones(rows)])
  q_BKTGH = reference.grouped(q_BTNH, num_kv_heads).swapaxes(2, 3)
  q_PHR = q_BKTGH.reshape(batch // plan.pack, -1, head_dim).swapaxes(1, 2)
  own, cached = [_flat(k_BTKH)], [_flat(k_BSKH)]
  if not plan.shared:
    own.append(_flat(v_BTKH))
    cached.append(_flat(v_BSKH))
  return (*used, words, jnp.tile(sinks, (1, plan.pack)), q_PHR,
          *(x for pair in zip(own, cached) for x in pair))


def call(plan: _Plan, interpret, *operands):
  """The kernel alone: [B, R, v_head_dim]."""
  used, operands = operands[:plan.skip], operands[plan.skip:]
  words, sinks, q_PHR, *keys_and_values = operands
  batch, size = keys_and_values[0].shape[0], plan.sequences
  packs, packed_rows = size // plan.pack, q_PHR.shape[2]
  rows = packed_rows // plan.pack

  def at(i, s, *used):
    return jnp.minimum(s, used[0][i] - 1) if used else s

  def row(x, size=size):
    return pl.BlockSpec((size, *x.shape[1:]), lambda i, s, *_: (i, 0, 0))

  def cache(x):
    return pl.BlockSpec((size, plan.block, x.shape[2]),
                        lambda i, s, *used: (i, at(i, s, *used), 0))

  in_specs = [
      pl.BlockSpec((1, packs, *words.shape[2:]),
                   lambda i, s, *used: (at(i, s, *used), i, 0, 0)),
      pl.BlockSpec(sinks.shape, lambda *_: (0, 0)), row(q_PHR, packs),
      *(cache(x) if i % 2 else row(x) for i, x in enumerate(keys_and_values))]
  out = vma.shape_like(q_PHR, (batch, rows, plan.v_head_dim))
  keys = plan.block + keys_and_values[0].shape[1]
  state = [pltpu.VMEM((plan.together, keys, packed_rows), jnp.float32),
           pltpu.VMEM((plan.together, packed_rows, keys), q_PHR.dtype)]
  if plan.steps > 1:
    state += [*[pltpu.VMEM((packs, 1, packed_rows), jnp.float32)] * 2,
              pltpu.VMEM((size, rows, plan.v_head_dim), jnp.float32),
              pltpu.VMEM((plan.together, packed_rows, 1), jnp.float32)]
  return pl.pallas_call(
      functools.partial(_kernel, plan), out_shape=out,
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=len(used), scratch_shapes=state,
          grid=(pl.cdiv(batch, size), plan.steps), in_specs=in_specs,
          out_specs=row(out)),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "arbitrary"),
          vmem_limit_bytes=VMEM_LIMIT),
      cost_estimate=pl.CostEstimate(
          flops=(2 * batch * rows * keys * plan.steps
                 * (q_PHR.shape[1] + plan.v_head_dim)),
          transcendentals=batch * rows * keys * plan.steps,
          bytes_accessed=sum(x.nbytes for x in operands)),
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
  if blocks.sequences < 1 or blocks.slots < 1 or blocks.together < 1:
    raise ValueError(f"{blocks}: expected at least one of each")
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
