"""How tiles of each format are read and multiplied, inside Triton kernels.

A `Product` multiplies a tile of rows x by a tile of one expert's columns along
a contraction; it says how x is laid out for it, and reads every format as it
is published. Weights whose contraction is contiguous (what is quantized, [out,
in], going forward) are multiplied from the left, (w x^T): the tensor cores of
Hopper take their left operand from registers, where it was dequantized, so
that it never passes through shared memory.

MXFP4 is read as 32-bit words of eight values. Two shifts and two logical
operations place value j and value j + 4 of a word as two packed bfloat16 with
the e2m1 bits at the border of exponent and mantissa: 2^-126 times the value,
0.5 being subnormal. One packed multiplication by 2^126 normalises both and one
by their E8M0 scale finishes, both exact: 2.9 instructions a weight, where one
weight at a time takes 7. Packed halves are neighbours in a tensor core's left
operand, if each block of 32 inputs is taken in the order j, word, half. So x
is given in this order, and no weight moves between threads.

Everything but MXFP4's results below 2^-126 and infinities is exact in
bfloat16, so that bfloat16 rows suffer no rounding but that of the float32 sum.
Rows of more bits are cut into bfloat16 parts (float32 into three, float16 into
two), which makes their products with quantized weights exact as well. float32
rows and arrays are multiplied in full float32 (not TF32).
"""
import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.quant import FP8, MXFP4, Int8
from pallas_kernels.quant.fp8 import BLOCK as FP8_BLOCK
from pallas_kernels.quant.mxfp4 import BLOCK

NT = (((1,), (1,)), ((), ()))  # a b^T
NN = (((1,), (0,)), ((), ()))
TN = (((0,), (0,)), ((), ()))


def load(ref, *index):
  """A tile: `index` has for each axis a number, or (start, size) or (start,
  size, end). What is past `end`, or the axis, is zero and is not read."""
  tiles = [(axis, *i) for axis, i in enumerate(index) if isinstance(i, tuple)]
  mask = None
  for n, (axis, start, size, *end) in enumerate(tiles):
    if end or ref.shape[axis] % size:
      position = lax.broadcasted_iota(
          jnp.int32, [1] * n + [size] + [1] * (len(tiles) - n - 1), n)
      inside = start + position < (end[0] if end else ref.shape[axis])
      mask = inside if mask is None else mask & inside
  at = tuple(pl.ds(*i[:2]) if isinstance(i, tuple) else jnp.int32(i)
             for i in index)
  if mask is None:
    return plt.load(ref.at[at])
  mask = jnp.broadcast_to(mask, [size for _, _, size, *_ in tiles])
  return plt.load(ref.at[at], mask=mask, other=jnp.zeros((), ref.dtype))


def dot(a, b, dims):
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return lax.dot_general(a, b, dims, precision,
                         preferred_element_type=jnp.float32)


def bfloat16_parts(x, parts: int):
  """[parts, ...], bfloat16, whose sum is x: cut off, so nothing overflows."""
  x, found = x.astype(jnp.float32), []
  for _ in range(parts):
    bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
    part = lax.bitcast_convert_type(bits, jnp.float32)
    found.append(part.astype(jnp.bfloat16))
    x = jnp.where(jnp.isinf(part), 0, x - part)
  return jnp.stack(found)


PARTS = {jnp.dtype(jnp.bfloat16): 1, jnp.dtype(jnp.float16): 2,
         jnp.dtype(jnp.float32): 3}


@dataclasses.dataclass(frozen=True)
class Product:
  """x [M, K] by one expert's [K, N].

  `rows`, `columns` and `depth` are the sizes of a tile along M, N and K;
  `transposed`: the contraction is over the output of the weights.
  """
  rows: int
  columns: int
  depth: int
  length: int  # of the contraction, K
  transposed: bool
  parts: int  # of x
  interpret: bool

  @property
  def steps(self) -> int:
    return -(-self.length // self.depth)

  @staticmethod
  def arrays(weights) -> tuple:
    """What the kernel reads."""
    return tuple(jax.tree.leaves(weights))

  def x_layout(self, x_MK):
    """x as the kernel reads it."""
    if x_MK.dtype == jnp.bfloat16:
      return x_MK[None]
    return bfloat16_parts(x_MK, self.parts)

  def start(self, refs, expert, column):
    """What the loop over the contraction carries at first."""
    shape = (self.rows, self.columns)
    return jnp.zeros(shape if self.transposed else shape[::-1], jnp.float32)

  def result(self, carry, refs, expert, column):
    """float32 [rows, columns] of what the loop ended with."""
    return carry if self.transposed else carry.T

  def weight_tile(self, ref, expert, column, i):
    """Of [E, out, in], as it lies: [columns, depth], or [depth, columns]."""
    columns = column * self.columns, self.columns
    depth = i * self.depth, self.depth
    return load(ref, expert, *((depth, columns) if self.transposed
                               else (columns, depth)))

  def multiplied(self, x_ref, row, end, i, w):
    """x's tile by w's, in the orientation of the carry."""
    total = 0
    for part in range(self.parts):
      x = load(x_ref, part, (row, self.rows, end),
               (i * self.depth, self.depth))
      total += dot(x, w, NN) if self.transposed else dot(w, x, NT)
    return total


class ArrayProduct(Product):
  """Arrays [E, D, F]: contracted over D, or over F if transposed."""

  def x_layout(self, x_MK):
    return x_MK

  def start(self, refs, expert, column):
    return jnp.zeros((self.rows, self.columns), jnp.float32)

  def step(self, i, y, x_ref, refs, expert, row, end, column):
    columns = column * self.columns, self.columns
    depth = i * self.depth, self.depth
    x = load(x_ref, (row, self.rows, end), depth)
    if self.transposed:
      return y + dot(x, load(refs[0], expert, columns, depth), NT)
    return y + dot(x, load(refs[0], expert, depth, columns), NN)

  def result(self, y, refs, expert, column):
    return y


class Int8Product(Product):
  """Integers are exact in bfloat16; the scale of an output follows the sum.
  Transposed, whoever calls has multiplied x by the scales."""

  def step(self, i, y, x_ref, refs, expert, row, end, column):
    w = self.weight_tile(refs[0], expert, column, i).astype(jnp.bfloat16)
    return y + self.multiplied(x_ref, row, end, i, w)

  def result(self, y, refs, expert, column):
    if self.transposed:
      return y
    scales = load(refs[1], expert, (column * self.columns, self.columns))
    return y.T * scales[None]


class FP8Product(Product):
  """Floats are exact in bfloat16; each tile lies in one block, whose scale
  multiplies its product in float32."""

  def step(self, i, y, x_ref, refs, expert, row, end, column):
    w = self.weight_tile(refs[0], expert, column, i).astype(jnp.bfloat16)
    block = (lax.div(column, jnp.int32(FP8_BLOCK // self.columns)),
             lax.div(i, jnp.int32(FP8_BLOCK // self.depth)))
    scale = refs[1][(expert, *(block[::-1] if self.transposed else block))]
    return y + scale * self.multiplied(x_ref, row, end, i, w)


class MXFP4Product(Product):
  """The scales of the next step are read a step ahead: they are too narrow
  for the asynchronous copies that bring everything else."""

  @staticmethod
  def arrays(weights):
    *lead, groups, _ = weights.blocks.shape
    words = weights.blocks.reshape(*lead, groups * 4, 4)
    return lax.bitcast_convert_type(words, jnp.int32), weights.scales

  def x_layout(self, x_MK):
    x = super().x_layout(x_MK)
    if self.transposed:
      return x
    # Input 8 t + 4 h + j of a block goes where 8 j + 2 t + h was.
    x = x.reshape(*x.shape[:2], -1, 4, 2, 4)
    return x.transpose(0, 1, 2, 5, 3, 4).reshape(*x.shape[:2], -1)

  def _tile(self, ref, values: int, expert, column, i):
    """As `weight_tile`, of elements that stand for `values` inputs each."""
    def cut(tile, size, n=1):
      return tile * (size // n), size // n

    columns, depth = (column, self.columns), (i, self.depth)
    outputs, inputs = (depth, columns) if self.transposed else (columns, depth)
    return load(ref, expert, cut(*outputs), cut(*inputs, values))

  def start(self, refs, expert, column):
    # A traced zero: a tile known to reach past the end is refused, masked or
    # not.
    first = jnp.minimum(column, 0)
    return (super().start(refs, expert, column),
            self._tile(refs[1], BLOCK, expert, column, first))

  def step(self, i, carry, x_ref, refs, expert, row, end, column):
    y, scales = carry
    following = self._tile(refs[1], BLOCK, expert, column,
                           jnp.minimum(i + 1, self.steps - 1))
    words = self._tile(refs[0], 8, expert, column, i)
    factors = jnp.broadcast_to(_packed_scales(scales)[..., None],
                               (*scales.shape, BLOCK // 8))
    factors = factors.reshape(words.shape)
    pairs = [self._scaled(_placed(words, j), factors) for j in range(4)]
    w = _values(pairs)
    if not self.transposed:  # to the order of x_layout
      w = w.reshape(self.columns, -1, 4, 2, 2, 2).transpose(0, 1, 4, 5, 2, 3)
    w = w.reshape(words.shape[0], -1)
    return y + self.multiplied(x_ref, row, end, i, w), following

  def result(self, carry, refs, expert, column):
    return super().result(carry[0], refs, expert, column)

  def _scaled(self, pair, factors):
    """Two bfloat16 of 2^-126 times e2m1, by 2^126 and by their scale."""
    if self.interpret:
      return _scaled_interpreted(pair, factors)
    # A packed instruction, which Triton does not form by itself; with -0
    # added, it multiplies.
    asm = """{.reg .b32 t, z; mov.b32 t, 0x7E807E80; mov.b32 z, 0x80008000;
              fma.rn.bf16x2 t, $1, t, z; fma.rn.bf16x2 $0, t, $2, z;}"""
    return plt.elementwise_inline_asm(
        asm, args=[pair, factors], constraints="=r,r,r", pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(pair.shape, jnp.int32)])[0]


def _packed_scales(scales):
  """Scale bytes as two equal bfloat16: 2^(s - 127), for 255 not a number."""
  s = scales.astype(jnp.int32)
  bits = jnp.where(s == 255, 0x7FC0, jnp.maximum(s << 7, 0x40))
  return bits | bits << 16


def _placed(words, j: int):
  """Values j and j + 4 of each word, each 2^-126 times as two bfloat16."""
  left = 6 - 4 * j
  magnitude = words << left if left > 0 else words >> -left
  sign = words << (12 - 4 * j)
  return magnitude & 0x01C001C0 | sign & jnp.int32(-0x7FFF8000)


def _halves(pairs):
  return tuple(lax.bitcast_convert_type(x.astype(jnp.int16), jnp.bfloat16)
               for x in (pairs, pairs >> 16))


def _values(pairs):
  """[..., words, 2, 2, 2]: the eight values of each word in their order, of
  which value 4 h + j is half h of pair j."""
  halves = [jnp.stack(_halves(pair), -1) for pair in pairs]
  even, odd = (jnp.stack(halves[j::2], -1) for j in range(2))
  return jnp.stack([even, odd], -1)


def _scaled_interpreted(pair, factors):
  """What the instructions give, where arithmetic flushes 2^-127 to zero."""
  def scaled(pair, factor):
    exponent, bits = pair >> 23 & 3, lax.bitcast_convert_type(
        pair & 0x00400000 | 0x3F800000, jnp.float32)
    value = jnp.where(exponent > 0, bits * (1 << exponent) / 2, bits - 1)
    value *= lax.bitcast_convert_type(factor, jnp.float32)
    value = jnp.where(pair < 0, -value, value)
    return lax.bitcast_convert_type(value, jnp.int32)
  high = jnp.int32(-0x10000)
  return (scaled(pair << 16, factors << 16) >> 16 & 0xFFFF
          | scaled(pair & high, factors & high) & high)


PRODUCTS = {MXFP4: MXFP4Product, Int8: Int8Product, FP8: FP8Product}
