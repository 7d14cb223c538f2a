"""The key/value cache: a ring of the window's size on sliding layers."""
import typing

import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig


class LayerCache(typing.NamedTuple):
  """Keys and values of one layer; position p lives in slot p modulo slots.

  `positions_BS` says which position a slot holds, -1 none.
  """
  k_BSKH: jax.Array
  v_BSKH: jax.Array
  positions_BS: jax.Array


def cache_slots(config: ModelConfig, kind: str, max_length: int) -> int:
  if kind == "sliding":
    return min(config.attention.sliding_window, max_length)
  return max_length


def empty_cache(config: ModelConfig, batch: int, max_length: int,
                dtype=jnp.float32) -> list[LayerCache]:
  """One cache a layer for sequences of up to `max_length` tokens."""
  attention, caches = config.attention, []
  for layer in config.layers:
    slots = cache_slots(config, layer.attention, max_length)
    shape = (batch, slots, attention.num_kv_heads, attention.head_dim)
    caches.append(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype),
                             jnp.full((batch, slots), -1, jnp.int32)))
  return caches


def write(cache: LayerCache, k_BTKH, v_BTKH, positions_BT) -> LayerCache:
  """Puts the newest tokens in their slots; position -1 (padding) in none.

  Positions ascend along T, so that of more tokens than slots the last stay.
  """
  slots = cache.positions_BS.shape[1]
  k, v, positions = (x[:, -slots:] for x in (k_BTKH, v_BTKH, positions_BT))
  row = jnp.arange(k.shape[0])[:, None]
  slot = jnp.where(positions < 0, slots, positions % slots)
  return LayerCache(
      cache.k_BSKH.at[row, slot].set(k.astype(cache.k_BSKH.dtype),
                                     mode="drop"),
      cache.v_BSKH.at[row, slot].set(v.astype(cache.v_BSKH.dtype),
                                     mode="drop"),
      cache.positions_BS.at[row, slot].set(positions, mode="drop"))
