"""Expert matmuls as loops over tiles of weights and blocks of rows, for CPUs.

`jax.lax.ragged_dot` on the CPU multiplies every row by every expert. Here one
loop runs over the experts that have rows and, of each, over tiles of its
outputs; inside it one over blocks of its rows. (float32 arrays, of which
nothing is to be unpacked, take one flat loop over all blocks instead.) Cost
follows the rows, whatever the number of experts, and an expert without rows is
not read. What keeps the loops near the speed of a large matmul:

- a tile becomes float32 once, 2 MB of it, and is multiplied while it is in the
  cache: no dequantized expert stands in memory. To dequantize takes some eight
  instructions for eight weights: little beside 256 rows, but most of the work
  where an expert has a row or two;
- the last block of an expert is computed at the smallest of up to eight sizes
  that holds it, so few rows are computed in vain;
- results are merged into the output in place, rows of other experts kept, so
  that neither input nor output needs padding. What is merged is float32: XLA
  would cast all of a bfloat16 output, back and forth, for each block.
"""
import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import vma
from pallas_kernels.expert_matmul.reference import finish
from pallas_kernels.quant import MXFP4Pairs, is_quantized
from pallas_kernels.quant.leaf import part_of

# Weights of a tile. The gradient adds to as many numbers as there are inputs
# for each of them, and wants fewer.
_TILE, _GRADIENT_TILE = 1 << 19, 1 << 21


def unsupported(x_MD, weights, options) -> str | None:
  return None


def matmul(x_MD, weights, group_sizes_E, bias_EF, row_weights_M, options):
  """[M, D] by [E, D, F] to [M, F], or [M, F / 2] after SwiGLU."""
  if _flat(weights):
    return finish(_flat_matmul(x_MD, weights, group_sizes_E, bias_EF),
                  row_weights_M, swiglu_limit=options.swiglu_limit)
  num_rows, (num_experts, dim_in, dim) = len(x_MD), weights.shape
  ratio = 1 if options.swiglu_limit is None else 2
  block = _block_rows(num_rows, num_experts)
  tile_size = _tile_size(_TILE, dim_in, dim)
  tiles = _Tiles(weights)
  x_planes = tiles.split(x_MD.astype(jnp.float32))

  def tile(y_MF, planes, expert, start, _, first, end):
    bias = None
    if bias_EF is not None:
      bias = lax.dynamic_slice(bias_EF.astype(jnp.float32), (expert, start),
                               (1, tile_size))

    def rows(i, y_MF):
      new = first + i * block
      at = jnp.minimum(new, num_rows - block)

      def compute(size):
        row = jnp.minimum(new, num_rows - size)
        y = sum(_dot(lax.dynamic_slice_in_dim(x, row, size, 0), plane,
                     tiles.in_axis)
                for x, plane in zip(x_planes, planes, strict=True))
        if bias is not None:
          y += bias
        scale = row_weights_M
        if scale is not None:
          scale = lax.dynamic_slice_in_dim(scale, row, size, 0)
        y = finish(y, scale, swiglu_limit=options.swiglu_limit)
        return _placed(y, row - at, block)

      y = _at_size(block, end - new, compute)
      return _merge(y_MF, y, at, start // ratio, new, end)

    return lax.fori_loop(0, -(-(end - first) // block), rows, y_MF)

  zeros = vma.like(jnp.zeros((num_rows, dim // ratio), jnp.float32), x_MD,
                      weights, group_sizes_E, bias_EF, row_weights_M)
  y_MF = _for_each_tile(tiles, group_sizes_E, tile_size, tile, zeros)
  return y_MF.astype(x_MD.dtype)


def input_gradient(dy_MF, weights, group_sizes_E, options):
  """[M, F] by [E, D, F] transposed to [M, D]."""
  if _flat(weights):
    return _flat_matmul(dy_MF, weights, group_sizes_E, transposed=True)
  num_rows, (num_experts, dim, dim_out) = len(dy_MF), weights.shape
  block = _block_rows(num_rows, num_experts)
  tile_size = _tile_size(_GRADIENT_TILE, dim, dim_out)
  tiles = _Tiles(weights)
  dtype, dy_MF = dy_MF.dtype, dy_MF.astype(jnp.float32)

  def tile(dx_planes, planes, expert, start, unseen, first, end):
    def rows(i, dx_planes):
      new = first + i * block
      at = jnp.minimum(new, num_rows - block)

      def compute(size):
        row = jnp.minimum(new, num_rows - size)
        mine = _between(new, end, row, size)
        dy = lax.dynamic_slice(dy_MF, (row, start), (size, tile_size))
        dy = jnp.where(mine & unseen, dy, 0)
        return [_placed(_dot(dy, plane, 1 - tiles.in_axis), row - at, block)
                for plane in planes]

      parts = _at_size(block, end - new, compute)
      return [lax.dynamic_update_slice_in_dim(
          dx, lax.dynamic_slice_in_dim(dx, at, block, 0) + part, at, 0)
              for dx, part in zip(dx_planes, parts, strict=True)]

    return lax.fori_loop(0, -(-(end - first) // block), rows, dx_planes)

  zeros = tiles.split(vma.like(jnp.zeros((num_rows, dim), jnp.float32),
                                  dy_MF, weights, group_sizes_E))
  return tiles.join(_for_each_tile(tiles, group_sizes_E, tile_size, tile,
                                   zeros)).astype(dtype)


def _flat(weights) -> bool:
  return not is_quantized(weights) and weights.dtype == jnp.float32


def _flat_matmul(x_MD, weights, group_sizes_E, bias_EF=None, *,
                 transposed=False):
  """float32 arrays, whole experts at a time: there is nothing to unpack, and
  one loop over the blocks of all of them is faster where rows are few."""
  num_rows = len(x_MD)
  num_experts, dim = weights.shape[0], weights.shape[1 if transposed else 2]
  block = _block_rows(num_rows, num_experts)
  expert, first, end, used = _blocks(group_sizes_E, num_rows, block)

  def body(i, y_MF):
    weight = lax.dynamic_index_in_dim(weights, expert[i], 0, False)
    at = jnp.minimum(first[i], num_rows - block)

    def compute(size):
      row = jnp.minimum(first[i], num_rows - size)
      y = _dot(lax.dynamic_slice_in_dim(x_MD, row, size, 0), weight,
               1 if transposed else 0)
      return _placed(y, row - at, block)

    # Of few rows all: a branch would be given a copy of the weights.
    y = (compute(block) if block <= 8
         else _at_size(block, end[i] - first[i], compute))
    if bias_EF is not None:
      y += lax.dynamic_index_in_dim(bias_EF, expert[i], 0).astype(y.dtype)
    return _merge(y_MF, y, at, 0, first[i], end[i])

  zeros = vma.like(jnp.zeros((num_rows, dim), x_MD.dtype), x_MD, weights,
                      group_sizes_E, bias_EF)
  return lax.fori_loop(0, used, body, zeros)


class _Tiles:
  """Tiles of the outputs of weights [E, D, F], float32, in some planes: the
  p-th of P has inputs p, p + P, p + 2P ..., along its axis `in_axis`."""

  def __init__(self, weights):
    if isinstance(weights, MXFP4Pairs):
      weights = weights.to_mxfp4()  # bytes of another platform's order
    self.shape, quantized = weights.shape, is_quantized(weights)
    self.in_axis = 1 if quantized else 0
    self._planes = weights.PLANES if quantized else 1
    self.load = weights.tiles() if quantized else lambda expert, start, size: (
        part_of(weights, (expert, 0, start), (1, self.shape[1], size))[0]
        .astype(jnp.float32),)

  def split(self, x_MD):
    return [x_MD[:, plane::self._planes] for plane in range(self._planes)]

  def join(self, planes):
    return jnp.stack(planes, -1).reshape(len(planes[0]), -1)


def _for_each_tile(tiles: _Tiles, group_sizes_E, tile_size: int, function,
                   carry):
  """`function` for each tile of the experts that have rows, in order.

  It is given the carry, the tile's planes, its expert, the first of its
  outputs, which of them no tile had before (the last one begins early if it
  would not be full), and the expert's first row and last + 1.
  """
  count = -(-tiles.shape[2] // tile_size)
  expert_E = jnp.argsort(group_sizes_E == 0)  # those with rows come first
  end_E = jnp.cumsum(group_sizes_E)
  first_E = end_E - group_sizes_E

  def body(i, carry):
    expert, tile = expert_E[i // count], i % count
    start = jnp.minimum(tile * tile_size, tiles.shape[2] - tile_size)
    unseen = start + jnp.arange(tile_size) >= tile * tile_size
    return function(carry, tiles.load(expert, start, tile_size), expert, start,
                    unseen, first_E[expert], end_E[expert])

  used = jnp.sum(group_sizes_E > 0, dtype=jnp.int32)
  return lax.fori_loop(0, used * count, body, carry)


def _tile_size(weights: int, dim_in: int, dim_out: int) -> int:
  """Outputs of a tile: a power of two from 16 on, or all."""
  size = 1 << max(4, (weights // dim_in).bit_length() - 1)
  return min(size, dim_out)


def _dot(x, y, contracted: int):
  return lax.dot_general(x, y, (((1,), (contracted,)), ((), ())),
                         preferred_element_type=jnp.float32)


def _block_rows(num_rows: int, num_experts: int) -> int:
  """Rows of a block: about an expert's share, at most 256."""
  share = max(1, num_rows // num_experts)
  return min(num_rows, 256, max(8, 1 << (share - 1).bit_length()))


def _sizes(block: int) -> list[int]:
  """The sizes at which a block may be computed, ascending.

  Few, for each is a program of its own. A row alone is multiplied several
  times as fast as one of a few.
  """
  if block <= 8:
    return [*(size for size in (1, 2, 4) if size < block), block]
  step = max(8, -(-block // 8))
  return [*range(step, block, step), block]


def _at_size(block: int, rows, compute):
  """`compute(size)` at the smallest size that holds `rows`."""
  sizes = _sizes(block)
  index = jnp.sum(rows > jnp.array(sizes[:-1], jnp.int32), dtype=jnp.int32)
  return lax.switch(index, [lambda size=size: compute(size) for size in sizes])


def _placed(y, row, block: int):
  """Rows of zeros before and after those of y, which are at `row`."""
  return lax.dynamic_update_slice(jnp.zeros((block, y.shape[1]), y.dtype), y,
                                  (row, 0))


def _between(first, end, row, count: int):
  """Which of rows `row`, row + 1 ... are in first ... end - 1, [count, 1]."""
  rows = row + jnp.arange(count)[:, None]
  return (rows >= first) & (rows < end)


def _merge(total_MF, y, row, column, first, end):
  """Writes rows `first` ... `end` - 1 of y, which stands at (row, column), in
  place: rows of other experts are kept."""
  others = lax.dynamic_slice(total_MF, (row, column), y.shape)
  y = jnp.where(_between(first, end, row, len(y)), y, others)
  return lax.dynamic_update_slice(total_MF, y, (row, column))


def weight_gradient(x_MD, dy_MF, group_sizes_E, with_bias: bool, options):
  """The gradients of weights [E, D, F] and bias [E, F] (or None), float32."""
  num_rows, dim_in = x_MD.shape
  num_experts, dim_out = group_sizes_E.shape[0], dy_MF.shape[1]
  block = _block_rows(num_rows, num_experts)
  expert, first, end, used = _blocks(group_sizes_E, num_rows, block)
  x_MD, dy_MF = x_MD.astype(jnp.float32), dy_MF.astype(jnp.float32)

  def body(i, gradients):
    def compute(size):
      row = jnp.minimum(first[i], num_rows - size)
      x = lax.dynamic_slice_in_dim(x_MD, row, size, 0)
      dy = lax.dynamic_slice_in_dim(dy_MF, row, size, 0)
      dy = jnp.where(_between(first[i], end[i], row, size), dy, 0)
      dw = lax.dot_general(x, dy, (((0,), (0,)), ((), ())),
                           preferred_element_type=jnp.float32)
      return dw, jnp.sum(dy, 0, dtype=jnp.float32) if with_bias else None

    return jax.tree.map(lambda total, part: total.at[expert[i]].add(part),
                        gradients, _at_size(block, end[i] - first[i], compute))

  zeros = (jnp.zeros((num_experts, dim_in, dim_out), jnp.float32),
           jnp.zeros((num_experts, dim_out), jnp.float32)
           if with_bias else None)
  zeros = vma.like(zeros, x_MD, dy_MF, group_sizes_E)
  return lax.fori_loop(0, used, body, zeros)


def _blocks(group_sizes_E, num_rows: int, block: int):
  """For each block: expert, first row, end of the expert; blocks in use."""
  num_experts = group_sizes_E.shape[0]
  blocks_E = (group_sizes_E + block - 1) // block
  block_end_E = jnp.cumsum(blocks_E)
  end_E = jnp.cumsum(group_sizes_E)
  i = jnp.arange(-(-num_rows // block) + num_experts)
  expert = jnp.searchsorted(block_end_E, i, side="right")
  expert = jnp.minimum(expert, num_experts - 1)
  first = ((end_E - group_sizes_E)[expert]
           + (i - (block_end_E - blocks_E)[expert]) * block)
  return expert, first, end_E[expert], block_end_E[-1]
