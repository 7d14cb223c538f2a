"""Multi-head latent attention over a sequence, or over a cache of latents.

arXiv 2412.19437, section 2.1.1. The keys and values of all heads are linear in
one latent a token. A sequence is attended in heads expanded from it; decoding
moves that expansion to the query and to the output instead ("absorbs" it), so
that the heads read the latents themselves.
"""
import functools

import flax.linen as nn
import jax.numpy as jnp

from jaxlm.config import MLAConfig, NormConfig
from jaxlm.model import cache as cache_lib
from jaxlm.model.layers import Norm, fan_in, weight
from jaxlm.model.rope import rotate
from jaxlm.parallel import context as sequences, linear, mesh
from pallas_kernels.windowed_attention import cached_attention


def expand(latents, projections, fp8: bool = False):
  """Keys [B, S, N, H] and values of all heads, of what they have in common.

  Args:
    latents: latent_BSR and rope_key_BSH.
    projections: k_proj_RNH and v_proj_RNH.
    fp8: as in `linear.product`.
  """
  latent_BSR, rope_key_BSH = latents
  k_nope_BSNH, v_BSNH = (linear.product(latent_BSR, w_RNH, fp8)
                         for w_RNH in projections)
  k_rope_BSNH = jnp.broadcast_to(
      rope_key_BSH[:, :, None], (*k_nope_BSNH.shape[:3],
                                 rope_key_BSH.shape[-1]))
  return jnp.concatenate([k_nope_BSNH, k_rope_BSNH], -1), v_BSNH


def expanded_attention(q_nope_BTNH, q_rope_BTNH, latent_BSR, rope_key_BSH,
                       k_proj_RNH, v_proj_RNH, *, scale, segment_ids_BS=None,
                       implementation="auto", fp8=False):
  """Causal attention of a sequence; [B, T, N, v_head_dim]."""
  return sequences.attention(
      jnp.concatenate([q_nope_BTNH, q_rope_BTNH], -1),
      (latent_BSR, rope_key_BSH), (k_proj_RNH, v_proj_RNH), None,
      segment_ids_BS,
      sequences.Options(None, scale, implementation=implementation,
                        expand=functools.partial(expand, fp8=fp8)),
      keys_axes=2 * (("batch", "length", "latent"),),
      weights_axes=2 * (("latent", "heads", "head_dim"),))


def absorbed_attention(q_nope_BTNH, q_rope_BTNH, key_BTR, key_BSR, k_proj_RNH,
                       v_proj_RNH, q_positions_BT, k_positions_BS, *, scale,
                       implementation="auto"):
  """The same of a few queries over their own keys and a cache's: [latent,
  rotary key] for all heads, and the values are the latents.
  """
  def attend(q_nope_BTNH, q_rope_BTNH, key_BTR, key_BSR, k_proj_RNH,
             v_proj_RNH, q_positions_BT, k_positions_BS):
    q_BTNR = jnp.einsum("BTNH,RNH->BTNR", q_nope_BTNH, k_proj_RNH)
    o_BTNR = cached_attention(
        jnp.concatenate([q_BTNR, q_rope_BTNH], -1), key_BTR[:, :, None], None,
        key_BSR[:, :, None], None, q_positions_BT, k_positions_BS, window=None,
        scale=scale, v_head_dim=k_proj_RNH.shape[0],
        implementation=implementation)
    return jnp.einsum("BTNR,RNH->BTNH", o_BTNR, v_proj_RNH)

  q, rows, w = (mesh.spec("batch", None, "heads", None), mesh.spec("batch"),
                mesh.spec(None, "heads", None))
  return mesh.of_each(attend, (q, q, rows, rows, w, w, rows, rows), q)(
      q_nope_BTNH, q_rope_BTNH, key_BTR, key_BSR, k_proj_RNH, v_proj_RNH,
      q_positions_BT, k_positions_BS)


class MLA(nn.Module):
  config: MLAConfig
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
    config, dtype = self.config, x_BTD.dtype
    table = context.rope["full"]
    q_nope, q_rope = jnp.split(self._queries(x_BTD), [config.nope_head_dim],
                               -1)
    q_rope = rotate(q_rope, table, config.rope.interleaved)
    latent_BTR, rope_key_BTH = self._latents(x_BTD, table)
    kv_b_RNH = weight(
        self, "kv_b_proj", (config.kv_rank, config.num_heads,
                            config.nope_head_dim + config.v_head_dim),
        ("latent", "heads", "head_dim"), fan_in(axis=-3))
    k_proj, v_proj = jnp.split(kv_b_RNH.astype(dtype), [config.nope_head_dim],
                               -1)
    key_BTR = jnp.concatenate([latent_BTR, rope_key_BTH], -1)
    if cache is not None and x_BTD.shape[1] == 1:
      o_BTNH = absorbed_attention(
          q_nope, q_rope, key_BTR, cache.key_BSR.astype(dtype), k_proj, v_proj,
          context.positions_BT, cache.positions_BS, scale=config.query_scale,
          implementation=self.implementation)
    else:
      o_BTNH = self.attend(q_nope, q_rope, latent_BTR, rope_key_BTH, k_proj,
                           v_proj, context.segment_ids_BT)
    if cache is not None:
      cache = cache_lib.write(cache, key_BTR, context.positions_BT)
    return self._project_out(o_BTNH, x_BTD.shape[-1]), cache

  def attend(self, q_nope, q_rope, latent_BTR, rope_key_BTH, k_proj, v_proj,
             segment_ids_BT):
    """Over a sequence; a method, for `jaxlm.model.trace` to look at."""
    return expanded_attention(
        q_nope, q_rope, latent_BTR, rope_key_BTH, k_proj, v_proj,
        scale=self.config.query_scale, segment_ids_BS=segment_ids_BT,
        implementation=self.implementation, fp8=self.fp8)

  def _norm(self, name):
    return Norm(NormConfig(eps=self.config.norm_eps), name=name)

  def _queries(self, x_BTD):
    config, d_model = self.config, x_BTD.shape[-1]
    heads = (config.num_heads, config.head_dim)
    if config.q_rank is None:
      q_BTR, name, axes = x_BTD, "q_proj", ("embed", "heads", "head_dim")
    else:
      axes = "embed", "latent"
      w_DR = weight(self, "q_a_proj", (d_model, config.q_rank), axes, fan_in())
      q_BTR, = linear.columns(x_BTD, [(w_DR, axes)], self.fsdp, self.fp8)
      q_BTR = self._norm("q_a_norm")(q_BTR)
      name, axes = "q_b_proj", ("latent", "heads", "head_dim")
    w_RNH = weight(self, name, (q_BTR.shape[-1], *heads), axes,
                   fan_in(axis=-3))
    return linear.columns(q_BTR, [(w_RNH, axes)], self.fsdp, self.fp8)[0]

  def _latents(self, x_BTD, table):
    """The latent, normalised, and the heads' common rotary key."""
    config, axes = self.config, ("embed", "latent")
    w_DR = weight(self, "kv_a_proj", (x_BTD.shape[-1],
                                      config.kv_rank + config.rope_head_dim),
                  axes, fan_in())
    key_BTR, = linear.columns(x_BTD, [(w_DR, axes)], self.fsdp, self.fp8)
    latent_BTR, rope_key_BTH = jnp.split(key_BTR, [config.kv_rank], -1)
    rope_key_BTH = rotate(rope_key_BTH[:, :, None], table,
                          config.rope.interleaved)[:, :, 0]
    return self._norm("kv_a_norm")(latent_BTR), rope_key_BTH

  def _project_out(self, o_BTNH, d_model):
    axes = "heads", "head_dim", "embed"
    w_NHD = weight(self, "o_proj",
                   (self.config.num_heads, self.config.v_head_dim, d_model),
                   axes, fan_in(self.residual_scale, axis=(-3, -2)))
    return linear.rows(o_BTNH, w_NHD, axes, self.fsdp, self.fp8)
