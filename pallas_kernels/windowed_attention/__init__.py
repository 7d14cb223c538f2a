"""Causal grouped-query attention with a sliding window and learned sinks."""
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import choice, platforms, vma
from pallas_kernels.windowed_attention import gpu, reference, tpu, xla
from pallas_kernels.windowed_attention.decode import cached_attention
from pallas_kernels.windowed_attention.options import Options

# Each has unsupported(), forward() and backward(), as in xla.py.
IMPLEMENTATIONS = {"xla": xla, "pallas-tpu": tpu, "pallas-gpu": gpu}
# What "auto" takes the first supported one of, by platform, before "xla".
PREFERRED = {"tpu": ("pallas-tpu",), "gpu": ("pallas-gpu",)}


def windowed_attention(q_BTNH, k_BSKH, v_BSKH, *, window, scale, sinks_N=None,
                       soft_cap=None, segment_ids=None, q_offset: int = 0,
                       implementation: str = "auto", blocks=None,
                       interpret=False):
  """Attention in which a query sees its last `window` keys.

  Args:
    q_BTNH: queries; query t stands at position t + q_offset.
    k_BSKH: keys at positions 0 to S - 1; N is a multiple of K.
    v_BSKH: values; their head_dim may differ from that of the keys.
    window: how many keys a query sees, its own included; None sees all.
    scale: multiplies q k.
    sinks_N: one logit for each query head, unscaled, which joins the softmax
      and carries no value.
    soft_cap: scores become soft_cap * tanh(scores / soft_cap).
    segment_ids: int32 [B, S]; a query sees keys of its own segment only.
    q_offset: position of the first query.
    implementation: "xla" (in chunks, on every platform), "pallas-tpu",
      "pallas-gpu", "reference" (all T x S scores) or "auto": the best one that
      the platform compiled for supports. All but the reference do work
      proportional to the band and need memory O(T), backward too.
    blocks: sizes of a Pallas implementation's blocks; None takes those found
      best for the device compiled for.
    interpret: runs a Pallas implementation in Pallas's interpreter, on any
      platform: True, or `pltpu.InterpretParams`.

  Returns:
    [B, T, N, the values' head_dim] of q's dtype; softmax in float32.
    Differentiable in q, k, v and the sinks.

  Raises:
    ValueError: shapes, the window or the implementation do not fit.
    NotImplementedError: the implementation named does not support these.
  """
  _validate(q_BTNH, k_BSKH, v_BSKH, window, sinks_N, segment_ids, q_offset)
  if window is not None and window >= k_BSKH.shape[1]:
    window = None
  options = Options(window, scale, soft_cap, q_offset, blocks, interpret)
  if implementation == "reference":
    return reference.windowed_attention(q_BTNH, k_BSKH, v_BSKH, sinks_N,
                                        segment_ids, options)
  best = choice.choose(
      IMPLEMENTATIONS, PREFERRED.get(platforms.platform(), ()), implementation,
      (q_BTNH, k_BSKH, v_BSKH, segment_ids, options), ("reference",))
  return _attention(best, implementation == "auto", options, *vma.aligned(
      q_BTNH, k_BSKH, v_BSKH, sinks_N, segment_ids))


def unsupported(implementation: str, q_BTNH, k_BSKH, v_BSKH, *, window, scale,
                soft_cap=None, segment_ids=None, q_offset: int = 0,
                blocks=None) -> str | None:
  """Why an implementation cannot do this; None if it can."""
  return IMPLEMENTATIONS[implementation].unsupported(
      q_BTNH, k_BSKH, v_BSKH, segment_ids,
      Options(window, scale, soft_cap, q_offset, blocks))


_run = functools.partial(choice.run, IMPLEMENTATIONS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(name, auto, options, *args):
  return _run("forward", name, auto, *args, options=options)[0]


def _attention_forward(name, auto, options, *args):
  o, lse_BNT = _run("forward", name, auto, *args, options=options)
  return o, (*args, o, lse_BNT)


def _attention_backward(name, auto, options, residuals, do):
  *gradients, dsinks_N = _run("backward", name, auto, *residuals, do,
                              options=options)
  if dsinks_N is not None:
    dsinks_N = dsinks_N.astype(residuals[3].dtype)
  return *gradients, dsinks_N, None


_attention.defvjp(_attention_forward, _attention_backward)


def _validate(q, k, v, window, sinks_N, segment_ids, q_offset):
  if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3]:
    raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}: expected "
                     "[B, T, N, H] and twice [B, S, K, H] (of v the last may "
                     "be another)")
  if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
    raise ValueError(f"q {q.shape} and k {k.shape} differ in batch or "
                     "head_dim")
  if 0 in (*q.shape, *k.shape, *v.shape):
    raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape}: nothing to "
                     "attend")
  if q.shape[2] % k.shape[2]:
    raise ValueError(f"{q.shape[2]} query heads are not a multiple of "
                     f"{k.shape[2]} key heads")
  if window is not None and window < 1:
    raise ValueError(f"window={window}: a query sees at least its own key; "
                     "use None for no window")
  if sinks_N is not None and sinks_N.shape != (q.shape[2],):
    raise ValueError(f"sinks {sinks_N.shape}: expected one for each of "
                     f"{q.shape[2]} query heads")
  if segment_ids is not None:
    if segment_ids.shape != k.shape[:2]:
      raise ValueError(f"segment_ids {segment_ids.shape}: expected "
                       f"{k.shape[:2]}")
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
      raise ValueError(f"segment_ids are {segment_ids.dtype}: expected "
                       "integers")
  if not 0 <= q_offset <= k.shape[1] - q.shape[1]:
    raise ValueError(f"q_offset={q_offset} puts {q.shape[1]} queries past "
                     f"the {k.shape[1]} keys")
