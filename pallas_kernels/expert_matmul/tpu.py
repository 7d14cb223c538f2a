"""Expert matmuls on TPUs, in Pallas.

The contract is that of xla.py. Arrays, MXFP4Pairs, Int8 and FP8 are taken;
dequantized weights stand in VMEM alone. Minor dimensions that are no multiple
of 128 make XLA choose transposed layouts for what enters a jitted function:
give arrays, Int8 and FP8 whose input dimension is 2880 the layout
`Format(Layout((0, 1, 2)), sharding)`, or each call copies them. MXFP4Pairs
has no such dimension.
"""
import dataclasses

import jax.numpy as jnp

from pallas_kernels import platforms
from pallas_kernels.expert_matmul import reference, tpu_gradient, tpu_matmul
from pallas_kernels.expert_matmul import tpu_schedule as schedule
from pallas_kernels.expert_matmul.tpu_dequantize import operand
from pallas_kernels.quant import FP8, Int8, MXFP4, MXFP4Pairs, is_quantized
from pallas_kernels.quant.mxfp4_pairs import LANES

MIB = 2 ** 20


@dataclasses.dataclass(frozen=True)
class Tile:
  """Of a matmul: rows, columns of its result, and how much of the contracted
  dimension is dequantized at a time (of the weights' gradient: rows, columns,
  and inputs).

  keep: whether dequantized weights stay for an expert's later visits; of MXFP4
    they can be made again at each visit, which takes less VMEM.
  """
  rows: int
  columns: int
  depth: int
  keep: bool = True


@dataclasses.dataclass(frozen=True)
class TPUBlocks:
  """None is the default for the device compiled for.

  static_schedule: for profilers that cannot follow data: all experts have the
    same number of rows, whatever group_sizes say. Not for other use.
  """
  matmul: Tile | None = None
  input_gradient: Tile | None = None
  weight_gradient: Tile | None = None
  static_schedule: bool = False


@dataclasses.dataclass(frozen=True)
class _Generation:
  """vmem: bytes a kernel may use. few, many: the most columns of a tile, with
  few rows an expert (a large tile spreads what a step costs) and with many.
  packed: vectors of bfloat16 are multiplied. cores: that split the columns.
  keep: with few rows, whether MXFP4 stays dequantized: where the matrix unit
  takes weights no faster than they are dequantized, that saves nothing."""
  vmem: int
  few: int
  many: int
  packed: bool
  cores: int = 1
  keep: bool = True


_GENERATIONS = {
    "v4": _Generation(24 * MIB, 1024, 512, False, 2),
    "v5e": _Generation(100 * MIB, 2048, 1024, False),
    "v5p": _Generation(52 * MIB, 3072, 768, False, 2),
    "v6e": _Generation(100 * MIB, 2048, 1280, True),
    "7x": _Generation(40 * MIB, 6144, 768, True, keep=False),
}
# Rows an expert up to which they are few.
FEW = 64
_DEPTH = 256


def unsupported(x_MD, weights, options) -> str | None:
  if isinstance(weights, MXFP4):
    return ("weights are MXFP4 as published: lay them out once by "
            "MXFP4Pairs.from_mxfp4")
  if is_quantized(weights) and not isinstance(weights, (MXFP4Pairs, Int8, FP8)):
    return f"weights are {type(weights).__name__}"
  if x_MD.dtype not in (jnp.bfloat16, jnp.float32):
    return f"x is {x_MD.dtype}; it takes bfloat16 and float32"
  if options.blocks is not None and not isinstance(options.blocks, TPUBlocks):
    return f"blocks are {type(options.blocks).__name__}; it takes TPUBlocks"
  if not options.interpret and platforms.platform() != "tpu":
    return f"it runs on TPUs, not on {platforms.platform()}, or interpreted"


def matmul(x_MD, weights, group_sizes_E, bias_EF, row_weights_M, options):
  """[M, D] by [E, D, F] to [M, F], or [M, F / 2] after SwiGLU."""
  deinterleaved = isinstance(weights, MXFP4Pairs) and weights.deinterleaved
  if deinterleaved and options.swiglu_limit is None:
    # Nobody but SwiGLU gains by that order.
    y_ML = _matmul(x_MD, weights, group_sizes_E, bias_EF, row_weights_M,
                   options)
    return weights.from_lanes(y_ML)
  if options.swiglu_limit is None or deinterleaved:
    return _matmul(x_MD, weights, group_sizes_E, bias_EF, row_weights_M,
                   options)
  y_MF = _matmul(x_MD, weights, group_sizes_E, bias_EF, None,
                 options._replace(swiglu_limit=None))
  return reference.finish(y_MF, row_weights_M,
                          swiglu_limit=options.swiglu_limit)


def input_gradient(dy_MF, weights, group_sizes_E, options):
  """[M, F] by [E, D, F] transposed to [M, D]."""
  if isinstance(weights, MXFP4Pairs) and weights.deinterleaved:
    dy_MF = weights.to_lanes(dy_MF)
  return _matmul(dy_MF, weights, group_sizes_E, None, None, options,
                 transposed=True)


def _matmul(x_MK, weights, group_sizes_E, bias_EF, row_weights_M, options, *,
            transposed=False):
  num_rows, depth = x_MK.shape
  num_experts, dim_in, dim_out = weights.shape
  outputs, large_E = dim_in if transposed else dim_out, None
  fused = options.swiglu_limit is not None
  if isinstance(weights, MXFP4Pairs):
    large_E = weights.large_scales
    if bias_EF is not None:
      bias_EF = weights.to_lanes(bias_EF)
    if fused:
      outputs = dim_out // 2
    elif weights.deinterleaved and not transposed:
      outputs = weights.pairs.shape[-1]
  blocks = options.blocks or TPUBlocks()
  generation = _generation()
  tile = blocks.input_gradient if transposed else blocks.matmul
  tile = tile or default_tile(x_MK, weights, transposed=transposed,
                              fused=fused)
  _check(tile, x_MK, weights, transposed, options)
  static = 0
  if blocks.static_schedule:
    static = num_rows // tile.rows // num_experts
  plan = tpu_matmul.Plan(
      tile.rows, tile.columns, tile.depth, options.swiglu_limit, tile.keep,
      static, None if options.interpret else generation.vmem, options.interpret)
  visits = schedule.visits(group_sizes_E, num_rows, tile.rows, large_E=large_E)
  tiles = -(-_all_columns(weights, transposed) // tile.columns)
  weights = operand(weights, tile.columns, x_MK.dtype, transposed=transposed,
                    packed=generation.packed,
                    interpreted=bool(options.interpret))
  return tpu_matmul.matmul(x_MK, weights, outputs, visits, plan, tiles=tiles,
                           bias_EN=bias_EF, row_weights_M=row_weights_M)


def weight_gradient(x_MD, dy_MF, group_sizes_E, with_bias: bool, options):
  """The gradients of weights [E, D, F] and bias [E, F] (or None), float32."""
  blocks, generation = options.blocks or TPUBlocks(), _generation()
  (num_rows, dim_in), dim_out = x_MD.shape, dy_MF.shape[1]
  tile = blocks.weight_gradient or Tile(
      min(512, _round_up(num_rows, 16)), min(dim_out, 1024),
      min(dim_in, 1024 if x_MD.dtype == jnp.bfloat16 else 512))
  for name, size, whole in (("columns", tile.columns, dim_out),
                            ("depth", tile.depth, dim_in)):
    if size != whole and size % LANES:
      raise ValueError(f"blocks: {name}={size} of the weights' gradient is "
                       f"neither all {whole} nor a multiple of {LANES}")
  visits = schedule.visits(group_sizes_E, num_rows, tile.rows,
                           of_each_expert=True)
  dw_EDF = tpu_gradient.weight_gradient(
      x_MD, dy_MF, group_sizes_E.shape[0], visits, rows=tile.rows,
      inputs=tile.depth, outputs=tile.columns,
      vmem_bytes=None if options.interpret else generation.vmem,
      interpret=options.interpret)
  return dw_EDF, (reference.bias_gradient(dy_MF, group_sizes_E) if with_bias
                  else None)


def _generation() -> _Generation:
  return _GENERATIONS.get(platforms.tpu_generation(), _GENERATIONS["v6e"])


def _round_up(x: int, multiple: int) -> int:
  return -(-x // multiple) * multiple


def _step(weights, transposed: bool, fused: bool) -> int:
  """What columns must be a multiple of, if they are not all."""
  if isinstance(weights, MXFP4Pairs) and transposed:
    return 1024  # 32 rows of scales
  return 2 * LANES if fused else LANES


def _all_columns(weights, transposed: bool) -> int:
  if isinstance(weights, MXFP4Pairs):
    return (_round_up(weights.shape[1], LANES) if transposed
            else weights.pairs.shape[-1])
  return weights.shape[1 if transposed else 2]


def default_tile(x_MK, weights, *, transposed=False, fused=False) -> Tile:
  """The largest number of columns up to the generation's that VMEM holds, in
  tiles of equal size."""
  generation = _generation()
  num_rows, depth = x_MK.shape
  share = num_rows // weights.shape[0]
  rows = next(r for r in (64, 128, 256, 512) if r >= min(share, 512))
  rows = min(rows, _round_up(num_rows, 16))
  step = _step(weights, transposed, fused)
  columns = _all_columns(weights, transposed)
  most = generation.few if share <= FEW else generation.many
  chunk, keep = depth, True
  if is_quantized(weights) and rows <= FEW and not (
      transposed and isinstance(weights, MXFP4Pairs)):
    chunk = min(depth, _DEPTH)
    keep = generation.keep or not isinstance(weights, MXFP4Pairs)
  tiles = -(-columns // most)
  while True:
    tiles = _round_up(tiles, generation.cores) if tiles > 1 else tiles
    wide = _round_up(-(-columns // tiles), step) if tiles > 1 else columns
    tile = Tile(rows, wide, chunk, keep)
    if (vmem_bytes(tile, x_MK, weights, transposed) <= generation.vmem
        or wide <= step):
      return tile
    tiles += 1


def vmem_bytes(tile: Tile, x_MK, weights, transposed=False) -> int:
  """About what a tile takes in VMEM: two of each block, the dequantized tile,
  the scales and the sums."""
  size, depth = x_MK.dtype.itemsize, _round_up(x_MK.shape[1], LANES)
  weight = depth * _round_up(tile.columns, LANES)
  if isinstance(weights, MXFP4Pairs):
    fetched, cached = weight * 17 // 32, weight * size
    if not tile.keep:
      cached = min(cached, 2 * tile.depth * tile.columns * size)
    cached += weight // 8
  elif is_quantized(weights):
    fetched, cached = weight, weight * size
  else:
    fetched, cached = weight * size, 0
  y = tile.rows * tile.columns * 4
  return 2 * (tile.rows * depth * size + fetched + y) + cached + 2 * y


def _check(tile, x_MK, weights, transposed, options):
  step = _step(weights, transposed, options.swiglu_limit is not None)
  whole = _all_columns(weights, transposed)
  if tile.columns != whole and (tile.columns % step or tile.columns < 1):
    raise ValueError(f"blocks: columns={tile.columns} is neither all {whole} "
                     f"nor a multiple of {step}")
  if tile.rows < 1 or tile.rows % 16:
    raise ValueError(f"blocks: rows={tile.rows} is not a multiple of 16")
  depth = x_MK.shape[1]
  if tile.depth < depth and (tile.depth < 1 or tile.depth % LANES):
    raise ValueError(f"blocks: depth={tile.depth} is neither all {depth} nor "
                     f"a multiple of {LANES}")
  if tile.depth < depth and transposed and isinstance(weights, MXFP4Pairs):
    raise ValueError(f"blocks: depth={tile.depth}: MXFP4 is transposed with "
                     f"all {depth} at a time")
  if not tile.keep and (transposed or not isinstance(weights, MXFP4Pairs)):
    raise ValueError("blocks: keep=False is for MXFP4, not transposed")
  used, limit = vmem_bytes(tile, x_MK, weights, transposed), _generation().vmem
  if not options.interpret and used > limit:
    raise ValueError(f"blocks: {tile} takes about {used / MIB:.0f} MiB of "
                     f"VMEM, of {limit / MIB:.0f}: choose fewer columns")
