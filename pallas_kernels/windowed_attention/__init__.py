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
    segment_ids: int32 [B, S]; a query sees keys of its own segment only. Or
      a pair, the queries' [B, T] and the keys' [B, S].
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
  options = Options(window, scale, soft_cap, q_offset, blocks, interpret)
  args, options = _prepared(q_BTNH, k_BSKH, v_BSKH, sinks_N, segment_ids,
                            options)
  if implementation == "reference":
    return reference.windowed_attention(*args, options)
  return _attention(*_chosen(implementation, args, options), options, *args)


def attend_part(q_BTNH, k_BSKH, v_BSKH, *, window, scale, sinks_N=None,
                soft_cap=None, segment_ids=None, q_offset: int = 0,
                implementation: str = "auto", blocks=None, interpret=False):
  """`windowed_attention` and, float32 [B, N, T], the logarithm of the
  softmax's denominator: with these, attention over several parts of the keys
  can be put together. Not differentiable: see `part_gradients`.

  A query that sees no key gives zero and the logarithm its sink alone; without
  sinks every query must see one.
  """
  options = Options(window, scale, soft_cap, q_offset, blocks, interpret)
  args, options = _prepared(q_BTNH, k_BSKH, v_BSKH, sinks_N, segment_ids,
                            options)
  return _run("forward", *_chosen(implementation, args, options), *args,
              options=options)


def part_gradients(q_BTNH, k_BSKH, v_BSKH, o_BTNH, lse_BNT, do_BTNH, *, window,
                   scale, soft_cap=None, segment_ids=None, q_offset: int = 0,
                   implementation: str = "auto", blocks=None, interpret=False):
  """What these keys add to the gradient of q, and their and their values'.

  Args:
    o_BTNH, lse_BNT: the output over all parts, and its denominator's
      logarithm.
  """
  options = Options(window, scale, soft_cap, q_offset, blocks, interpret)
  args, options = _prepared(q_BTNH, k_BSKH, v_BSKH, None, segment_ids, options)
  chosen = _chosen(implementation, args, options)
  return _run("backward", *chosen, *args, o_BTNH, lse_BNT, do_BTNH,
              options=options)[:3]


def _prepared(q, k, v, sinks_N, segment_ids, options):
  """The arguments, checked, as implementations take them."""
  if segment_ids is not None and not isinstance(segment_ids, tuple):
    own = segment_ids[..., options.q_offset:options.q_offset + q.shape[1]]
    segment_ids = own, segment_ids
  _validate(q, k, v, options.window, sinks_N, segment_ids, options.q_offset)
  if options.window is not None and options.window >= k.shape[1]:
    options = options._replace(window=None)
  return vma.aligned(q, k, v, sinks_N, segment_ids), options


def _chosen(implementation, args, options) -> tuple[str, bool]:
  q, k, v, _, segment_ids = args
  name = choice.choose(
      IMPLEMENTATIONS, PREFERRED.get(platforms.platform(), ()), implementation,
      (q, k, v, segment_ids, options), ("reference",))
  return name, implementation == "auto"


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
    for x, of in zip(segment_ids, (q, k), strict=True):
      if x.shape != of.shape[:2]:
        raise ValueError(f"segment_ids {x.shape}: expected {of.shape[:2]}")
      if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"segment_ids are {x.dtype}: expected integers")
  if not 0 <= q_offset <= k.shape[1] - q.shape[1]:
    raise ValueError(f"q_offset={q_offset} puts {q.shape[1]} queries past "
                     f"the {k.shape[1]} keys")
