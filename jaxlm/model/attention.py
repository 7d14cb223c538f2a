"""Grouped-query attention over a sequence, or over a cache."""
import flax.linen as nn
import jax.numpy as jnp

from jaxlm.config import AttentionConfig, NormConfig
from jaxlm.model import cache as cache_lib
from jaxlm.model.layers import Norm, fan_in, weight
from jaxlm.model.rope import rotate
from pallas_kernels.windowed_attention import (cached_attention,
                                               windowed_attention)


class Attention(nn.Module):
  """`kind` is "sliding" or "full"; `norm` is the QK-norm's."""
  config: AttentionConfig
  kind: str
  norm: NormConfig
  residual_scale: float
  implementation: str

  @nn.compact
  def __call__(self, x_BTD, context, cache=None):
    """[B, T, D] to [B, T, D] and the cache, grown by these tokens if given.

    With a cache, T > 1 tokens are a prompt that begins an empty cache; a
    single token attends over what the cache holds.
    """
    config = self.config
    q, k, v = self._project_in(x_BTD)
    if config.qk_norm:
      q = Norm(self.norm, name="q_norm")(q)
      k = Norm(self.norm, name="k_norm")(k)
    rope = (config.rope_sliding if self.kind == "sliding"
            else config.rope_full)
    if rope is not None:
      table = context.rope[self.kind]
      q, k = (rotate(y, table, rope.interleaved) for y in (q, k))
    sinks = None
    if config.sinks:
      sinks = weight(self, "sinks", (config.num_heads,), ("heads",),
                     nn.initializers.zeros)
    options = dict(
        window=config.sliding_window if self.kind == "sliding" else None,
        scale=config.query_scale, sinks_N=sinks, soft_cap=config.soft_cap,
        implementation=self.implementation)
    if cache is not None and x_BTD.shape[1] == 1:
      o = cached_attention(
          q, k, v, *(x.astype(q.dtype)
                     for x in cache.keys_and_values(config.num_kv_heads)),
          context.positions_BT, cache.positions_BS, **options)
    else:
      o = windowed_attention(q, k, v, segment_ids=context.segment_ids_BT,
                             **options)
    if cache is not None:
      cache = cache_lib.write(cache, k, v, context.positions_BT)
    return self._project_out(o, x_BTD.shape[-1]), cache

  def _project_in(self, x_BTD):
    config, d_model = self.config, x_BTD.shape[-1]
    projected = []
    for name, heads in (("q", config.num_heads), ("k", config.num_kv_heads),
                        ("v", config.num_kv_heads)):
      axis = "heads" if name == "q" else "kv_heads"
      w_DNH = weight(self, f"{name}_proj", (d_model, heads, config.head_dim),
                     ("embed", axis, "head_dim"), fan_in(axis=-3))
      y = jnp.einsum("BTD,DNH->BTNH", x_BTD, w_DNH.astype(x_BTD.dtype))
      if name in config.biases:
        bias = weight(self, f"{name}_bias", (heads, config.head_dim),
                      (axis, "head_dim"), nn.initializers.zeros)
        y += bias.astype(y.dtype)
      projected.append(y)
    return projected

  def _project_out(self, o_BTNH, d_model):
    config = self.config
    w_NHD = weight(self, "o_proj",
                   (config.num_heads, config.head_dim, d_model),
                   ("heads", "head_dim", "embed"),
                   fan_in(self.residual_scale, axis=(-3, -2)))
    # As one flat matmul: XLA would copy the weight transposed, each step.
    y_BTD = (o_BTNH.reshape(*o_BTNH.shape[:2], -1)
             @ w_NHD.astype(o_BTNH.dtype).reshape(-1, d_model))
    if "o" in config.biases:
      bias = weight(self, "o_bias", (d_model,), ("norm",),
                    nn.initializers.zeros)
      y_BTD += bias.astype(y_BTD.dtype)
    return y_BTD
