"""Qwen3, mixture of experts (arXiv 2505.09388)."""
from jaxlm.config import (AttentionConfig, MLPConfig, MoEConfig, ModelConfig,
                          NormConfig, RopeConfig, RouterConfig)
from jaxlm.families.common import (LLAMA_RULES, attention, moe_rules, outer,
                                   to_hf)
from jaxlm.families.family import Family
from jaxlm.families.hf_config import Fields, activation_name


def qwen3_moe(num_layers: int, d_model: int, d_expert: int, num_heads: int,
              rope_theta: float = 1e6) -> ModelConfig:
  return ModelConfig(
      vocab_size=151936, d_model=d_model, num_layers=num_layers,
      attention=AttentionConfig(num_heads, 4, 128, RopeConfig(rope_theta),
                                qk_norm=True),
      moe=MoEConfig(128, 8, MLPConfig(d_expert),
                    RouterConfig("softmax_topk", renormalize=True)))


PRESETS = {
    "qwen3-30b-a3b": qwen3_moe(48, 2048, 768, 32),
    "qwen3-30b-a3b-2507": qwen3_moe(48, 2048, 768, 32, rope_theta=1e7),
    "qwen3-235b-a22b": qwen3_moe(94, 4096, 1536, 64),
    "qwen3-235b-a22b-2507": qwen3_moe(94, 4096, 1536, 64, rope_theta=5e6),
}

DEFAULTS = dict(attention_bias=False, hidden_act="silu", rms_norm_eps=1e-6,
                rope_theta=10000.0, use_sliding_window=False,
                decoder_sparse_step=1, norm_topk_prob=False,
                intermediate_size=6144, max_position_embeddings=32768,
                tie_word_embeddings=False)


def from_hf_config(values: dict) -> ModelConfig:
  fields = Fields(values, DEFAULTS)
  # transformers 5 writes one of two names.
  experts = fields.optional("num_experts") or fields("num_local_experts")
  fields.ignore("num_local_experts")
  window = fields.optional("sliding_window")
  if not fields("use_sliding_window", bool):
    window = None
  pattern = ("full",) if window is None else ("sliding",)
  num_dense = _num_dense_layers(fields)
  activation = fields.activation("hidden_act")
  mlp = MLPConfig(fields("intermediate_size"), activation)
  config = ModelConfig(
      **outer(fields), layer_pattern=pattern,
      attention=attention(fields, pattern, sliding_window=window,
                          qk_norm=True),
      mlp=mlp if num_dense else None, num_dense_layers=num_dense,
      moe=MoEConfig(
          experts, fields("num_experts_per_tok"),
          MLPConfig(fields("moe_intermediate_size"), activation),
          RouterConfig("softmax_topk",
                       renormalize=fields("norm_topk_prob", bool))),
      norm=NormConfig(eps=fields("rms_norm_eps", float)))
  fields.finish()
  return config


def _num_dense_layers(fields: Fields) -> int:
  """Where expert layers begin; dense ones among them are not supported."""
  num_layers, step = fields.num_layers(), fields("decoder_sparse_step")
  dense = fields.optional("mlp_only_layers", list) or []
  if step < 1:
    raise ValueError(f"config.json: decoder_sparse_step={step}: must be at "
                     "least 1")
  dense = [i in dense or (i + 1) % step != 0 for i in range(num_layers)]
  if sorted(dense, reverse=True) != dense or all(dense):
    raise NotImplementedError(
        f"config.json: decoder_sparse_step={step} and mlp_only_layers give "
        f"dense layers {[i for i, d in enumerate(dense) if d]}: only the first "
        "layers can be dense, and not all")
  return sum(dense)


def to_hf_config(config: ModelConfig) -> dict:
  moe, window = config.moe, config.attention.sliding_window
  mlp = config.mlp or moe.expert
  return to_hf(
      config, intermediate_size=mlp.d_ff,
      hidden_act=activation_name(moe.expert, "silu"),
      moe_intermediate_size=moe.expert.d_ff, num_experts=moe.num_experts,
      num_experts_per_tok=moe.experts_per_token,
      norm_topk_prob=moe.router.renormalize, decoder_sparse_step=1,
      mlp_only_layers=list(range(config.num_dense_layers)),
      use_sliding_window=window is not None, sliding_window=window)


FAMILY = Family(
    "qwen3_moe", "Qwen3MoeForCausalLM", from_hf_config, to_hf_config,
    (*LLAMA_RULES, *moe_rules("mlp", gate="gate_proj", up="up_proj",
                              down="down_proj")), moe=True)
