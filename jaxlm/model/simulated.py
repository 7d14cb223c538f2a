"""Numbers of few bits, simulated: rounded to them, computed with as floats.

Rounding has no gradient of its own. What is rounded here passes its gradient
straight through (arXiv 1308.3432, section 3.1): parameters stay float32 and
are rounded anew in each forward pass.
"""
import jax

from jaxlm.parallel import mesh
from pallas_kernels.quant import is_quantized
from pallas_kernels.quant.fp8 import round_to_fp8
from pallas_kernels.quant.mxfp4 import round_to_mxfp4

SIMULATIONS = ("none", "mxfp4_experts", "fp8")


def _straight_through(function):
  """`function`, with the gradient of the identity."""
  through = jax.custom_jvp(function)
  through.defjvp(lambda x, dx: (function(*x), *dx))
  return through


_in_mxfp4 = _straight_through(round_to_mxfp4)
_weight_in_fp8 = _straight_through(lambda w: round_to_fp8(w))
_rows_in_fp8 = _straight_through(lambda x: round_to_fp8(x, rows=1))


@jax.custom_vjp
def _gradient_in_fp8(y):
  return y


_gradient_in_fp8.defvjp(lambda y: (y, None),
                        lambda _, dy: (round_to_fp8(dy, rows=1),))


def fp8_matmul(matmul, x, w):
  """`matmul(x, w)`, of [..., D] by [..., D, F], as FP8 training computes it.

  All three matmuls get E4M3 (arXiv 2412.19437, section 3.3): this one x and w,
  those of the gradients the incoming gradient too. x and that gradient have a
  scale for each 1 x 128 tile, weights for each 128 x 128 block, powers of two
  as in `FP8`. Sums are as exact as x's dtype has them. What is left out: for
  the gradient of w the paper scales tiles of 128 tokens, here the same tiles
  serve both.
  """
  return _gradient_in_fp8(matmul(_rows_in_fp8(x), _weight_in_fp8(w)))


def parameters(params: dict, simulate: str) -> dict:
  """What a forward pass under `simulate` computes with in their place.

  Raises:
    ValueError: nothing there can be simulated so, or not under this mesh.
  """
  if simulate == "none":
    return params
  if any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized))):
    raise ValueError(f"execution.simulate={simulate!r}, but parameters are "
                     "quantized already: use 'none'")
  if simulate == "fp8":
    split = [f"{name}={mesh.axis_size(name)}" for name in ("context", "tensor")
             if mesh.axis_size(name) > 1]
    if split:
      raise ValueError(f"execution.simulate='fp8' under a mesh of "
                       f"{', '.join(split)}, which may cut blocks that have "
                       "one scale: use its other axes")
    return params
  rounded = jax.tree.map_with_path(_rounded_expert, params)
  if all(x is y for x, y in zip(*map(jax.tree.leaves, (params, rounded)))):
    raise ValueError(f"execution.simulate={simulate!r}, but the model has no "
                     "experts: use another simulation")
  return rounded


def _rounded_expert(path, w):
  *_, parent, name = ("", *(key.key for key in path))
  if parent != "moe" or name not in ("gate_up", "up", "down"):
    return w
  try:
    return _in_mxfp4(w)
  except ValueError as error:
    raise ValueError(f"execution.simulate='mxfp4_experts': {name}: {error}"
                     ) from error
