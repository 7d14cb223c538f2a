"""The key/value cache: a ring of the window's size on sliding layers.

Under a mesh a device holds its own sequences' slots of its own heads.
"""
import typing

import jax
import jax.numpy as jnp

from jaxlm.config import MLAConfig, ModelConfig
from jaxlm.parallel import mesh
from pallas_kernels import platforms
from pallas_kernels.windowed_attention import cached_attention


class LayerCache(typing.NamedTuple):
  """Keys and values of one layer; position p lives in slot p modulo slots.

  `positions_BS` says which position a slot holds, -1 none. I is K * H: heads
  lie side by side, as accelerators pad what is narrower than 128.
  """
  k_BSI: jax.Array
  v_BSI: jax.Array
  positions_BS: jax.Array

  slot_axes = 1, 1, 1
  logical_axes = (*2 * (("batch", None, "kv_heads"),), ("batch", None))

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

  slot_axes = 3, 2, 1
  logical_axes = (*2 * (("batch", "kv_heads", None, None),), ("batch", None))

  def keys_and_values(self, num_kv_heads: int):
    del num_kv_heads
    return self.k_BKHS.transpose(0, 3, 1, 2), self.v_BKSH.transpose(0, 2, 1, 3)


class LatentCache(typing.NamedTuple):
  """What latent attention keeps of one layer: for all heads together the
  latent, normalised, and the rotary key; slots as in `LayerCache`."""
  key_BSR: jax.Array
  positions_BS: jax.Array

  slot_axes = 1, 1
  logical_axes = ("batch", None, None), ("batch", None)


Cache = list[LayerCache | CPULayerCache | LatentCache]


def cache_slots(config: ModelConfig, kind: str, max_length: int) -> int:
  if kind == "sliding":
    return min(config.attention.sliding_window, max_length)
  return max_length


def empty_cache(config: ModelConfig, batch: int, max_length: int,
                dtype=jnp.float32) -> Cache:
  """One cache a layer for sequences of up to `max_length` tokens, as they best
  lie on the platform that is compiled for.

  Raises:
    ValueError: under a mesh that the batch or the heads do not divide over,
      or that splits sequences.
  """
  a = config.attention
  _check_mesh(batch, 0 if isinstance(a, MLAConfig) else a.num_kv_heads)
  caches = []
  for cache in abstract_cache(config, batch, max_length, dtype,
                              platforms.platform()):
    *keys, positions = (
        mesh.shard(jnp.zeros(x.shape, x.dtype), *axes)
        for x, axes in zip(cache, cache.logical_axes, strict=True))
    caches.append(type(cache)(*keys, positions - 1))  # -1: no slot is taken
  return caches


def abstract_cache(config: ModelConfig, batch: int, max_length: int, dtype,
                   platform: str) -> Cache:
  """What `empty_cache` makes on "cpu", "gpu" or "tpu", as ShapeDtypeStructs."""
  a, caches = config.attention, []
  for layer in config.layers:
    slots = cache_slots(config, layer.attention, max_length)
    if isinstance(a, MLAConfig):
      kind, shapes = LatentCache, [(slots, a.kv_rank + a.rope_head_dim)]
    elif platform == "cpu":
      kind, shapes = CPULayerCache, [(a.num_kv_heads, a.head_dim, slots),
                                     (a.num_kv_heads, slots, a.head_dim)]
    else:
      kind, shapes = LayerCache, 2 * [(slots, a.num_kv_heads * a.head_dim)]
    caches.append(kind(
        *(jax.ShapeDtypeStruct((batch, *shape), dtype) for shape in shapes),
        jax.ShapeDtypeStruct((batch, slots), jnp.int32)))
  return caches


def _check_mesh(batch: int, num_kv_heads: int = 0):
  if mesh.current() is None:
    return
  mesh.check_divides("cache", (batch, num_kv_heads), ("batch", "kv_heads"),
                     mesh.current())
  if (size := mesh.axis_size("context")) > 1:
    raise ValueError(f"a cache under a mesh of context={size}: sequences that "
                     "grow are not split, give these devices to data, expert "
                     "or tensor")


def _specs(cache):
  return type(cache)(*(mesh.spec(*axes) for axes in cache.logical_axes))


def attention(q_BTNH, k_BTKH, v_BTKH, cache, positions_BT, sinks_N, *, dtype,
              **options):
  """`cached_attention` over what a cache holds, cast to `dtype`."""
  def attend(q, k, v, cache, positions_BT, sinks_N):
    cached = (x.astype(dtype) for x in cache.keys_and_values(k.shape[2]))
    return cached_attention(q, k, v, *cached, positions_BT,
                            cache.positions_BS, sinks_N=sinks_N, **options)

  _check_mesh(len(q_BTNH))
  heads, keys, rows = (mesh.spec("batch", None, "heads"),
                       mesh.spec("batch", None, "kv_heads"),
                       mesh.spec("batch"))
  return mesh.of_each(
      attend, (heads, keys, keys, _specs(cache), rows, mesh.spec("heads")),
      heads)(q_BTNH, k_BTKH, v_BTKH, cache, positions_BT, sinks_N)


def write(cache, *new):
  """Puts the newest tokens in their slots; position -1 (padding) in none.
  (A single token of a single sequence is no padding.)

  Args:
    new: of these tokens what the cache's fields hold, [B, T, ...]; the last
      are their positions. Those ascend along T, so that of more tokens than
      slots the last stay.
  """
  _check_mesh(len(new[-1]))
  specs = _specs(cache)
  axes = {4: ("batch", None, "kv_heads")}
  return mesh.of_each(
      _write, (specs, *(mesh.spec(*axes.get(x.ndim, ("batch",)))
                        for x in new)), specs)(cache, *new)


def _write(cache, *new):
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
      x = jnp.moveaxis(x, 1, axis)
      if mesh.current() is not None:
        # One of several sequences, which may be padding.
        there = jax.lax.dynamic_slice_in_dim(old, slot[0, 0], 1, axis)
        x = jnp.where(positions[0, 0] < 0, there, x)
      return jax.lax.dynamic_update_slice_in_dim(old, x, slot[0, 0], axis)
    place = (row, *(slice(None),) * (axis - 1), slot)
    return old.at[place].set(x, mode="drop")

  return type(cache)(*map(put, cache, new, cache.slot_axes))
