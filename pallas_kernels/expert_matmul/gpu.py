"""Expert matmuls on NVIDIA GPUs, by Triton.

One kernel multiplies a tile of rows by a tile of columns of one expert; which,
each program finds from the group sizes by itself (a scan over the experts,
about a microsecond), so that neither host nor another kernel is waited for.
Formats are read as they are published: `gpu_tiles`.

Many rows an expert (prefill): a program has one tile of rows. The columns of a
tile of rows follow each other, so that its rows and its expert's weights (8.8
MB of MXFP4 for gpt-oss) are read again from the 50 MB of L2: 0.9 MB for 94
MFLOP, 3.9 TB/s at 400 TFLOP/s. A step of a tile of 128 by 128 by 128 takes the
tensor cores 1024 clocks and the unpacking 600 of issuing. Triton lets neither
wait for the other only in different programs, so two must fit an SM: four
warps of up to 255 registers, 76 KB in two stages.

Few rows (decode): a program has all rows of an expert, 16 or 32 at a time, and
64 columns (32 where that makes too few programs): each expert that has rows is
read once from memory, others never. At 4.3 TB/s each of an H200's 132 SMs
receives 33 MXFP4 weights in a clock of 1.85 GHz, and can issue 128 threads'
instructions; the loop takes 4.1 a weight (4.4 for 32 columns), so that issuing
allows 95 % of the bandwidth (88 %). Two warps are a program, whose products
are m16n8k16: wgmma's fences and descriptors cost more there (4.9). Six
programs, of 160 registers a thread and 26 KB, fit an SM: with three tiles of 4
KB on their way each they ask for 72 KB, where 4.3 TB/s times 0.7 us are 23.

The rows past the last group are one more group, whose programs write zeros.
"""
import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import vma
from pallas_kernels.expert_matmul import gpu_tiles, reference
from pallas_kernels.expert_matmul.gpu_tiles import dot, load
from pallas_kernels.quant import FP8, MXFP4, Int8, is_quantized


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Sizes of a program's tile, powers of two.

  rows, columns: of the result. depth: of the contraction, in a step. warps: of
  a program. stages: steps whose reads overlap. For the gradient of weights
  [depth, columns] is the tile and rows are contracted.
  """
  rows: int
  columns: int
  depth: int
  warps: int
  stages: int

  def __post_init__(self):
    for name, least, most in (("rows", 16, 256), ("columns", 16, 256),
                              ("depth", 16, 1024), ("warps", 1, 16),
                              ("stages", 1, 8)):
      n = getattr(self, name)
      if not least <= n <= most or (name != "stages" and n & (n - 1)):
        raise ValueError(f"Blocks.{name}={n}: expected a power of two from "
                         f"{least} to {most}" if name != "stages" else
                         f"Blocks.stages={n}: expected {least} to {most}")


class Defaults(typing.NamedTuple):
  """For few rows an expert (`narrow` if that makes less than four programs for
  each of an H200's SMs), for many, and for the input's gradient."""
  narrow: Blocks
  few: Blocks
  many: Blocks
  gradient: Blocks


DEFAULTS = {
    MXFP4: Defaults(Blocks(16, 32, 256, 2, 4), Blocks(16, 64, 128, 2, 4),
                    Blocks(128, 128, 128, 4, 2), Blocks(64, 128, 64, 4, 3)),
    Int8: Defaults(Blocks(16, 32, 128, 2, 4), Blocks(16, 64, 128, 2, 4),
                   Blocks(128, 128, 64, 4, 3), Blocks(64, 128, 64, 4, 3)),
    FP8: Defaults(Blocks(16, 32, 128, 2, 4), Blocks(16, 64, 128, 2, 4),
                  Blocks(64, 128, 128, 4, 3), Blocks(64, 128, 64, 4, 3)),
    "16 bits": Defaults(Blocks(16, 32, 256, 2, 3), Blocks(16, 64, 128, 4, 4),
                        Blocks(128, 256, 64, 8, 4), Blocks(128, 256, 64, 8, 4)),
    "float32": Defaults(Blocks(16, 32, 64, 2, 3), Blocks(16, 64, 64, 4, 3),
                        Blocks(64, 64, 32, 4, 3), Blocks(64, 64, 32, 4, 3)),
}
# Weights' gradients, of 16 bits and float32.
GRADIENTS = {2: Blocks(64, 128, 128, 8, 3), 4: Blocks(32, 64, 64, 4, 3)}
DTYPES = ("float32", "bfloat16", "float16")


def unsupported(x_MD, weights, options) -> str | None:
  if x_MD.dtype.name not in DTYPES:
    return f"x is {x_MD.dtype}; it multiplies {', '.join(DTYPES)}"
  if is_quantized(weights) and type(weights) not in gpu_tiles.PRODUCTS:
    return (f"weights are {type(weights).__name__}; it takes arrays, "
            f"{', '.join(kind.__name__ for kind in gpu_tiles.PRODUCTS)}")
  if not isinstance(options.blocks, Blocks | None):
    return (f"blocks={options.blocks!r}: give "
            "pallas_kernels.expert_matmul.gpu.Blocks")
  for x in (x_MD, *jax.tree.leaves(weights)):
    # Triton's lowering takes signed 32-bit offsets up to 4 GiB, whatever the
    # elements' size. (MXFP4 is read as words.)
    if (2 ** 31 <= x.size and x.size * x.dtype.itemsize <= 2 ** 32
        and not isinstance(weights, MXFP4)):
      return (f"an array {x.dtype} {x.shape} has 2^31 elements or more in at "
              "most 4 GiB: split the experts")
  return _misfit(weights, options.blocks)


def _misfit(weights, blocks) -> str | None:
  if blocks is None:
    return None
  if isinstance(weights, FP8) and max(blocks.columns, blocks.depth) > 128:
    return (f"columns={blocks.columns} and depth={blocks.depth} of a tile "
            "span blocks of FP8 scales: use at most 128")
  if isinstance(weights, MXFP4) and (blocks.columns < 32 or blocks.depth < 64):
    return (f"columns={blocks.columns} and depth={blocks.depth} of a tile: "
            "MXFP4 takes at least 32 and 64")


def matmul(x_MD, weights, group_sizes_E, bias_EF, row_weights_M, options):
  rows, experts = len(x_MD), len(group_sizes_E)
  few = rows <= 16 * experts
  blocks = options.blocks or _default(x_MD, weights, _use(rows, weights.shape))
  if few and options.blocks is None and rows > 4 * experts:
    blocks = dataclasses.replace(blocks, rows=32)
  return _matmul(x_MD, weights, group_sizes_E, bias_EF, row_weights_M, blocks,
                 options, weights.shape[2], few=few)


def input_gradient(dy_MF, weights, group_sizes_E, options):
  x_MF = dy_MF
  if isinstance(weights, Int8):
    expert = reference.row_expert(group_sizes_E, len(dy_MF))
    x_MF = (dy_MF.astype(jnp.float32)
            * weights.channel_scales.at[expert].get(mode="clip")
            ).astype(dy_MF.dtype)
  blocks = options.blocks or _default(dy_MF, weights, "gradient")
  return _matmul(x_MF, weights, group_sizes_E, None, None, blocks, options,
                 weights.shape[1], transposed=True)


def weight_gradient(x_MD, dy_MF, group_sizes_E, with_bias: bool, options):
  """The gradients of weights [E, D, F] and bias [E, F] (or None), float32."""
  blocks = options.blocks or GRADIENTS[x_MD.dtype.itemsize]
  shape = len(group_sizes_E), x_MD.shape[1], dy_MF.shape[1]
  grid = (pl.cdiv(shape[2], blocks.columns), pl.cdiv(shape[1], blocks.depth),
          shape[0])
  dw_EDF = _call(functools.partial(_weight_gradient_kernel, blocks=blocks),
                 grid, vma.shape_like((group_sizes_E, x_MD, dy_MF), shape,
                                      jnp.float32), blocks, options)(
                     group_sizes_E.astype(jnp.int32), x_MD, dy_MF)
  return dw_EDF, (reference.bias_gradient(dy_MF, group_sizes_E) if with_bias
                  else None)


def _use(rows: int, shape) -> str:
  experts, _, columns = shape
  if rows > 16 * experts:
    return "many"
  programs = min(rows, experts) * (columns // 64)
  return "few" if programs >= 4 * 132 else "narrow"


def _default(x, weights, use: str) -> Blocks:
  kind = type(weights)
  if not is_quantized(weights):
    kind = "float32" if weights.dtype == jnp.float32 else "16 bits"
  blocks = getattr(DEFAULTS[kind], use)
  if kind not in gpu_tiles.PRODUCTS or x.dtype == jnp.bfloat16:
    return blocks
  # Several parts of x stand in shared memory.
  return dataclasses.replace(blocks, rows=min(blocks.rows, 64), stages=2)


def _call(kernel, grid, out_shape, blocks, options):
  return pl.pallas_call(
      kernel, grid=grid, out_shape=out_shape, interpret=bool(options.interpret),
      compiler_params=plt.CompilerParams(num_warps=blocks.warps,
                                         num_stages=blocks.stages))


def _matmul(x_MK, weights, group_sizes_E, bias_EN, row_weights_M, blocks,
            options, num_columns: int, *, transposed=False, few=False):
  """[M, K] by [E, K, N] (of the weights [E, N, K] if transposed) to [M, N]."""
  num_rows, length = x_MK.shape
  num_experts = len(group_sizes_E)
  product = gpu_tiles.PRODUCTS.get(type(weights), gpu_tiles.ArrayProduct)(
      blocks.rows, blocks.columns, blocks.depth, length, transposed,
      gpu_tiles.PARTS[x_MK.dtype], bool(options.interpret))
  # How many tiles of rows there can be, those past the last group included.
  tiles = min(num_experts + 1, num_rows)
  if not few:
    tiles += num_rows // blocks.rows
  extras = [x for x in (bias_EN, row_weights_M) if x is not None]
  kernel = functools.partial(
      _matmul_kernel, product=product, with_bias=bias_EN is not None,
      with_row_weights=row_weights_M is not None, few=few,
      swiglu_limit=options.swiglu_limit)
  shape = num_rows, num_columns // (1 if options.swiglu_limit is None else 2)
  operands = (group_sizes_E.astype(jnp.int32), product.x_layout(x_MK),
              *product.arrays(weights), *extras)
  return _call(kernel, (pl.cdiv(num_columns, blocks.columns), tiles),
               vma.shape_like(operands, shape, x_MK.dtype), blocks,
               options)(*operands)


def _groups(sizes_ref, num_rows: int):
  """Sizes and ends of all groups, the rows past the last being one more."""
  num_experts, = sizes_ref.shape
  group = lax.iota(jnp.int32, pl.next_power_of_2(num_experts + 1))
  sizes = sizes_ref[jnp.minimum(group, num_experts - 1)]
  sizes = jnp.where(group < num_experts, sizes, 0)
  past = jnp.maximum(num_rows - jnp.sum(sizes), 0)
  sizes = jnp.where(group == num_experts, past, sizes)
  return group, sizes, jnp.minimum(jnp.cumsum(sizes), num_rows)


def _find_tile(sizes_ref, num_rows: int, tile, rows: int | None):
  """The group of a tile of `rows` rows (all of a group if None), its first
  row and the end of its rows."""
  group, sizes, ends = _groups(sizes_ref, num_rows)
  if rows is None:
    tiles = jnp.where(sizes > 0, 1, 0)
  else:
    tiles = (sizes + rows - 1) // rows
  tile_ends = jnp.cumsum(tiles)
  mine = jnp.sum(jnp.where(tile_ends <= tile, 1, 0))

  def of_mine(values):
    return jnp.sum(jnp.where(group == mine, values, 0))

  first, end = of_mine(ends - sizes), of_mine(ends)
  if rows is not None:
    first += (tile - of_mine(tile_ends - tiles)) * rows
    end = jnp.minimum(first + rows, end)
  return mine, first, end


def _matmul_kernel(sizes_ref, x_ref, *refs, product, with_bias: bool,
                   with_row_weights: bool, few: bool, swiglu_limit):
  *refs, y_ref = refs
  row_weights_ref = refs.pop() if with_row_weights else None
  bias_ref = refs.pop() if with_bias else None
  column = pl.program_id(0)
  num_experts, num_rows = sizes_ref.shape[0], y_ref.shape[0]
  expert, first, end = _find_tile(sizes_ref, num_rows, pl.program_id(1),
                                  None if few else product.rows)

  def finished(y, row):
    if with_bias:
      bias = load(bias_ref, expert,
                  (column * product.columns, product.columns))
      y += bias.astype(jnp.float32)[None]
    if swiglu_limit is not None:
      gate, up = lax.split(y.reshape(product.rows, -1, 2), (1, 1), axis=2)
      y = reference.clamped_swiglu(gate, up, swiglu_limit)
      y = y.reshape(product.rows, -1)
    if with_row_weights:
      weights = load(row_weights_ref, (row, product.rows, end))
      y *= weights.astype(jnp.float32)[:, None]
    return y

  def store(row, y):
    width = y.shape[1]
    start = column * width
    inside = row + lax.broadcasted_iota(jnp.int32, (product.rows, 1), 0) < end
    if y_ref.shape[1] % width:
      inside &= start + lax.broadcasted_iota(
          jnp.int32, (1, width), 1) < y_ref.shape[1]
    plt.store(y_ref.at[pl.ds(row, product.rows), pl.ds(start, width)],
              y.astype(y_ref.dtype), mask=jnp.broadcast_to(inside, y.shape))

  def compute(row):
    step = functools.partial(product.step, x_ref=x_ref, refs=refs,
                             expert=expert, row=row, end=end, column=column)
    y = lax.fori_loop(0, product.steps, step,
                      product.start(refs, expert, column))
    store(row, finished(product.result(y, refs, expert, column), row))

  def zero(row):
    width = product.columns // (1 if swiglu_limit is None else 2)
    store(row, jnp.zeros((product.rows, width), jnp.float32))

  def each_row_tile(function):
    if not few:
      return function(first)

    def body(i, carry):
      function(first + i * product.rows)
      return carry
    lax.fori_loop(0, (end - first + product.rows - 1) // product.rows, body, 0)

  pl.when(expert < num_experts)(lambda: each_row_tile(compute))
  pl.when(expert == num_experts)(lambda: each_row_tile(zero))


def _weight_gradient_kernel(sizes_ref, x_ref, dy_ref, dw_ref, *, blocks):
  column = pl.program_id(0) * blocks.columns
  depth = pl.program_id(1) * blocks.depth
  expert = pl.program_id(2)
  group, sizes, ends = _groups(sizes_ref, x_ref.shape[0])
  end = jnp.sum(jnp.where(group == expert, ends, 0))
  size = jnp.sum(jnp.where(group == expert, sizes, 0))

  def step(i, dw):
    rows = end - size + i * blocks.rows, blocks.rows, end
    x = load(x_ref, rows, (depth, blocks.depth))
    dy = load(dy_ref, rows, (column, blocks.columns))
    return dw + dot(x, dy, gpu_tiles.TN)

  dw = lax.fori_loop(0, (size + blocks.rows - 1) // blocks.rows, step,
                     jnp.zeros((blocks.depth, blocks.columns), jnp.float32))
  mask = ((depth + lax.broadcasted_iota(jnp.int32, (blocks.depth, 1), 0)
           < dw_ref.shape[1])
          & (column + lax.broadcasted_iota(jnp.int32, (1, blocks.columns), 1)
             < dw_ref.shape[2]))
  plt.store(dw_ref.at[expert, pl.ds(depth, blocks.depth),
                      pl.ds(column, blocks.columns)], dw, mask=mask)
