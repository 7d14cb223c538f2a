"""config.json both ways: the published ones, and what must be refused."""
import dataclasses

from hypothesis import given, settings, strategies as st
import pytest

import jaxlm
from jaxlm import families
from jaxlm.config import LinearScaling, RopeConfig, YarnScaling

# As the authors published them, without what has no effect.
PUBLISHED = {
    "gpt2": dict(
        activation_function="gelu_new", architectures=["GPT2LMHeadModel"],
        attn_pdrop=0.1, bos_token_id=50256, embd_pdrop=0.1, eos_token_id=50256,
        initializer_range=0.02, layer_norm_epsilon=1e-05, model_type="gpt2",
        n_ctx=1024, n_embd=768, n_head=12, n_layer=12, n_positions=1024,
        resid_pdrop=0.1, summary_activation=None,
        summary_first_dropout=0.1, summary_proj_to_labels=True,
        summary_type="cls_index", summary_use_proj=True,
        task_specific_params={"text-generation": {"max_length": 50}},
        vocab_size=50257),
    "llama3.1-8b": dict(
        architectures=["LlamaForCausalLM"], attention_bias=False,
        attention_dropout=0.0, bos_token_id=128000, eos_token_id=[128001],
        hidden_act="silu", hidden_size=4096, initializer_range=0.02,
        intermediate_size=14336, max_position_embeddings=131072,
        mlp_bias=False, model_type="llama", num_attention_heads=32,
        num_hidden_layers=32, num_key_value_heads=8, pretraining_tp=1,
        rms_norm_eps=1e-05, rope_scaling={
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        rope_theta=500000.0, tie_word_embeddings=False,
        torch_dtype="bfloat16", transformers_version="4.43.0.dev0",
        use_cache=True, vocab_size=128256),
    "qwen2.5-7b": dict(
        architectures=["Qwen2ForCausalLM"], attention_dropout=0.0,
        bos_token_id=151643, eos_token_id=151645, hidden_act="silu",
        hidden_size=3584, initializer_range=0.02, intermediate_size=18944,
        max_position_embeddings=32768, max_window_layers=28,
        model_type="qwen2", num_attention_heads=28, num_hidden_layers=28,
        num_key_value_heads=4, rms_norm_eps=1e-06, rope_theta=1000000.0,
        sliding_window=131072, tie_word_embeddings=False,
        torch_dtype="bfloat16", use_cache=True, use_sliding_window=False,
        vocab_size=152064),
    "qwen3-0.6b": dict(
        architectures=["Qwen3ForCausalLM"], attention_bias=False,
        attention_dropout=0.0, bos_token_id=151643, eos_token_id=151645,
        head_dim=128, hidden_act="silu", hidden_size=1024,
        initializer_range=0.02, intermediate_size=3072,
        max_position_embeddings=40960, max_window_layers=28,
        model_type="qwen3", num_attention_heads=16, num_hidden_layers=28,
        num_key_value_heads=8, rms_norm_eps=1e-06, rope_scaling=None,
        rope_theta=1000000, sliding_window=None, tie_word_embeddings=True,
        torch_dtype="bfloat16", use_cache=True, use_sliding_window=False,
        vocab_size=151936),
    "qwen3-30b-a3b": dict(
        architectures=["Qwen3MoeForCausalLM"], attention_bias=False,
        attention_dropout=0.0, decoder_sparse_step=1, head_dim=128,
        hidden_act="silu", hidden_size=2048, intermediate_size=6144,
        max_position_embeddings=40960, max_window_layers=48,
        mlp_only_layers=[], model_type="qwen3_moe",
        moe_intermediate_size=768, norm_topk_prob=True,
        num_attention_heads=32, num_experts=128, num_experts_per_tok=8,
        num_hidden_layers=48, num_key_value_heads=4,
        output_router_logits=False, rms_norm_eps=1e-06, rope_scaling=None,
        rope_theta=1000000.0, router_aux_loss_coef=0.001, sliding_window=None,
        tie_word_embeddings=False, use_cache=True, use_sliding_window=False,
        vocab_size=151936),
    "mixtral-8x7b": dict(
        architectures=["MixtralForCausalLM"], attention_dropout=0.0,
        hidden_act="silu", hidden_size=4096, intermediate_size=14336,
        max_position_embeddings=32768, model_type="mixtral",
        num_attention_heads=32, num_experts_per_tok=2, num_hidden_layers=32,
        num_key_value_heads=8, num_local_experts=8,
        output_router_logits=False, rms_norm_eps=1e-05,
        rope_theta=1000000.0, router_aux_loss_coef=0.02, sliding_window=None,
        tie_word_embeddings=False, vocab_size=32000),
    "gemma2-27b": dict(
        architectures=["Gemma2ForCausalLM"], attention_bias=False,
        attention_dropout=0.0, attn_logit_softcapping=50.0, bos_token_id=2,
        cache_implementation="hybrid", eos_token_id=1,
        final_logit_softcapping=30.0, head_dim=128,
        hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh",
        hidden_size=4608, initializer_range=0.02, intermediate_size=36864,
        max_position_embeddings=8192, model_type="gemma2",
        num_attention_heads=32, num_hidden_layers=46, num_key_value_heads=16,
        pad_token_id=0, query_pre_attn_scalar=144, rms_norm_eps=1e-06,
        rope_theta=10000.0, sliding_window=4096,
        sliding_window_size=4096, vocab_size=256000),
    "gemma3-1b": dict(
        architectures=["Gemma3ForCausalLM"], attention_bias=False,
        attn_logit_softcapping=None, cache_implementation="hybrid",
        final_logit_softcapping=None, head_dim=256,
        hidden_activation="gelu_pytorch_tanh", hidden_size=1152,
        intermediate_size=6912, max_position_embeddings=32768,
        model_type="gemma3_text", num_attention_heads=4, num_hidden_layers=26,
        num_key_value_heads=1, query_pre_attn_scalar=256, rms_norm_eps=1e-06,
        rope_local_base_freq=10000, rope_scaling=None, rope_theta=1000000,
        sliding_window=512, sliding_window_pattern=6, vocab_size=262144),
    "gemma3-4b": dict(
        architectures=["Gemma3ForConditionalGeneration"],
        boi_token_index=255999, eoi_token_index=256000, eos_token_id=[1, 106],
        image_token_index=262144, mm_tokens_per_image=256,
        model_type="gemma3", text_config=dict(
            hidden_size=2560, intermediate_size=10240,
            model_type="gemma3_text", num_hidden_layers=34,
            rope_scaling={"factor": 8.0, "rope_type": "linear"},
            sliding_window=1024),
        vision_config={"hidden_size": 1152}),
    "gpt-oss-20b": dict(
        architectures=["GptOssForCausalLM"], attention_bias=True,
        attention_dropout=0.0, eos_token_id=200002, experts_per_token=4,
        head_dim=64, hidden_act="silu", hidden_size=2880,
        initial_context_length=4096, intermediate_size=2880,
        layer_types=["sliding_attention", "full_attention"] * 12,
        max_position_embeddings=131072, model_type="gpt_oss",
        num_attention_heads=64, num_experts_per_tok=4, num_hidden_layers=24,
        num_key_value_heads=8, num_local_experts=32,
        output_router_logits=False, pad_token_id=199999,
        quantization_config={"quant_method": "mxfp4"}, rms_norm_eps=1e-05,
        rope_scaling={
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
            "original_max_position_embeddings": 4096, "rope_type": "yarn",
            "truncate": False}, rope_theta=150000,
        router_aux_loss_coef=0.9, sliding_window=128, swiglu_limit=7.0,
        tie_word_embeddings=False, vocab_size=201088),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_the_presets(name):
  _, config = families.from_hf_config(PUBLISHED[name])
  assert config == jaxlm.preset(name)


@pytest.mark.parametrize("name", jaxlm.presets())
def test_presets_come_back(name):
  config = jaxlm.preset(name)
  family, values = families.hf_family(config)
  assert values["model_type"] == family.model_type
  assert families.from_hf_config(values) == (family, config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_unknown_field_is_refused_when_it_is_on(name):
  for off in (None, False, 0, [], ""):
    families.from_hf_config(PUBLISHED[name] | {"use_mystery": off})
  with pytest.raises(ValueError, match="'use_mystery': 3.*delete"):
    families.from_hf_config(PUBLISHED[name] | {"use_mystery": 3})


def changed(name, **fields):
  return families.from_hf_config(PUBLISHED[name] | fields)[1]


@pytest.mark.parametrize("name,fields,message", [
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inv"),
    ("gpt2", dict(scale_attn_weights=False), "scale_attn_weights"),
    ("gpt2", dict(add_cross_attention=True), "add_cross_attention"),
    ("gpt2", dict(activation_function="tanh"), "activation_function='tanh'"),
    ("llama3.1-8b", dict(hidden_act="mish"), "hidden_act='mish'"),
    ("llama3.1-8b", dict(rope_scaling={"type": "dynamic", "factor": 2.0}),
     "rope_type='dynamic'"),
    ("llama3.1-8b", dict(rope_scaling={"type": "linear", "factor": 2.0,
                                       "partial_rotary_factor": 0.5}),
     "partial_rotary_factor"),
    ("llama3.1-8b", dict(rope_scaling=dict(
        rope_type="yarn", factor=2.0, attention_factor=3.0)),
     "attention_factor"),
    ("qwen3-30b-a3b", dict(decoder_sparse_step=2), "decoder_sparse_step=2"),
    ("qwen3-30b-a3b", dict(mlp_only_layers=[3]), r"dense layers \[3\]"),
    ("qwen3-0.6b", dict(layer_types=["chunked_attention"] * 28), "layer_types"),
    ("gemma2-27b", dict(use_bidirectional_attention=True), "use_bidirec"),
    ("gemma3-1b", dict(attn_logit_softcapping=50.0), "attn_logit_softcapping"),
    ("gpt-oss-20b", dict(swiglu_alpha=1.5), "swiglu_alpha=1.5"),
])
def test_what_is_not_supported_is_named(name, fields, message):
  with pytest.raises(NotImplementedError, match=message):
    changed(name, **fields)


@pytest.mark.parametrize("name,fields,message", [
    ("llama3.1-8b", dict(hidden_size=None), "lacks 'hidden_size'"),
    ("llama3.1-8b", dict(hidden_size="4096"), "hidden_size='4096'"),
    ("llama3.1-8b", dict(hidden_size=True), "hidden_size=True"),
    ("llama3.1-8b", dict(hidden_size=-1), "must be positive"),
    ("llama3.1-8b", dict(num_key_value_heads=5), "num_kv_heads=5"),
    ("llama3.1-8b", dict(rope_scaling={"type": "linear"}), "lacks 'factor'"),
    ("llama3.1-8b", dict(rope_scaling={"type": "linear", "factor": "2"}),
     "factor='2'"),
    ("qwen3-0.6b", dict(layer_types=["full_attention"]), "1 entries for num"),
    ("qwen3-0.6b", dict(num_hidden_layers=10 ** 6), "layers=1000000"),
    ("qwen3-0.6b", dict(hidden_size=10 ** 12), "no model's is that large"),
    ("gpt2", dict(n_head=7), "n_embd=768 is not a multiple of n_head=7"),
    ("gemma2-27b", dict(query_pre_attn_scalar=0), "query_pre_attn_scalar"),
])
def test_wrong_fields_are_named(name, fields, message):
  with pytest.raises(ValueError, match=message):
    changed(name, **fields)


def test_heads_without_their_size_share_the_width():
  config = changed("llama3.1-8b", num_attention_heads=16)
  assert config.attention.head_dim == 256
  assert changed("llama3.1-8b", head_dim=96).attention.head_dim == 96
  assert changed("llama3.1-8b",
                 num_key_value_heads=None).attention.num_kv_heads == 32


def test_rope_in_every_form():
  old = changed("llama3.1-8b", rope_scaling={"type": "linear", "factor": 3})
  assert old.attention.rope_full == RopeConfig(500000.0, LinearScaling(3.0))
  new = changed("llama3.1-8b", rope_scaling=None, rope_theta=None,
                rope_parameters={"rope_type": "linear", "factor": 3.0,
                                 "rope_theta": 500000.0})
  assert new == old
  yarn = changed("qwen3-0.6b", rope_scaling={"type": "yarn", "factor": 4.0})
  assert yarn.attention.rope_full.scaling == YarnScaling(
      4.0, original_context=40960, truncate=True)
  assert families.from_hf_config(families.hf_family(yarn)[1])[1] == yarn
  nested = changed(
      "gemma3-1b", rope_theta=None, rope_local_base_freq=None, rope_parameters={
          "full_attention": {"rope_type": "linear", "factor": 8.0,
                             "rope_theta": 77.0},
          "sliding_attention": {"rope_type": "default", "rope_theta": 5.0}})
  assert nested.attention.rope_full == RopeConfig(77.0, LinearScaling(8.0))
  assert nested.attention.rope_sliding == RopeConfig(5.0)


def test_qwens_windows():
  no = changed("qwen3-0.6b", sliding_window=64)
  assert no == jaxlm.preset("qwen3-0.6b")
  last = changed("qwen3-0.6b", use_sliding_window=True, sliding_window=64,
                 max_window_layers=20)
  kinds = [layer.attention for layer in last.layers]
  assert kinds == ["full"] * 20 + ["sliding"] * 8
  assert last.attention.sliding_window == 64
  every = changed("qwen3-30b-a3b", use_sliding_window=True, sliding_window=64)
  assert {layer.attention for layer in every.layers} == {"sliding"}


def test_dense_layers_before_the_experts():
  config = changed("qwen3-30b-a3b", mlp_only_layers=[0, 1])
  assert (config.num_dense_layers, config.mlp.d_ff) == (2, 6144)
  values = families.hf_family(config)[1]
  assert values["mlp_only_layers"] == [0, 1]
  assert families.from_hf_config(values)[1] == config


def test_what_a_family_cannot_say_is_refused():
  gpt_oss = jaxlm.preset("gpt-oss-20b")
  odd = dataclasses.replace(gpt_oss, tie_embeddings=True, norm=jaxlm.NormConfig(
      "layernorm"))
  with pytest.raises(ValueError, match="no family of Hugging Face's"):
    families.hf_family(odd)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(PUBLISHED)), st.data())
def test_any_value_is_read_or_refused(name, data):
  """Strangers' values cause no other errors."""
  values = dict(PUBLISHED[name])
  field = data.draw(st.sampled_from(sorted(values)))
  values[field] = data.draw(st.one_of(
      st.none(), st.booleans(), st.integers(), st.floats(), st.text(),
      st.lists(st.integers() | st.text(), max_size=3),
      st.dictionaries(st.sampled_from(["rope_type", "type", "factor", "a"]),
                      st.floats() | st.text() | st.sampled_from(
                          ["yarn", "linear", "llama3", "default"]))))
  try:
    families.from_hf_config(values)
  except (ValueError, NotImplementedError):
    pass
