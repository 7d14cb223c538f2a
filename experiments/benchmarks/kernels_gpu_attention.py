"""The attention part of kernels_gpu: windows over long sequences, forward and
backward, and one query over a cache."""
import functools
import importlib.util
import sys

import jax
import jax.numpy as jnp
from jax import lax

from experiments.benchmarks.gpu_timing import report, seconds
from pallas_kernels.windowed_attention import (cached_attention,
                                               windowed_attention)

# Name: query heads, kv heads, head_dim, window, sinks.
MODELS = {"gpt-oss-20b": (64, 8, 64, 128, True),
          "Gemma 3 27B": (32, 16, 128, 1024, False)}
STEPS = 50  # of decoding in one program


def normal(seed: int, *shape):
  return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def inputs(length: int, heads: int, kv_heads: int, head_dim: int):
  """q, k, v and a cotangent."""
  return [normal(seed, 1, length, n, head_dim)
          for seed, n in enumerate((heads, kv_heads, kv_heads, heads))]


def floor(arrays, passes: str, rate: float) -> float:
  """Seconds in which a copy moves what the pass has to: q, k, v in and o out,
  and backward also o and its cotangent in and three gradients out."""
  q, k, v, do = (x.nbytes for x in arrays)
  return (q + k + v + do + (passes == "backward") * (q + k + v + do)) / rate


def of_jax(attention, arrays, repeats):
  """Seconds of a function of q, k and v forward, and of its vjp."""
  *qkv, do = arrays
  forward = jax.jit(attention)
  _, vjp = jax.jit(functools.partial(jax.vjp, attention))(*qkv)
  backward = jax.jit(lambda vjp, do: vjp(do))
  return {"forward": seconds(lambda: forward(*qkv), repeats),
          "backward": seconds(lambda: backward(vjp, do), repeats)}


def cudnn(window, arrays, repeats):
  return of_jax(
      functools.partial(jax.nn.dot_product_attention, is_causal=True,
                        local_window_size=(window - 1, 0),
                        implementation="cudnn"), arrays, repeats)


def of_torch(attention, q, k, v, do, repeats):
  """The same of tensors, for what torch calls an implementation."""
  import torch
  wait = lambda _: torch.cuda.synchronize()
  o = attention(q, k, v)
  return {"forward": seconds(lambda: attention(q, k, v), repeats, wait),
          "backward": seconds(
              lambda: torch.autograd.grad(o, (q, k, v), do, retain_graph=True),
              repeats, wait)}


def tensors(arrays, axes):
  """Random ones of these shapes, their axes in this order."""
  import torch
  made = [torch.randn([x.shape[axis] for axis in axes], device="cuda",
                      dtype=torch.bfloat16) for x in arrays]
  return [x.requires_grad_() for x in made[:3]] + made[3:]


def flex(window, arrays, repeats):
  from torch.nn.attention import flex_attention
  import torch
  length = arrays[0].shape[1]
  seen = lambda b, h, q, k: (q >= k) & (q - k < window)
  mask = torch.compile(flex_attention.create_block_mask)(
      seen, None, None, length, length, device="cuda")
  attention = functools.partial(torch.compile(flex_attention.flex_attention),
                                block_mask=mask, enable_gqa=True)
  return of_torch(attention, *tensors(arrays, (0, 2, 1, 3)), repeats)


def flash(window, arrays, repeats):
  from flash_attn import flash_attn_func
  attention = functools.partial(flash_attn_func, causal=True,
                                window_size=(window - 1, 0))
  return of_torch(attention, *tensors(arrays, (0, 1, 2, 3)), repeats)


def peers() -> dict:
  """Those installed; what is not is named on standard error."""
  found = {"cudnn": cudnn}
  if importlib.util.find_spec("torch") is not None:
    import torch
    if torch.cuda.is_available():
      found["torch flex_attention"] = flex
      if importlib.util.find_spec("flash_attn") is not None:
        found["flash_attn"] = flash
  if "torch flex_attention" not in found:
    print("torch with CUDA is not here: cuDNN is the only peer",
          file=sys.stderr)
  return found


def windows(name: str, length: int, rate: float, flags):
  heads, kv_heads, head_dim, window, has_sinks = MODELS[name]
  arrays = inputs(length, heads, kv_heads, head_dim)
  sinks = normal(4, heads).astype(jnp.float32) if has_sinks else None
  ours = functools.partial(windowed_attention, window=window,
                           scale=head_dim ** -0.5, sinks_N=sinks,
                           implementation="pallas-gpu")
  shape = dict(model=name, window=window, length=length)
  mine = of_jax(ours, arrays, flags.repeats)
  for passes, taken in mine.items():
    report(figure=f"windowed attention {passes}", by="pallas-gpu", **shape,
           microseconds=round(1e6 * taken, 1),
           of_bytes_alone=round(floor(arrays, passes, rate) / taken, 3))
  for by, run in ({} if flags.no_peer else peers()).items():
    try:
      theirs = run(window, arrays, flags.repeats)
    # A peer that refuses a shape is no reason to lose the other figures.
    except Exception as error:
      print(f"{by} cannot do {shape}: {error}"[:400], file=sys.stderr)
      continue
    for passes, taken in theirs.items():
      report(figure=f"windowed attention {passes}", by=by, **shape,
             microseconds=round(1e6 * taken, 1),
             times_as_fast=round(taken / mine[passes], 2))


def agreement():
  """How far ours is from XLA's in float32, relative, before time is spent."""
  for name, (heads, kv_heads, head_dim, window, has_sinks) in MODELS.items():
    *qkv, do = inputs(2000, heads, kv_heads, head_dim)
    sinks = normal(4, heads).astype(jnp.float32) if has_sinks else None
    def values(dtype, implementation):
      run = functools.partial(windowed_attention, window=window,
                              scale=head_dim ** -0.5, sinks_N=sinks,
                              implementation=implementation)
      o, vjp = jax.vjp(run, *(x.astype(dtype) for x in qkv))
      return (o, *vjp(do.astype(dtype)))
    norm = lambda x: float(jnp.linalg.norm(x.astype(jnp.float32).ravel()))
    with jax.default_matmul_precision("highest"):
      expected = jax.jit(lambda: values(jnp.float32, "xla"))()
    found = jax.jit(lambda: values(jnp.bfloat16, "pallas-gpu"))()
    report(figure="relative error to float32", model=name, **{
        key: float(f"{norm(a - b) / norm(b):.2g}")
        for key, a, b in zip(("o", "dq", "dk", "dv"), found, expected)})


def decoding(slots: int, batch: int, rate: float, flags):
  """gpt-oss's attention of one query over a cache of so many slots."""
  heads, kv_heads, head_dim, _, _ = MODELS["gpt-oss-20b"]
  q = normal(0, batch, 1, heads, head_dim)
  own = normal(1, batch, 1, kv_heads, head_dim)
  k, v = (normal(seed, batch, slots, kv_heads, head_dim) for seed in (2, 3))
  positions = jnp.broadcast_to(jnp.arange(slots), (batch, slots))
  attend = functools.partial(
      cached_attention, window=None, scale=head_dim ** -0.5,
      sinks_N=jnp.zeros(heads), implementation="pallas-gpu")

  @jax.jit
  def steps(q, k, v):
    return lax.fori_loop(0, STEPS, lambda _, q: attend(
        q, own, own, k, v, jnp.full((batch, 1), slots), positions), q)

  taken = seconds(lambda: steps(q, k, v), flags.repeats) / STEPS
  report(figure="attention over a cache", by="pallas-gpu", slots=slots,
         batch=batch, microseconds=round(1e6 * taken, 1),
         of_bytes_alone=round((k.nbytes + v.nbytes) / rate / taken, 3))


def run(flags, rate: float):
  agreement()
  for name in MODELS:
    for length in flags.lengths:
      windows(name, length, rate, flags)
  for slots in (128, 8192):
    for batch in (1, 8, 64):
      decoding(slots, batch, rate, flags)
