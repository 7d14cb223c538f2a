"""The decode form of windowed attention: a few queries over a cache."""
import jax.numpy as jnp

from pallas_kernels import choice, platforms, vma
from pallas_kernels.windowed_attention import (decode_gpu, decode_tpu,
                                               decode_xla, reference)
from pallas_kernels.windowed_attention.options import CacheOptions

# Each has unsupported() and forward(), as in decode_xla.py.
IMPLEMENTATIONS = {"xla": decode_xla, "pallas-tpu": decode_tpu,
                   "pallas-gpu": decode_gpu}
# What "auto" takes the first supported one of, by platform, before "xla".
PREFERRED = {"tpu": ("pallas-tpu",), "gpu": ("pallas-gpu",)}


def cached_attention(q_BTNH, k_BTKH, v_BTKH, k_BSKH, v_BSKH, q_positions_BT,
                     k_positions_BS, *, window, scale, sinks_N=None,
                     soft_cap=None, v_head_dim: int | None = None,
                     implementation: str = "auto", blocks=None,
                     interpret=False):
  """Attention of a row's newest tokens, one or a few, over what came before.

  A query sees its last `window` keys, its own included: those of the cache
  and, causally, those of the other new tokens. The cache is that from before
  these: a step that reads what it has just written would have XLA copy all of
  it. Cached keys that stand where the row's first query stands or later are
  guesses that failed, and seen by none: so speculation needs no undoing, if a
  ring has room for the window and all guesses but one.

  Args:
    k_BTKH, v_BTKH: the queries' own keys and values.
    k_BSKH, v_BSKH: the cache, its slots in any order. On an accelerator it
      best lies in memory as [B, S, K * H].
    q_positions_BT: int32, where each query stands; -1 marks padding, which
      sees nothing (and gives zero) and is seen by none.
    k_positions_BS: int32, where each cached key stands; -1 marks an empty
      slot.
    v_head_dim: with None for both values, how many of the keys' first numbers
      are the values (the latents of multi-head latent attention).
    implementation: "xla", "pallas-tpu", "pallas-gpu", "reference" or "auto":
      the best one that the platform compiled for supports.
    (The others as in `windowed_attention`.)

  Returns:
    [B, T, N, the values' head_dim] of q's dtype; softmax in float32.

  Raises:
    ValueError: shapes, dtypes, the window or the implementation do not fit.
    NotImplementedError: the implementation named does not support these.
  """
  _validate(q_BTNH, k_BTKH, v_BTKH, k_BSKH, v_BSKH, q_positions_BT,
            k_positions_BS, window, sinks_N, v_head_dim)
  *arrays, sinks_N = vma.aligned(
      q_BTNH, k_BTKH, v_BTKH, k_BSKH, v_BSKH, q_positions_BT, k_positions_BS,
      sinks_N)
  options = CacheOptions(window, scale, soft_cap, v_head_dim, blocks,
                         interpret)
  if implementation == "reference":
    return reference.cached_attention(*arrays, sinks_N, options)
  name = choice.choose(
      IMPLEMENTATIONS, PREFERRED.get(platforms.platform(), ()), implementation,
      (*arrays, options), ("reference",))
  return choice.run(IMPLEMENTATIONS, "forward", name, implementation == "auto",
                    *arrays, sinks_N, options=options)


def unsupported(implementation: str, *arrays, window, scale, soft_cap=None,
                v_head_dim=None, blocks=None) -> str | None:
  """Why an implementation cannot do this; None if it can."""
  return IMPLEMENTATIONS[implementation].unsupported(
      *arrays, CacheOptions(window, scale, soft_cap, v_head_dim, blocks))


def _require(condition, message):
  if not condition:
    raise ValueError(message)


def _validate(q, k_own, v_own, k, v, q_positions, k_positions, window, sinks,
              v_head_dim):
  _require(q.ndim == k_own.ndim == k.ndim == 4 and k.shape[0] == q.shape[0]
           and k_own.shape == (*q.shape[:2], *k.shape[2:])
           and q.shape[3] == k.shape[3],
           f"q {q.shape}, own keys {k_own.shape} and cached keys {k.shape}: "
           "expected [B, T, N, H], [B, T, K, H] and [B, S, K, H]")
  _require(0 not in (*q.shape, *k.shape),
           f"q {q.shape} and cached keys {k.shape}: nothing to attend")
  _require(q.shape[2] % k.shape[2] == 0,
           f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key "
           "heads")
  if v is None:
    _require(v_own is None and v_head_dim is not None
             and 1 <= v_head_dim <= k.shape[3],
             f"v_head_dim={v_head_dim}: without values expected how many of "
             f"the keys' {k.shape[3]} numbers are the values, and None for "
             "both values")
  else:
    _require(v_own is not None and v_head_dim is None
             and v.shape[:3] == k.shape[:3] and v.ndim == 4 and v.shape[3] > 0
             and v_own.shape == (*k_own.shape[:3], v.shape[3]),
             f"own values {getattr(v_own, 'shape', None)}, cached values "
             f"{v.shape} and v_head_dim={v_head_dim}: expected values like "
             f"the keys {k_own.shape} and {k.shape}, but for the last axis, "
             "and no v_head_dim")
  _require(q_positions.shape == q.shape[:2]
           and k_positions.shape == k.shape[:2]
           and jnp.issubdtype(q_positions.dtype, jnp.integer)
           and jnp.issubdtype(k_positions.dtype, jnp.integer),
           f"positions {q_positions.dtype}{q_positions.shape} and "
           f"{k_positions.dtype}{k_positions.shape}: expected integers "
           f"{q.shape[:2]} and {k.shape[:2]}")
  _require(window is None or window >= 1,
           f"window={window}: a query sees at least its own key; use None for "
           "no window")
  _require(sinks is None or sinks.shape == (q.shape[2],),
           f"sinks {getattr(sinks, 'shape', None)}: expected one for each of "
           f"{q.shape[2]} query heads")
