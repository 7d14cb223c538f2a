"""Rows of each expert times a tile of its outputs.

The grid is (tiles of outputs, visits): tpu_schedule.py says what a visit is.
Visits of one expert follow each other, so each of its weight tiles is fetched
once, and none of an expert without rows. The rows are fetched again for each
tile of outputs: for 512 rows an expert and tiles of 1280 outputs that is 2.9
MB for every 2 MB of packed weights, while their product takes 2 to 20 times
as long as fetching both.

Weights that need dequantizing go through a cache in VMEM, as many bytes as
the tile in the rows' dtype. It is filled during the expert's first visit,
`depth` at a time, and each part is multiplied while the vector unit fills
the next: one straight piece of code, which the compiler interleaves. So it is
hidden behind the matrix unit when rows are many (512 rows: 8.0, 2.0 and 1.8
cycles for 1024 weights on v5e, v6e, 7x, against 1.2, 0.7, 0.45), and when
they are few it is the vector unit (v5e, v5p, v6e) or pushing weights into the
matrix unit (7x, 0.5 cycles) that takes the time. Later visits only multiply.

A step begins and ends with some 350 cycles in which no weights are pushed (the
copies' bookkeeping, the last product's way through the array), so a tile has
as many outputs as VMEM holds. On 7x a later visit, which pushes the weights
too, is none the slower for dequantizing them again. So with few rows they are
not kept, only two parts of the depth by turns, and a tile is a whole matrix of
2880 by 5760: 18 MB of VMEM for two of it packed, not 33 MB more.
"""
import dataclasses
import functools
import typing

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import vma
from pallas_kernels.expert_matmul import reference
from pallas_kernels.expert_matmul import tpu_schedule as schedule
from pallas_kernels.expert_matmul.tpu_dequantize import Operand
from pallas_kernels.quant.mxfp4_pairs import LANES


@dataclasses.dataclass(frozen=True)
class Plan:
  """rows, columns, depth: of a tile of rows, of outputs, and how much of the
  contraction is dequantized at a time.

  keep: whether an expert's later visits find its tile dequantized.
  static_visits: for a profiler that cannot follow data: visit v is row tile
    v, and all experts have the same number of them. 0 otherwise.
  """
  rows: int
  columns: int
  depth: int
  swiglu_limit: float | None = None
  keep: bool = True
  static_visits: int = 0
  vmem_bytes: int | None = None
  interpret: typing.Any = False


class _Visit(typing.NamedTuple):
  """An element of `schedule.Visits`, inside the kernel."""
  row_tile: typing.Any
  expert: typing.Any
  start: typing.Any
  end: typing.Any
  flags: typing.Any


def _visit(plan: Plan, i, refs) -> _Visit:
  if not plan.static_visits:
    return _Visit(*(ref[i] for ref in refs))
  expert = i // plan.static_visits
  new = jnp.where(i % plan.static_visits == 0, schedule.NEW_EXPERT, 0)
  if plan.static_visits == 1:
    new = schedule.NEW_EXPERT
  return _Visit(i, expert, 0, 2 ** 30, schedule.NEW_TILE | new)


def _when(condition):
  if isinstance(condition, bool):
    return lambda function: function() if condition else None
  return pl.when(condition)


def matmul(x_MK, weights: Operand, num_outputs: int, visits, plan: Plan, *,
           tiles: int, bias_EN=None, row_weights_M=None):
  """[M, K] by an operand in `tiles` tiles to [M, num_outputs].

  bias_EN: in the order of the operand's outputs.
  swiglu_limit: outputs are 128 gates, 128 ups, and so on.
  """
  num_rows, depth = x_MK.shape
  half = 2 if plan.swiglu_limit is not None else 1
  row_tiles = pl.cdiv(num_rows, plan.rows)
  num_experts = weights.arrays[0].shape[0]
  most = row_tiles if plan.static_visits else visits.row_tile.shape[0]

  def spec(block, index):
    def indices(n, i, *refs):
      return index(n, i, _visit(plan, i, refs))
    return pl.BlockSpec(block, indices)

  operands = [x_MK, *weights.arrays]
  specs = [spec((plan.rows, depth), lambda n, i, v: (v.row_tile, 0))]
  for block, axis in weights.blocks:
    specs.append(spec(block, lambda n, i, v, axis=axis: tuple(
        v.expert if a == 0 else n if a == axis else 0 for a in range(3))))
  # Of fewer visits than experts only their rows are gathered, one a visit.
  by_visit = most < num_experts and not plan.static_visits
  vectors = dict(input=weights.input_scales_EK,
                 output=weights.output_scales_EN, bias=bias_EN)
  vectors = {k: x for k, x in vectors.items() if x is not None}
  for name, x in vectors.items():
    x = x.astype(jnp.float32)
    operands.append(x[visits.expert] if by_visit else x)
    whole = name == "input"
    specs.append(spec((operands[-1].shape[0],
                       depth if whole else plan.columns),
                      lambda n, i, v, whole=whole: (0, 0 if whole else n)))
  if row_weights_M is not None:
    padded = row_tiles * plan.rows
    row_weights = jnp.pad(row_weights_M.astype(jnp.float32),
                          (0, padded - num_rows))
    operands.append(row_weights.reshape(row_tiles, 1, plan.rows))
    specs.append(spec((1, 1, plan.rows), lambda n, i, v: (v.row_tile, 0, 0)))
    vectors["row_weights"] = None

  parts = pl.cdiv(depth, plan.depth)
  scratch = [pltpu.VMEM(shape, dtype) for shape, dtype in weights.scratch]
  if weights.cache:
    kept, width = weights.cache
    if not plan.keep:
      kept = min(kept, 2 * plan.depth)
    scratch.append(pltpu.VMEM((kept // 2, width), jnp.int32) if weights.words
                   else pltpu.VMEM((kept, width), x_MK.dtype))
    if parts > 1:
      scratch.append(pltpu.VMEM((plan.rows, plan.columns), jnp.float32))
  arrays = () if plan.static_visits else visits[:-1]
  kernel = functools.partial(
      _kernel, plan=plan, weights=weights, num_arrays=len(arrays),
      vectors=tuple(vectors), by_visit=by_visit)
  return pl.pallas_call(
      kernel,
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=len(arrays),
          grid=(tiles,
                most if plan.static_visits else visits.count),
          in_specs=specs,
          out_specs=spec((plan.rows, plan.columns // half),
                         lambda n, i, v: (v.row_tile, n)),
          scratch_shapes=scratch),
      out_shape=vma.shape_like((x_MK, arrays, operands),
                               (num_rows, num_outputs)),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "arbitrary"),
          vmem_limit_bytes=plan.vmem_bytes),
      cost_estimate=pl.CostEstimate(
          flops=2 * num_rows * depth * num_outputs * half, transcendentals=0,
          bytes_accessed=sum(x.nbytes for x in operands)),
      interpret=plan.interpret, name="expert_matmul")(*arrays, *operands)


def _kernel(*refs, plan: Plan, weights: Operand, num_arrays: int,
            vectors: tuple[str, ...], by_visit: bool):
  refs, rest = refs[:num_arrays], refs[num_arrays:]
  tile, i = pl.program_id(0), pl.program_id(1)
  v = _visit(plan, i, refs)
  x_ref, rest = rest[0], rest[1:]
  w_refs, rest = rest[:len(weights.arrays)], rest[len(weights.arrays):]
  vector_refs = dict(zip(vectors, rest))
  out_ref, *scratch = rest[len(vectors):]
  prepared = scratch[:len(weights.scratch)]
  depth = x_ref.shape[1]

  def vector(name):
    return vector_refs[name][pl.ds(i if by_visit else v.expert, 1), :]

  def rows(start, end):
    x = x_ref[:, start:end]
    if "input" in vectors:
      x = (x.astype(jnp.float32) * vector("input")[:, start:end]
           ).astype(x.dtype)
    return x

  def dot(start, end, w_ref, at=None):
    """at: where that depth begins in w_ref."""
    x, at = rows(start, end), start if at is None else at
    stop = at + end - start
    if weights.outputs_first:
      w, axis = w_ref[..., start:end], 1
    elif weights.words:
      w, axis = w_ref[at // 2:stop // 2, :], 0
    else:
      w, axis = w_ref[..., at:stop, :], 0
    if weights.words:
      w = pltpu.bitcast(w, x.dtype)
    return lax.dot_general(
        x, w.reshape(w.shape[-2:]), (((1,), (axis,)), ((), ())),
        precision=(lax.Precision.HIGHEST if x.dtype == jnp.float32 else
                   lax.Precision.DEFAULT),
        preferred_element_type=jnp.float32)

  def finish(y):
    if "output" in vectors:
      y *= vector("output")
    if "bias" in vectors:
      y += vector("bias")
    if plan.swiglu_limit is None:
      _write(y, slice(None))
      return
    for a in range(0, y.shape[1], 2 * LANES):
      gate, up = y[:, a:a + LANES], y[:, a + LANES:a + 2 * LANES]
      _write(reference.clamped_swiglu(gate, up, plan.swiglu_limit),
             slice(a // 2, a // 2 + LANES))

  def _write(y, columns):
    if "row_weights" in vectors:
      y *= _column(vector_refs["row_weights"][0])
    y = y.astype(out_ref.dtype)
    if not plan.static_visits:
      row = v.row_tile * plan.rows + lax.broadcasted_iota(
          jnp.int32, y.shape, 0)
      others = jnp.where(v.flags & schedule.NEW_TILE > 0,
                         jnp.zeros_like(y), out_ref[:, columns])
      y = jnp.where((row >= v.start) & (row < v.end), y, others)
    out_ref[:, columns] = y

  def fill_and_multiply(prepare, fill):
    cache = scratch[len(prepared)]
    prepare and prepare(w_refs, prepared)
    for start in range(0, depth, plan.depth):
      end = min(start + plan.depth, depth)
      # Not kept, two parts have room, by turns.
      at = () if plan.keep else (start % (2 * plan.depth),)
      fill(w_refs, prepared, cache, start, end, tile, *at)
      y = dot(start, end, cache, *at)
      if plan.depth >= depth:
        break
      acc_ref = scratch[-1]
      if start == 0:
        acc_ref[...] = y
      elif end < depth:
        acc_ref[...] += y
      else:
        y += acc_ref[...]
    finish(y)

  def exactly():
    if not plan.keep:
      fill_and_multiply(weights.prepare_exact, weights.fill_exact)
      return
    weights.prepare_exact(w_refs, prepared)
    weights.fill_exact(w_refs, prepared, scratch[len(prepared)], 0, depth,
                       tile)

  if weights.cache is None:
    some = True if plan.static_visits else v.end > v.start
    @_when(some)
    def _():
      finish(dot(0, depth, w_refs[0]))
  else:
    new = not plan.keep or v.flags & schedule.NEW_EXPERT > 0
    if plan.static_visits:
      some, exact = True, False
    else:
      some = v.end > v.start
      exact = new & (v.flags & schedule.LARGE_SCALES > 0) & some
      new = new & ~exact & some
    if weights.fill_exact and exact is not False:
      _when(exact)(exactly)
    _when(new)(lambda: fill_and_multiply(weights.prepare, weights.fill))
    if plan.keep:
      later = not new if isinstance(new, bool) else some & ~new
      _when(later)(lambda: finish(dot(0, depth, scratch[len(prepared)])))

  if not plan.static_visits:
    # Row tiles past the last group.
    @pl.when(v.end <= v.start)
    def _():
      out_ref[...] = jnp.zeros_like(out_ref)


def _column(row):
  """[1, R] to [R, 1]: the diagonal of R equal rows."""
  size = row.shape[1]
  square = lax.broadcasted_iota(jnp.int32, (size, size), 0)
  chosen = square == lax.broadcasted_iota(jnp.int32, (size, size), 1)
  return jnp.sum(jnp.where(chosen, row, 0), 1, keepdims=True)
