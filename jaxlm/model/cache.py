"""The key/value cache: a ring of the window's size on sliding layers."""
import typing

import jax
import jax.numpy as jnp

from jaxlm.config import MLAConfig, ModelConfig
from pallas_kernels import platforms


class LayerCache(typing.NamedTuple):
  """Keys and values of one layer; position p lives in slot p modulo slots.

  `positions_BS` says which position a slot holds, -1 none. I is K * H: heads
  lie side by side, as accelerators pad what is narrower than 128.
  """
  k_BSI: jax.Array
  v_BSI: jax.Array
  positions_BS: jax.Array

  @property
  def slot_axes(self):
    return 1, 1, 1

  def keys_and_values(self, num_kv_heads: int):
    """Both as [B, S, K, H]."""
    return (x.reshape(*x.shape[:2], num_kv_heads, -1)
            for x in (self.k_BSI, self.v_BSI))


class CPULayerCache(typing.NamedTuple):
  """The same for a CPU: keys and values lie as they are multiplied, so that a
  step moves none of them."""
  k_BKHS: jax.Array
  v_BKSH: jax.Array
  positions_BS: jax.Array

  @property
  def slot_axes(self):
    return 3, 2, 1

  def keys_and_values(self, num_kv_heads: int):
    del num_kv_heads
    return self.k_BKHS.transpose(0, 3, 1, 2), self.v_BKSH.transpose(0, 2, 1, 3)


class LatentCache(typing.NamedTuple):
  """What latent attention keeps of one layer: for all heads together the
  latent, normalised, and the rotary key; slots as in `LayerCache`."""
  key_BSR: jax.Array
  positions_BS: jax.Array

  @property
  def slot_axes(self):
    return 1, 1


Cache = list[LayerCache | CPULayerCache | LatentCache]


def cache_slots(config: ModelConfig, kind: str, max_length: int) -> int:
  if kind == "sliding":
    return min(config.attention.sliding_window, max_length)
  return max_length


def empty_cache(config: ModelConfig, batch: int, max_length: int,
                dtype=jnp.float32) -> Cache:
  """One cache a layer for sequences of up to `max_length` tokens, as they best
  lie on the platform that is compiled for."""
  a, caches = config.attention, []
  on_cpu = platforms.platform() == "cpu"
  for layer in config.layers:
    slots = cache_slots(config, layer.attention, max_length)
    if isinstance(a, MLAConfig):
      kind, shapes = LatentCache, [(slots, a.kv_rank + a.rope_head_dim)]
    elif on_cpu:
      kind, shapes = CPULayerCache, [(a.num_kv_heads, a.head_dim, slots),
                                     (a.num_kv_heads, slots, a.head_dim)]
    else:
      kind, shapes = LayerCache, 2 * [(slots, a.num_kv_heads * a.head_dim)]
    caches.append(kind(*(jnp.zeros((batch, *shape), dtype)
                         for shape in shapes),
                       jnp.full((batch, slots), -1, jnp.int32)))
  return caches


def write(cache, *new):
  """Puts the newest tokens in their slots; position -1 (padding) in none.
  (A single token of a single sequence is no padding.)

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

  def put(old, x, axis):
    x = x.astype(old.dtype)
    if old.ndim < x.ndim:
      x = x.reshape(*x.shape[:2], -1)
    if positions.size == 1:
      # In place, where a scatter has the whole cache copied, and twice.
      return jax.lax.dynamic_update_slice_in_dim(
          old, jnp.moveaxis(x, 1, axis), slot[0, 0], axis)
    place = (row, *(slice(None),) * (axis - 1), slot)
    return old.at[place].set(x, mode="drop")

  return type(cache)(*map(put, cache, new, cache.slot_axes))
