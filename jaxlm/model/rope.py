"""Rotary position embeddings and their scalings to longer contexts."""
import math
import typing

import jax.numpy as jnp
import numpy as np

from jaxlm.config import (LinearScaling, Llama3Scaling, RopeConfig,
                          YarnScaling)


class RopeTable(typing.NamedTuple):
  """cos and sin of the angles at each position, [..., T, H/2] float32."""
  cos: jnp.ndarray
  sin: jnp.ndarray


def yarn_ramp(config: YarnScaling, theta: float,
              head_dim: int) -> tuple[float, float]:
  """The dimensions between which YaRN goes from extra- to interpolation.

  arXiv 2309.00071, equation 23's inverse: the dimension that turns `beta`
  times within the original context.
  """
  def dimension(beta):
    return (head_dim * math.log(config.original_context / (beta * 2 * math.pi))
            / (2 * math.log(theta)))
  low, high = dimension(config.beta_fast), dimension(config.beta_slow)
  if config.truncate:
    low, high = math.floor(low), math.ceil(high)
  return max(low, 0), min(high, head_dim - 1)


def frequencies(config: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
  """Radians per position [H/2], and the factor of cos and sin."""
  base = config.theta ** -(np.arange(0, head_dim, 2) / head_dim)
  match config.scaling:
    case None:
      return base, 1.0
    case LinearScaling(factor):
      return base / factor, 1.0
    case Llama3Scaling() as s:
      # Smoothed between wavelengths that turn low_freq_factor and
      # high_freq_factor times within the original context.
      turns = s.original_context * base / (2 * math.pi)
      keep = np.clip((turns - s.low_freq_factor)
                     / (s.high_freq_factor - s.low_freq_factor), 0, 1)
      return keep * base + (1 - keep) * base / s.factor, 1.0
    case YarnScaling() as s:
      low, high = yarn_ramp(s, config.theta, head_dim)
      ramp = np.clip((np.arange(head_dim // 2) - low)
                     / max(high - low, 0.001), 0, 1)
      scaled = (1 - ramp) * base + ramp * base / s.factor
      return scaled, s.rotation_factor
  raise NotImplementedError(f"rope scaling {config.scaling!r}")


def rope_table(config: RopeConfig | None, head_dim: int,
               positions) -> RopeTable | None:
  """The table for integer positions [..., T]."""
  if config is None:
    return None
  radians, factor = frequencies(config, head_dim)
  angles = positions[..., None].astype(jnp.float32) * radians.astype(np.float32)
  return RopeTable(factor * jnp.cos(angles), factor * jnp.sin(angles))


def rotate(x_BTNH, table: RopeTable | None, interleaved: bool = False):
  """Rotates the two halves of each head, in float32.

  With `interleaved` it rotates pairs of neighbours, and leaves the first of
  each in the first half, the second in the second: queries and keys alike, so
  their products are those of pairs left in place.
  """
  if table is None:
    return x_BTNH
  cos, sin = table.cos[..., None, :], table.sin[..., None, :]
  x = x_BTNH.astype(jnp.float32)
  a, b = ((x[..., ::2], x[..., 1::2]) if interleaved
          else jnp.split(x, 2, -1))
  rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
  return rotated.astype(x_BTNH.dtype)
