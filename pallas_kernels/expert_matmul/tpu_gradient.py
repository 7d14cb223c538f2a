"""The gradient of the weights: of each expert, its rows of x transposed times
its rows of dy.

The grid is (tiles of inputs, tiles of outputs, visits), the last with every
expert at least once (tpu_schedule.py). A tile of the result, float32, stays
in VMEM over the visits of its expert and is written to memory once, 4 bytes a
weight. For 512 rows an expert a tile of 1024 by 1024 costs 1.1 GFLOP, 2 MB of
rows fetched and 4 MB written: 5.5, 1.2 and 0.9 us of matrix unit on v5e, v6e
and 7x, 7.7, 3.8 and 1.7 us of memory. So it is memory that bounds it, and
tiles need only be large enough that the rows are a small part of that.
"""
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import vma
from pallas_kernels.expert_matmul import tpu_schedule as schedule


def weight_gradient(x_MD, dy_MF, num_experts: int, visits, *, rows: int,
                    inputs: int, outputs: int, vmem_bytes=None,
                    interpret=False):
  """float32 [E, D, F]; zeros for experts without rows."""
  dim_in, dim_out = x_MD.shape[1], dy_MF.shape[1]
  return pl.pallas_call(
      _kernel,
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=5,
          grid=(pl.cdiv(dim_in, inputs), pl.cdiv(dim_out, outputs),
                visits.count),
          in_specs=[
              pl.BlockSpec((rows, inputs),
                           lambda d, f, i, row_tile, *_: (row_tile[i], d)),
              pl.BlockSpec((rows, outputs),
                           lambda d, f, i, row_tile, *_: (row_tile[i], f))],
          out_specs=pl.BlockSpec(
              (1, inputs, outputs),
              lambda d, f, i, _, expert, *__: (expert[i], d, f))),
      out_shape=vma.shape_like((visits, x_MD, dy_MF),
                               (num_experts, dim_in, dim_out), jnp.float32),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "parallel", "arbitrary"),
          vmem_limit_bytes=vmem_bytes),
      cost_estimate=pl.CostEstimate(
          flops=2 * len(x_MD) * dim_in * dim_out, transcendentals=0,
          bytes_accessed=(x_MD.nbytes + dy_MF.nbytes
                          + 4 * num_experts * dim_in * dim_out)),
      interpret=interpret, name="expert_weight_gradient")(
          *visits[:-1], x_MD, dy_MF)


def _kernel(row_tile, expert, start, end, flags, x_ref, dy_ref, out_ref):
  i = pl.program_id(2)
  first_row = row_tile[i] * x_ref.shape[0]

  def mine(ref):
    # Both sides: a row that is not may be past the last, where anything lies.
    row = first_row + lax.broadcasted_iota(jnp.int32, ref.shape, 0)
    return jnp.where((row >= start[i]) & (row < end[i]), ref[...],
                     jnp.zeros_like(ref))

  @pl.when(flags[i] & schedule.NEW_EXPERT > 0)
  def _():
    out_ref[...] = jnp.zeros_like(out_ref)

  @pl.when(end[i] > start[i])
  def _():
    x = mine(x_ref)
    out_ref[0] += lax.dot_general(
        x, mine(dy_ref), (((0,), (0,)), ((), ())),
        precision=(lax.Precision.HIGHEST if x.dtype == jnp.float32 else
                   lax.Precision.DEFAULT),
        preferred_element_type=jnp.float32)
