"""Attention over a cache by XLA, which neither moves nor joins what it holds.

The few keys of the queries themselves are scored beside the cache's, and only
the scores are put together.
"""
import functools

import jax.numpy as jnp

from pallas_kernels.windowed_attention import reference


def unsupported(*_) -> str | None:
  return None


def forward(q_BTNH, k_BTKH, v_BTKH, k_BSKH, v_BSKH, q_positions_BT,
            k_positions_BS, sinks_N, options):
  """[B, T, N, the values' head_dim], of q's dtype."""
  if v_BSKH is None:
    # All columns are multiplied: a slice of the cache would be copied.
    v_BTKH, v_BSKH = k_BTKH, k_BSKH
  einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  q_BKGTH = reference.grouped(q_BTNH, k_BSKH.shape[2])
  s_BKGTS = options.scale * jnp.concatenate(
      [einsum("BKGTH,BSKH->BKGTS", q_BKGTH, k) for k in (k_BSKH, k_BTKH)], -1)
  if options.soft_cap is not None:
    s_BKGTS = options.soft_cap * jnp.tanh(s_BKGTS / options.soft_cap)
  seen_BTS = jnp.concatenate([
      reference.visible_in_cache(q_positions_BT, k_positions_BS,
                                 options.window),
      reference.visible_of_own(q_positions_BT, options.window)], -1)
  p_BKGTS = reference.softmax(s_BKGTS, seen_BTS, sinks_N).astype(v_BSKH.dtype)
  slots = k_BSKH.shape[1]
  o_BKGTH = einsum("BKGTS,BSKH->BKGTH", p_BKGTS[..., :slots], v_BSKH)
  o_BKGTH += einsum("BKGTS,BSKH->BKGTH", p_BKGTS[..., slots:], v_BTKH)
  return reference.ungrouped(o_BKGTH)[..., :options.v_head_dim].astype(
      q_BTNH.dtype)
