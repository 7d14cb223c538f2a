"""Gemma 3, the text decoder (arXiv 2503.19786)."""
from jaxlm.config import (AttentionConfig, LinearScaling, MLPConfig,
                          ModelConfig, NormConfig, RopeConfig)
from jaxlm.families import gemma2
from jaxlm.families.common import attention, outer, query_scale
from jaxlm.families.family import Family
from jaxlm.families.hf_config import Fields


def gemma3(num_layers: int, d_model: int, d_ff: int, num_heads: int,
           num_kv_heads: int, head_dim: int = 256, sliding_window: int = 1024,
           position_scale: float | None = 8.0,
           scale: float | None = None,
           vocab_size: int = 262208) -> ModelConfig:
  """The vocabulary is 262144, which the published 4B, 12B and 27B pad."""
  scaling = None if position_scale is None else LinearScaling(position_scale)
  return ModelConfig(
      vocab_size=vocab_size, d_model=d_model, num_layers=num_layers,
      attention=AttentionConfig(
          num_heads, num_kv_heads, head_dim,
          rope_full=RopeConfig(1e6, scaling), rope_sliding=RopeConfig(1e4),
          sliding_window=sliding_window, qk_norm=True, scale=scale),
      mlp=MLPConfig(d_ff, "gelu_tanh"),
      layer_pattern=("sliding",) * 5 + ("full",),
      norm=NormConfig(scale_offset=1.0, placement="pre_and_post"),
      tie_embeddings=True, scale_embeddings=True)


PRESETS = {
    "gemma3-1b": gemma3(26, 1152, 6912, 4, 1, sliding_window=512,
                        position_scale=None, vocab_size=262144),
    "gemma3-4b": gemma3(34, 2560, 10240, 8, 4),
    "gemma3-12b": gemma3(48, 3840, 15360, 16, 8),
    "gemma3-27b": gemma3(62, 5376, 21504, 32, 16, head_dim=128,
                         scale=168 ** -0.5),
}


DEFAULTS = dict(gemma2.DEFAULTS, vocab_size=262208, num_attention_heads=8,
                rope_theta=1e6, rope_local_base_freq=10000.0,
                sliding_window_pattern=6, max_position_embeddings=131072,
                attn_logit_softcapping=None, final_logit_softcapping=None)
# Of the model around the decoder, which reads images.
VISION_FIELDS = ("vision_config", "mm_tokens_per_image", "boi_token_index",
                 "eoi_token_index", "image_token_index", "image_token_id",
                 "boi_token_id", "eoi_token_id")


def from_hf_config(values: dict) -> ModelConfig:
  """Of the decoder alone or, nested in text_config, of the whole model."""
  if "text_config" in values:
    whole = Fields(values, {"tie_word_embeddings": True})
    whole.ignore(*VISION_FIELDS)
    tied = whole("tie_word_embeddings", bool)
    values = {"tie_word_embeddings": tied, **whole("text_config", dict)}
    whole.finish()
  fields = Fields(values, DEFAULTS)
  fields.ignore("hidden_act", "_sliding_window_pattern")
  fields.only("use_bidirectional_attention", None, False)
  # None has one; transformers reads the field and then does without.
  fields.only("attn_logit_softcapping", None)
  period = fields("sliding_window_pattern")
  pattern = fields.layer_pattern(lambda i: (i + 1) % max(period, 1) != 0)
  rope_sliding = fields.rope("sliding", "rope_local_base_freq", scaled=False)
  config = ModelConfig(
      **outer(fields), layer_pattern=pattern,
      attention=attention(
          fields, pattern, fields.rope("full"), rope_sliding,
          sliding_window=fields.optional("sliding_window"), qk_norm=True,
          scale=query_scale(fields)),
      **gemma2.around_attention(fields))
  fields.finish()
  return config


def to_hf_config(config: ModelConfig) -> dict:
  sliding = config.attention.rope_sliding or RopeConfig()
  return {**gemma2.to_hf_config(config), "rope_local_base_freq": sliding.theta}


FAMILY = Family(
    "gemma3_text", "Gemma3ForCausalLM", from_hf_config, to_hf_config,
    gemma2.RULES,
    renames=((r"(model\.language_model|language_model\.model)\.", "model."),
             (r"language_model\.lm_head\.", "lm_head.")),
    vision=r"(model\.)?(vision_tower|multi_modal_projector)\..*")
