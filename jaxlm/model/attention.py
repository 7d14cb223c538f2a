"""Grouped-query attention over a sequence, or over a cache."""
import flax.linen as nn

from jaxlm.config import AttentionConfig, NormConfig
from jaxlm.model import cache as cache_lib
from jaxlm.model.layers import Norm, fan_in, weight
from jaxlm.model.rope import rotate
from jaxlm.parallel import context as sequences, linear


class Attention(nn.Module):
  """`kind` is "sliding" or "full"; `norm` is the QK-norm's."""
  config: AttentionConfig
  kind: str
  norm: NormConfig
  residual_scale: float
  implementation: str
  fsdp: bool = True
  fp8: bool = False

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
    options = sequences.Options(
        config.sliding_window if self.kind == "sliding" else None,
        config.query_scale, config.soft_cap, self.implementation)
    if cache is not None and x_BTD.shape[1] == 1:
      o = cache_lib.attention(
          q, k, v, cache, context.positions_BT, sinks, window=options.window,
          dtype=q.dtype, **options.attention())
    else:
      o = self.attend(q, k, v, sinks, context.segment_ids_BT, options)
    if cache is not None:
      cache = cache_lib.write(cache, k, v, context.positions_BT)
    return self._project_out(o, x_BTD.shape[-1]), cache

  def attend(self, q_BTNH, k_BTKH, v_BTKH, sinks_N, segment_ids_BT, options):
    """Over a sequence; a method, for `jaxlm.model.trace` to look at."""
    return sequences.attention(q_BTNH, (k_BTKH, v_BTKH), (), sinks_N,
                               segment_ids_BT, options)

  def _project_in(self, x_BTD):
    config, d_model = self.config, x_BTD.shape[-1]
    weights, biases = [], []
    for name, heads in (("q", config.num_heads), ("k", config.num_kv_heads),
                        ("v", config.num_kv_heads)):
      axis = "heads" if name == "q" else "kv_heads"
      axes = "embed", axis, "head_dim"
      weights.append((weight(self, f"{name}_proj",
                             (d_model, heads, config.head_dim), axes,
                             fan_in(axis=-3)), axes))
      bias = None
      if name in config.biases:
        bias = weight(self, f"{name}_bias", (heads, config.head_dim),
                      axes[1:], nn.initializers.zeros)
      biases.append(bias)
    products = linear.columns(x_BTD, weights, self.fsdp, self.fp8)
    return [y if bias is None else y + bias.astype(y.dtype)
            for y, bias in zip(products, biases)]

  def _project_out(self, o_BTNH, d_model):
    config = self.config
    axes = "heads", "head_dim", "embed"
    w_NHD = weight(self, "o_proj",
                   (config.num_heads, config.head_dim, d_model), axes,
                   fan_in(self.residual_scale, axis=(-3, -2)))
    y_BTD = linear.rows(o_BTNH, w_NHD, axes, self.fsdp, self.fp8)
    if "o" in config.biases:
      bias = weight(self, "o_bias", (d_model,), ("norm",),
                    nn.initializers.zeros)
      y_BTD += bias.astype(y_BTD.dtype)
    return y_BTD
