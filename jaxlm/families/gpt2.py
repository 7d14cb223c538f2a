"""GPT-2 (Radford et al. 2019)."""
from jaxlm.config import (PROJECTIONS, AttentionConfig, MLPConfig, ModelConfig,
                          NormConfig)
from jaxlm.convert.rules import Rule
from jaxlm.families.family import Family
from jaxlm.families.hf_config import Fields, activation_name


def gpt2(num_layers: int, d_model: int, num_heads: int) -> ModelConfig:
  return ModelConfig(
      vocab_size=50257, d_model=d_model, num_layers=num_layers,
      attention=AttentionConfig(num_heads, num_heads, d_model // num_heads,
                                biases=PROJECTIONS),
      mlp=MLPConfig(4 * d_model, "gelu_tanh", gated=False, bias=True),
      norm=NormConfig("layernorm", eps=1e-5), max_positions=1024,
      tie_embeddings=True, dropout=0.1)


PRESETS = {
    "gpt2": gpt2(12, 768, 12),
    "gpt2-medium": gpt2(24, 1024, 16),
    "gpt2-large": gpt2(36, 1280, 20),
    "gpt2-xl": gpt2(48, 1600, 25),
}


def _rules() -> tuple[Rule, ...]:
  layer, theirs = "layers/{layer}", "transformer.h.{layer}"
  qkv = lambda leaf: tuple(f"{layer}/attention/{name}_{leaf}" for name in "qkv")
  rules = [
      Rule("embed/embedding", "transformer.wte.weight", "V D -> V D"),
      Rule("embed/positions", "transformer.wpe.weight", "P D -> P D"),
      Rule("unembedding", "lm_head.weight", "V D -> D V"),
      Rule(qkv("proj"), f"{theirs}.attn.c_attn.weight", "D (N H) -> D N H", 1),
      Rule(qkv("bias"), f"{theirs}.attn.c_attn.bias", "(N H) -> N H", 0),
      Rule(f"{layer}/attention/o_proj", f"{theirs}.attn.c_proj.weight",
           "(N H) D -> N H D"),
      Rule(f"{layer}/attention/o_bias", f"{theirs}.attn.c_proj.bias",
           "D -> D"),
      Rule(f"{layer}/mlp/up", f"{theirs}.mlp.c_fc.weight", "D F -> D F"),
      Rule(f"{layer}/mlp/up_bias", f"{theirs}.mlp.c_fc.bias", "F -> F"),
      Rule(f"{layer}/mlp/down", f"{theirs}.mlp.c_proj.weight", "F D -> F D"),
      Rule(f"{layer}/mlp/down_bias", f"{theirs}.mlp.c_proj.bias", "D -> D")]
  for ours, norm in (("final_norm", "transformer.ln_f"),
                     (f"{layer}/attention_norm", f"{theirs}.ln_1"),
                     (f"{layer}/mlp_norm", f"{theirs}.ln_2")):
    rules += [Rule(f"{ours}/scale", f"{norm}.weight", "D -> D"),
              Rule(f"{ours}/bias", f"{norm}.bias", "D -> D")]
  return tuple(rules)


DEFAULTS = dict(activation_function="gelu_new", layer_norm_epsilon=1e-5,
                resid_pdrop=0.1, tie_word_embeddings=True)


def from_hf_config(values: dict) -> ModelConfig:
  fields = Fields(values, DEFAULTS)
  fields.only("scale_attn_weights", True, default=True)
  for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
    fields.only(name, False, default=False)
  # The rest: precision, dropout that training may choose, classifiers, names.
  fields.ignore("reorder_and_upcast_attn", "embd_pdrop", "attn_pdrop", "n_ctx",
                "summary_type", "summary_use_proj", "summary_activation",
                "summary_proj_to_labels", "summary_first_dropout")
  d_model, heads = fields("n_embd"), fields("n_head")
  if heads < 1 or d_model % heads:
    raise ValueError(f"config.json: n_embd={d_model} is not a multiple of "
                     f"n_head={heads}")
  config = ModelConfig(
      vocab_size=fields("vocab_size"), d_model=d_model,
      num_layers=fields("n_layer"),
      attention=AttentionConfig(heads, heads, d_model // heads,
                                biases=PROJECTIONS),
      mlp=MLPConfig(fields.optional("n_inner") or 4 * d_model,
                    fields.activation("activation_function"), gated=False,
                    bias=True),
      norm=NormConfig("layernorm", fields("layer_norm_epsilon", float)),
      max_positions=fields("n_positions"), dropout=fields("resid_pdrop", float),
      tie_embeddings=fields("tie_word_embeddings", bool))
  fields.finish()
  return config


def to_hf_config(config: ModelConfig) -> dict:
  return dict(
      vocab_size=config.vocab_size, n_positions=config.max_positions,
      n_embd=config.d_model, n_layer=config.num_layers,
      n_head=config.attention.num_heads, n_inner=config.mlp.d_ff,
      activation_function=activation_name(config.mlp, "gelu_new"),
      layer_norm_epsilon=config.norm.eps, resid_pdrop=config.dropout,
      embd_pdrop=config.dropout, attn_pdrop=0.0,
      tie_word_embeddings=config.tie_embeddings)


FAMILY = Family(
    "gpt2", "GPT2LMHeadModel", from_hf_config, to_hf_config, _rules(),
    renames=((r"(?=(wte|wpe|h|ln_f)\.)", "transformer."),),
    left_out=r"transformer\.h\.\d+\.attn\.(masked_)?bias")
