"""transformers' parameters as our tree, read by hand for the tests."""
import jax
import numpy as np

import jaxlm
from jaxlm.config import MLAConfig, ModelConfig, stacks


def params_of(config: ModelConfig, parameters: dict) -> dict:
  """transformers' parameters as our tree; each must be used exactly once."""
  parameters = {name: w.detach().numpy() for name, w in parameters.items()}
  take = parameters.pop
  read = _read_gpt2 if "transformer.wte.weight" in parameters else _read_llama
  params = read(config, take)
  assert not parameters, f"not copied: {sorted(parameters)}"
  expected = jaxlm.abstract_params(config)
  assert (jax.tree.map(lambda x: x.shape, params)
          == jax.tree.map(lambda x: x.shape, expected))
  return params


def _stacked(config, layers: list[dict]) -> dict:
  """Layers as they are scanned: each place of a period, over its repeats."""
  params = {}
  for i, stack in enumerate(stacks(config)):
    period = len(stack.kinds)
    end = stack.start + period * stack.repeats
    params[f"stack_{i}"] = {
        f"layer_{j}": jax.tree.map(lambda *x: np.stack(x),
                                   *layers[stack.start + j:end:period])
        for j in range(period)}
  return params


def _read_gpt2(config, take) -> dict:
  def norm(name):
    return {"scale": take(f"{name}.weight"), "bias": take(f"{name}.bias")}

  def layer(prefix):
    heads = (config.attention.num_heads, config.attention.head_dim)
    weights = np.split(take(f"{prefix}.attn.c_attn.weight"), 3, 1)
    biases = np.split(take(f"{prefix}.attn.c_attn.bias"), 3)
    attention = {
        "o_proj": take(f"{prefix}.attn.c_proj.weight").reshape(*heads, -1),
        "o_bias": take(f"{prefix}.attn.c_proj.bias")}
    for name, w, b in zip("qkv", weights, biases, strict=True):
      attention[f"{name}_proj"] = w.reshape(-1, *heads)
      attention[f"{name}_bias"] = b.reshape(heads)
    return {
        "attention": attention,
        "attention_norm": norm(f"{prefix}.ln_1"),
        "mlp_norm": norm(f"{prefix}.ln_2"),
        "mlp": {"up": take(f"{prefix}.mlp.c_fc.weight"),
                "up_bias": take(f"{prefix}.mlp.c_fc.bias"),
                "down": take(f"{prefix}.mlp.c_proj.weight"),
                "down_bias": take(f"{prefix}.mlp.c_proj.bias")}}

  layers = [layer(f"transformer.h.{i}") for i in range(config.num_layers)]
  return {"embed": {"embedding": take("transformer.wte.weight"),
                    "positions": take("transformer.wpe.weight")},
          "final_norm": norm("transformer.ln_f"), **_stacked(config, layers)}


NORMS = {
    "pre": {"attention_norm": "input_layernorm",
            "mlp_norm": "post_attention_layernorm"},
    "pre_and_post": {"attention_norm": "input_layernorm",
                     "attention_post_norm": "post_attention_layernorm",
                     "mlp_norm": "pre_feedforward_layernorm",
                     "mlp_post_norm": "post_feedforward_layernorm"},
}


def _read_llama(config, take) -> dict:
  """Every family but GPT-2 is named as Llama is."""
  layers = []
  for i in range(config.num_layers):
    prefix = f"model.layers.{i}"
    layer = {name: {"scale": take(f"{prefix}.{theirs}.weight")}
             for name, theirs in NORMS[config.norm.placement].items()}
    read = (_read_latent_attention if isinstance(config.attention, MLAConfig)
            else _read_attention)
    layer["attention"] = read(config, take, f"{prefix}.self_attn")
    if config.layers[i].moe:
      layer["moe"] = _read_moe(config, take, f"{prefix}.mlp")
    else:
      layer["mlp"] = _read_mlp(take, f"{prefix}.mlp")
    layers.append(layer)
  params = {"embed": {"embedding": take("model.embed_tokens.weight")},
            "final_norm": {"scale": take("model.norm.weight")},
            **_stacked(config, layers)}
  if not config.tie_embeddings:
    params["unembedding"] = take("lm_head.weight").T
  return params


def _read_mlp(take, prefix) -> dict:
  gate, up, down = (take(f"{prefix}.{name}_proj.weight").T
                    for name in ("gate", "up", "down"))
  return {"gate_up": np.concatenate([gate, up], 1), "down": down}


def _read_latent_attention(config, take, prefix) -> dict:
  c = config.attention
  def heads(name):
    w = take(f"{prefix}.{name}.weight")
    return w.T.reshape(w.shape[1], c.num_heads, -1)
  def norm(name):
    return {"scale": take(f"{prefix}.{name}.weight")}
  result = {
      "kv_a_proj": take(f"{prefix}.kv_a_proj_with_mqa.weight").T,
      "kv_a_norm": norm("kv_a_layernorm"), "kv_b_proj": heads("kv_b_proj"),
      "o_proj": take(f"{prefix}.o_proj.weight").T.reshape(
          c.num_heads, c.v_head_dim, config.d_model)}
  if c.q_rank is None:
    return result | {"q_proj": heads("q_proj")}
  return result | {"q_a_proj": take(f"{prefix}.q_a_proj.weight").T,
                   "q_a_norm": norm("q_a_layernorm"),
                   "q_b_proj": heads("q_b_proj")}


def _read_attention(config, take, prefix) -> dict:
  c, d_model = config.attention, config.d_model
  heads = {"q": c.num_heads, "k": c.num_kv_heads, "v": c.num_kv_heads}
  result = {"o_proj": take(f"{prefix}.o_proj.weight").T.reshape(
      c.num_heads, c.head_dim, d_model)}
  for name, n in heads.items():
    w = take(f"{prefix}.{name}_proj.weight")
    result[f"{name}_proj"] = w.T.reshape(d_model, n, c.head_dim)
  for name in c.biases:
    bias = take(f"{prefix}.{name}_proj.bias")
    result[f"{name}_bias"] = (bias if name == "o"
                              else bias.reshape(heads[name], c.head_dim))
  if c.qk_norm:
    for name in ("q_norm", "k_norm"):
      result[name] = {"scale": take(f"{prefix}.{name}.weight")}
  if c.sinks:
    result["sinks"] = take(f"{prefix}.sinks")
  return result


def _read_moe(config, take, prefix) -> dict:
  gate_up = take(f"{prefix}.experts.gate_up_proj")
  down = take(f"{prefix}.experts.down_proj")
  if not config.moe.expert.bias:
    result = {"router": take(f"{prefix}.gate.weight").T,
              "gate_up": gate_up.swapaxes(1, 2), "down": down.swapaxes(1, 2)}
    if config.moe.router.balance_bias:
      result["balance_bias"] = take(f"{prefix}.gate.e_score_correction_bias")
    if config.moe.shared:
      result["shared"] = _read_mlp(take, f"{prefix}.shared_experts")
    return result
  # gpt-oss alone stores its experts as [E, in, out].
  return {"router": take(f"{prefix}.router.weight").T,
          "router_bias": take(f"{prefix}.router.bias"),
          "gate_up": gate_up, "down": down,
          "gate_up_bias": take(f"{prefix}.experts.gate_up_proj_bias"),
          "down_bias": take(f"{prefix}.experts.down_proj_bias")}
