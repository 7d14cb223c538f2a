"""Weights, norms, matmuls and dropout."""
from typing import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import NormConfig


def weight(module: nn.Module, name: str, shape: tuple[int, ...],
           axes: tuple[str, ...], init: Callable):
  """Declares a float32 weight on init; returns the leaf that is there on apply.

  The leaf may be of another dtype or quantized, so Linen's shape check is
  passed by: whoever loads parameters compares them with the abstract tree.
  """
  if module.is_initializing():
    return module.param(name, nn.with_logical_partitioning(init, axes), shape,
                        jnp.float32)
  return module.get_variable("params", name)


def fan_in(scale: float = 1.0, axis: int | tuple[int, ...] = -2):
  """Normal with variance scale^2 / (size of the contracted axes)."""
  axes = (axis,) if isinstance(axis, int) else axis
  def init(key, shape, dtype):
    size = 1
    for a in axes:
      size *= shape[a]
    return scale * size ** -0.5 * jax.random.normal(key, shape, dtype)
  return init


def normalize(x, scale, bias, config: NormConfig):
  """RMSNorm or LayerNorm over the last axis, in float32, cast to x's dtype."""
  y = x.astype(jnp.float32)
  if config.kind == "layernorm":
    y -= jnp.mean(y, -1, keepdims=True)
  y *= jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + config.eps)
  y *= scale.astype(jnp.float32) + config.scale_offset
  if bias is not None:
    y += bias.astype(jnp.float32)
  return y.astype(x.dtype)


class Norm(nn.Module):
  config: NormConfig

  @nn.compact
  def __call__(self, x):
    shape = x.shape[-1:]
    offset = self.config.scale_offset
    scale = weight(self, "scale", shape, ("norm",),
                   nn.initializers.constant(1 - offset))
    bias = None
    if self.config.kind == "layernorm":
      bias = weight(self, "bias", shape, ("norm",), nn.initializers.zeros)
    return normalize(x, scale, bias, self.config)


def soft_cap(x, cap: float | None):
  return x if cap is None else cap * jnp.tanh(x / cap)


def dropout(x, rate: float, key):
  """Zeroes entries with probability `rate` and rescales; no key, no dropout."""
  if key is None or rate == 0:
    return x
  keep = jax.random.bernoulli(key, 1 - rate, x.shape)
  return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
