"""Expert matmuls as a loop over blocks of rows, for the CPU.

`jax.lax.ragged_dot` on the CPU multiplies every row by every expert. Here the
rows of each expert are cut into blocks, and one loop runs over the blocks in
use: its cost follows the rows, whatever the number of experts. Three things
keep the loop near the speed of a large matmul:

- it is flat. A loop over experts around a loop over their blocks makes XLA
  copy the whole output once for every expert;
- the last block of an expert is computed at the smallest of up to eight sizes
  that holds it, so few rows are computed in vain;
- results are merged into the output in place, rows of other experts kept, so
  that neither input nor output needs padding.
"""
import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.expert_matmul import reference
from pallas_kernels.quant import is_quantized


def block_rows(num_rows: int, num_experts: int) -> int:
  """Rows of a block: about an expert's share, at most 256."""
  share = max(1, num_rows // num_experts)
  return min(num_rows, 256, max(8, 1 << (share - 1).bit_length()))


def _sizes(block: int) -> list[int]:
  """The sizes at which a block may be computed, ascending."""
  step = max(8, -(-block // 8))
  return [*range(step, block, step), block]


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


def _at_size(block: int, rows, compute):
  """`compute(size)` at the smallest size that holds `rows`."""
  sizes = _sizes(block)
  index = jnp.searchsorted(jnp.array(sizes), rows)
  return lax.switch(jnp.minimum(index, len(sizes) - 1),
                    [lambda size=size: compute(size) for size in sizes])


def unsupported(x_MD, weights, options) -> str | None:
  return None


def matmul(x_MD, weights, group_sizes_E, bias_EF, row_weights_M, options):
  """[M, D] by [E, D, F] to [M, F], or [M, F / 2] after SwiGLU."""
  return reference.finish(_matmul(x_MD, weights, group_sizes_E, bias_EF),
                          row_weights_M, swiglu_limit=options.swiglu_limit)


def input_gradient(dy_MF, weights, group_sizes_E, options):
  """[M, F] by [E, D, F] transposed to [M, D]."""
  return _matmul(dy_MF, weights, group_sizes_E, transposed=True)


def _matmul(x_MD, weights, group_sizes_E, bias_EF=None, *, transposed=False):
  """[M, D] by [E, D, F] ([E, F, D] if transposed) to [M, F]."""
  if is_quantized(weights):
    weights = weights.astype(x_MD.dtype)
  num_rows = x_MD.shape[0]
  num_experts, dim = weights.shape[0], weights.shape[1 if transposed else 2]
  block = block_rows(num_rows, num_experts)
  expert, first, end, used = _blocks(group_sizes_E, num_rows, block)
  contract = (((1,), (1 if transposed else 0,)), ((), ()))

  def body(i, y_MF):
    weight = lax.dynamic_index_in_dim(weights, expert[i], 0, False)
    start = jnp.minimum(first[i], num_rows - block)

    def compute(size):
      x = lax.dynamic_slice_in_dim(x_MD, start, size, 0)
      y = lax.dot_general(x, weight, contract,
                          preferred_element_type=jnp.float32)
      return jnp.pad(y, ((0, block - size), (0, 0)))

    y = _at_size(block, end[i] - start, compute)
    if bias_EF is not None:
      y += lax.dynamic_index_in_dim(bias_EF, expert[i], 0).astype(y.dtype)
    row = start + jnp.arange(block)
    mine = (row >= first[i]) & (row < end[i])
    others = lax.dynamic_slice_in_dim(y_MF, start, block, 0)
    y = jnp.where(mine[:, None], y.astype(y_MF.dtype), others)
    return lax.dynamic_update_slice_in_dim(y_MF, y, start, 0)

  return lax.fori_loop(0, used, body, jnp.zeros((num_rows, dim), x_MD.dtype))


def weight_gradient(x_MD, dy_MF, group_sizes_E, with_bias: bool, options):
  """The gradients of weights [E, D, F] and bias [E, F] (or None), float32."""
  num_rows, dim_in = x_MD.shape
  num_experts, dim_out = group_sizes_E.shape[0], dy_MF.shape[1]
  block = block_rows(num_rows, num_experts)
  expert, first, end, used = _blocks(group_sizes_E, num_rows, block)

  def body(i, gradients):
    start = jnp.minimum(first[i], num_rows - block)

    def compute(size):
      row = start + jnp.arange(size)
      mine = (row >= first[i]) & (row < end[i])
      x = lax.dynamic_slice_in_dim(x_MD, start, size, 0)
      dy = lax.dynamic_slice_in_dim(dy_MF, start, size, 0)
      dy = jnp.where(mine[:, None], dy, 0)
      dw = lax.dot_general(x, dy, (((0,), (0,)), ((), ())),
                           preferred_element_type=jnp.float32)
      return dw, jnp.sum(dy, 0, dtype=jnp.float32) if with_bias else None

    return jax.tree.map(lambda total, part: total.at[expert[i]].add(part),
                        gradients, _at_size(block, end[i] - start, compute))

  zeros = (jnp.zeros((num_experts, dim_in, dim_out), jnp.float32),
           jnp.zeros((num_experts, dim_out), jnp.float32)
           if with_bias else None)
  return lax.fori_loop(0, used, body, zeros)
