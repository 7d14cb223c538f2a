"""The key/value cache: a ring of the window's size on sliding layers."""
import typing

import jax
import jax.numpy as jnp

from jaxlm.config import MLAConfig, ModelConfig


class LayerCache(typing.NamedTuple):
  """Keys and values of one layer; position p lives in slot p modulo slots.

  `positions_BS` says which position a slot holds, -1 none.
  """
  k_BSKH: jax.Array
  v_BSKH: jax.Array
  positions_BS: jax.Array


class LatentCache(typing.NamedTuple):
  """What latent attention keeps of one layer: for all heads together the
  latent, normalised, and the rotary key; slots as in `LayerCache`."""
  latent_BSR: jax.Array
  rope_key_BSH: jax.Array
  positions_BS: jax.Array


def cache_slots(config: ModelConfig, kind: str, max_length: int) -> int:
  if kind == "sliding":
    return min(config.attention.sliding_window, max_length)
  return max_length


def empty_cache(config: ModelConfig, batch: int, max_length: int,
                dtype=jnp.float32) -> list[LayerCache | LatentCache]:
  """One cache a layer for sequences of up to `max_length` tokens."""
  attention, caches = config.attention, []
  if isinstance(attention, MLAConfig):
    kind, shapes = LatentCache, ((attention.kv_rank,),
                                 (attention.rope_head_dim,))
  else:
    heads = (attention.num_kv_heads, attention.head_dim)
    kind, shapes = LayerCache, (heads, heads)
  for layer in config.layers:
    slots = cache_slots(config, layer.attention, max_length)
    caches.append(kind(
        *(jnp.zeros((batch, slots, *shape), dtype) for shape in shapes),
        jnp.full((batch, slots), -1, jnp.int32)))
  return caches


def write(cache, *new):
  """Puts the newest tokens in their slots; position -1 (padding) in none.

  Args:
    new: of these tokens what the cache's fields hold, [B, T, ...]; the last
      are their positions. Those ascend along T, so that of more tokens than
      slots the last stay.
  """
  slots = cache.positions_BS.shape[1]
  new = [x[:, -slots:] for x in new]
  positions = new[-1]
  row = jnp.arange(len(positions))[:, None]
  slot = jnp.where(positions < 0, slots, positions % slots)
  return type(cache)(*(
      old.at[row, slot].set(x.astype(old.dtype), mode="drop")
      for old, x in zip(cache, new, strict=True)))
