"""What the GPU kernels share: which keys a tile of queries sees, and how tiles
are loaded, masked and scored.

A tile of queries holds `rows` rows: `pack` adjacent query heads of one kv head
for each of rows / pack tokens, so that one load of keys serves them all. In
[B, T, N, H] these heads are neighbours, so a row's token and head are
arithmetic on the row's number, and one sequence is addressed as flat memory.
"""
import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import numpy as np

from pallas_kernels.windowed_attention.options import Options

LOG2_E = math.log2(math.e)
# Below every score and finite, so that no row's maximum minus itself is NaN.
LOWEST = -1e30


def padded(dim: int) -> int:
  """Triton's tiles are powers of two; its matmuls at least 16 deep."""
  return max(16, 1 << (dim - 1).bit_length())


def divided(i, by: int):
  """Quotient and remainder of what is not negative: one operation each."""
  by = np.int32(by)
  return lax.div(i, by), lax.rem(i, by)


@dataclasses.dataclass(frozen=True)
class Tile:
  """The tile of a program: query rows, keys, warps, and loads in flight.

  Raises:
    ValueError: Triton's tiles are powers of two, and its matmuls 16 wide.
  """
  rows: int
  keys: int
  warps: int
  stages: int

  def __post_init__(self):
    for name, least, most in (("rows", 16, 256), ("keys", 16, 256),
                              ("warps", 1, 16)):
      value = getattr(self, name)
      if not least <= value <= most or value & (value - 1):
        raise ValueError(f"{name}={value}: use a power of two from {least} to "
                         f"{most}")
    if self.stages < 1:
      raise ValueError(f"stages={self.stages}: use at least one")


@dataclasses.dataclass(frozen=True)
class Problem:
  """Sizes and options: all that is known when a kernel is compiled."""
  num_queries: int
  num_keys: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  v_head_dim: int
  dtype: jnp.dtype
  segmented: bool
  options: Options
  tile: Tile

  @property
  def group(self) -> int:
    return self.num_heads // self.num_kv_heads

  @property
  def pack(self) -> int:
    """Query heads in a tile: the largest power of two that divides them."""
    return min(self.group & -self.group, self.tile.rows)

  @property
  def tokens(self) -> int:
    return self.tile.rows // self.pack

  @property
  def window(self) -> int:
    window = self.options.window
    return self.num_keys if window is None else window

  @property
  def score_unit(self) -> float:
    """exp(score) is exp2(score_unit * raw), raw as `score` gives it."""
    if self.options.soft_cap is not None:
      return abs(self.options.soft_cap) * LOG2_E
    return self.options.scale * LOG2_E if self.options.scale > 0 else LOG2_E

  def grid_params(self):
    return plgpu.CompilerParams(num_warps=self.tile.warps,
                                num_stages=self.tile.stages)

  def score(self, a, b):
    """a b^T in units of `score_unit`: exp2 of it costs one multiply-add."""
    s = self.dot(a, b.T)
    scale, cap = self.options.scale, self.options.soft_cap
    if cap is not None:
      return jnp.tanh(s * (scale / abs(cap)))
    return s if scale > 0 else s * scale

  def dot(self, a, b):
    """In float32; of float32 not in TF32, unless jax is told to."""
    precision = None
    if (self.dtype == jnp.float32
        and jax.config.jax_default_matmul_precision is None):
      precision = lax.Precision.HIGHEST
    return jnp.dot(a, b, precision=precision,
                   preferred_element_type=jnp.float32)

  def seen(self, q_position, k_position, q_segment, k_segment):
    """Of positions and segments that broadcast against each other."""
    distance = q_position - k_position
    seen = distance >= 0
    if self.options.window is not None:
      seen &= distance < self.window
    if self.segmented:
      seen &= q_segment == k_segment
    return seen

  def load(self, ref, row_R, dim, valid_R=None):
    """Rows of a flat [rows, dim]; zero where not valid."""
    offset_RH, mask_RH = _offsets(row_R, dim, valid_R)
    return plgpu.load(ref.at[offset_RH], mask=mask_RH,
                      other=None if mask_RH is None else 0.0)

  def store(self, ref, row_R, dim, value_RH, valid_R=None):
    offset_RH, mask_RH = _offsets(row_R, dim, valid_R)
    if mask_RH is not None and self.options.interpret:
      # The interpreter rewrites what is masked, here past the end.
      offset_RH = jnp.where(mask_RH, offset_RH, ref.shape[0])
    plgpu.store(ref.at[offset_RH], value_RH.astype(ref.dtype), mask=mask_RH)

  def load_row(self, ref, offset_R, valid_R=None):
    return plgpu.load(ref.at[offset_R], mask=valid_R,
                      other=None if valid_R is None else 0)

  def store_row(self, ref, offset_R, value_R, valid_R):
    if self.options.interpret:
      offset_R = jnp.where(valid_R, offset_R, ref.shape[0])
    plgpu.store(ref.at[offset_R], value_R, mask=valid_R)

  def first_row(self):
    """First token and head of this program's tile of queries, and its kv head.

    The last tokens come first: without a window they have most to do.
    """
    i, head_tile = divided(pl.program_id(0), self.num_heads // self.pack)
    first_head = head_tile * self.pack
    first_token = (pl.cdiv(self.num_queries, self.tokens) - 1 - i) * self.tokens
    return first_token, first_head, divided(first_head, self.group)[0]

  def rows(self, first_token, first_head):
    """Token and head of each row, and whether there is such a token."""
    row_R = lax.iota(jnp.int32, self.tile.rows)
    shift = self.pack.bit_length() - 1
    token_R = first_token + lax.shift_right_logical(row_R, shift)
    return (token_R, first_head + (row_R & (self.pack - 1)),
            token_R < self.num_queries)

  def key_blocks(self, first_token):
    """Of the queries from `first_token` on: their first key, how many blocks
    of keys they see, and from and to which block no mask is needed."""
    keys = self.tile.keys
    first_query = first_token + self.options.q_offset
    end = jnp.minimum(first_query + self.tokens,
                      self.options.q_offset + self.num_queries)
    # Where the first query's window starts, and where the last one's does.
    first_key = jnp.maximum(first_query - self.window + 1, 0)
    seen_by_all = jnp.maximum(first_query + self.tokens - self.window, 0)
    if self.options.window is None:
      first_key = seen_by_all = 0
    return (first_key, pl.cdiv(end - first_key, keys),
            pl.cdiv(seen_by_all - first_key, keys),
            (first_query + 1 - first_key) // keys)

  def query_blocks(self, first_key):
    """Of the keys from `first_key` on: the first token that sees one, how many
    blocks of tokens do, and from and to which block no mask is needed."""
    # As tokens: the first and the last key, and past the last that see them.
    first = first_key - self.options.q_offset
    last = first + self.tile.keys - 1
    end = jnp.minimum(last + self.window, self.num_queries)
    seen_by_first = jnp.minimum(first + self.window, self.num_queries)
    first_token = jnp.maximum(first, 0)
    blocks = lambda count: jnp.maximum(count, 0) // self.tokens
    return (first_token, blocks(end - first_token + self.tokens - 1),
            blocks(last - first_token + self.tokens - 1),
            blocks(seen_by_first - first_token))

  def masked(self, x, fill, inside, seen):
    """`x` where `seen()`, else `fill`; compares only on the band's edges."""
    mask = lambda x: jnp.where(seen(), x, fill)
    return mask(x) if self.segmented else lax.cond(inside, lambda x: x, mask, x)

  def exp2(self, s, offset):
    """exp2(score_unit * s - offset) of what broadcasts against s.

    Triton has no multiply-add of its own and its exp2 spends three more
    operations on results below 2^-126, so that this is a quarter of all that
    the loops do; the interpreter knows no assembly.
    """
    if self.options.interpret:
      return jnp.exp2(s * self.score_unit - offset)
    unit = np.float32(self.score_unit).view(np.uint32)
    return plgpu.elementwise_inline_asm(
        "{ .reg .f32 x; neg.f32 x, $2; fma.rn.f32 x, $1, 0f%08X, x; "
        "ex2.approx.ftz.f32 $0, x; }" % unit,
        args=[s, jnp.broadcast_to(offset, s.shape)], constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(s.shape, s.dtype)])[0]


def _offsets(row_R, dim, valid_R):
  column_H = lax.iota(jnp.int32, padded(dim))
  offset_RH = row_R[:, None] * dim + column_H[None]
  mask_RH = None if valid_R is None else valid_R[:, None]
  if padded(dim) != dim:
    inside_RH = (column_H < dim)[None]
    mask_RH = inside_RH if mask_RH is None else mask_RH & inside_RH
  return offset_RH, mask_RH


def flat_spec(x):
  """One sequence of x [B, size]."""
  return pl.BlockSpec((None, x.shape[1]), lambda _, batch: (batch, 0))
