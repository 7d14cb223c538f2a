"""DeepSeek-V3's config.json and its tensors, in and out."""
import dataclasses
import re

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers

import jaxlm
from jaxlm import families
from jaxlm.config import MLPConfig
from jaxlm.convert import formats
from jaxlm.model.transformer import per_layer
from pallas_kernels.quant import FP8
import reference_models
from reference_weights import params_of

# What lies beside the weights on the hub, but for names of code and tokens.
PUBLISHED = dict(
    model_type="deepseek_v3", architectures=["DeepseekV3ForCausalLM"],
    attention_bias=False, attention_dropout=0.0, ep_size=1,
    first_k_dense_replace=3, hidden_act="silu", hidden_size=7168,
    initializer_range=0.02, intermediate_size=18432, kv_lora_rank=512,
    max_position_embeddings=163840, moe_intermediate_size=2048,
    moe_layer_freq=1, n_group=8, n_routed_experts=256, n_shared_experts=1,
    norm_topk_prob=True, num_attention_heads=128, num_experts_per_tok=8,
    num_hidden_layers=61, num_key_value_heads=128, num_nextn_predict_layers=1,
    q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64,
    quantization_config=dict(activation_scheme="dynamic", fmt="e4m3",
                             quant_method="fp8", weight_block_size=[128, 128]),
    rms_norm_eps=1e-06, rope_scaling=dict(
        beta_fast=32, beta_slow=1, factor=40, mscale=1.0, mscale_all_dim=1.0,
        original_max_position_embeddings=4096, type="yarn"),
    rope_theta=10000, routed_scaling_factor=2.5, scoring_func="sigmoid",
    seq_aux=True, tie_word_embeddings=False, topk_group=4,
    topk_method="noaux_tc", torch_dtype="bfloat16", use_cache=True,
    v_head_dim=128, vocab_size=129280)
SMALL = ("deepseek_v3", "deepseek_v3_plain")
# Of transformers' config: where it came from, and a default that we write.
FREE = {"_name_or_path", "architectures", "dtype", "rope_parameters"}


def test_the_published_config_is_the_preset():
  family, config = families.from_hf_config(PUBLISHED)
  assert family.model_type == "deepseek_v3"
  assert config == jaxlm.preset("deepseek-v3") == jaxlm.preset("deepseek-r1")


def test_the_preset_is_written_as_published():
  _, values = families.hf_family(jaxlm.preset("deepseek-v3"))
  scaling = values.pop("rope_scaling")
  assert scaling.pop("truncate") and scaling.pop("rope_type") == "yarn"
  assert scaling.items() <= PUBLISHED["rope_scaling"].items()
  # The layer that predicts further tokens is not written.
  assert values.pop("num_nextn_predict_layers") == 0
  assert values.pop("rope_interleave")
  assert values.items() <= PUBLISHED.items()


@pytest.mark.parametrize("changes, message", [
    (dict(scoring_func="softmax"), "scoring_func='softmax' is not supported: "
     "only 'sigmoid'"),
    (dict(topk_method="greedy"), "topk_method='greedy'"),
    (dict(moe_layer_freq=2), "moe_layer_freq=2"),
    (dict(attention_bias=True), "attention_bias=True"),
    (dict(n_group=7), "num_experts=256 is not a multiple of router.num_groups"),
    (dict(kv_lora_rank="512"), "kv_lora_rank='512': expected int"),
    (dict(kv_lora_rank=None), "config.json lacks 'kv_lora_rank'"),
    (dict(nope=3), "fields that may change .* {'nope': 3}"),
    (dict(rope_scaling=PUBLISHED["rope_scaling"] | dict(mscale=None)),
     "mscale_all_dim=1.0 without mscale"),
    (dict(rope_scaling=PUBLISHED["rope_scaling"] | dict(attention_factor=1.4)),
     "{'attention_factor': 1.4}, not supported"),
])
def test_what_is_not_supported_is_named(changes, message):
  with pytest.raises((ValueError, NotImplementedError), match=message):
    families.from_hf_config(PUBLISHED | changes)


def test_no_rank_for_queries_is_none_and_not_the_default():
  _, config = families.from_hf_config(PUBLISHED | dict(q_lora_rank=None))
  assert config.attention.q_rank is None


@pytest.mark.parametrize("attention, moe", [
    (dict(norm_eps=1e-5), {}), ({}, dict(shared=None)),
    ({}, dict(shared=MLPConfig(2049))),
    ({}, dict(router=dataclasses.replace(
        jaxlm.preset("deepseek-v3").moe.router, balance_bias=False)))])
def test_what_hugging_face_cannot_say_is_not_written(attention, moe):
  config = jaxlm.preset("deepseek-v3")
  config = dataclasses.replace(
      config, attention=dataclasses.replace(config.attention, **attention),
      moe=dataclasses.replace(config.moe, **moe))
  with pytest.raises(ValueError, match="no family of Hugging Face's"):
    families.hf_family(config)


@pytest.mark.parametrize("name", SMALL)
def test_a_model_of_transformers_comes_and_goes(name, tmp_path):
  """All weights, each in its place: what they compute is tested with the other
  families, in test_golden."""
  config, model = reference_models.reference_model(name)
  model.save_pretrained(tmp_path / "theirs")
  lm = jaxlm.load(tmp_path / "theirs", dtype="float32")
  assert families.same_function(lm.config, config)
  expected = params_of(config, reference_models.named_weights(model))
  jax.tree.map(np.testing.assert_array_equal, lm.params,
               per_layer(config, expected))
  jaxlm.save(lm, tmp_path / "ours", "hf")
  again, report = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / "ours", dtype=torch.float32, output_loading_info=True)
  assert not any(report.values()), report
  weights = again.state_dict()
  for name, w in model.state_dict().items():
    assert torch.equal(weights.pop(name), w), name
  assert not weights
  theirs, ours = model.config.to_dict(), again.config.to_dict()
  different = {field for field in theirs if theirs[field] != ours.get(field)}
  assert different <= FREE
  assert theirs["rope_parameters"].items() <= ours["rope_parameters"].items()


def in_fp8(directory, changes=()):
  """Rewrites a saved model as DeepSeek publishes its own.

  Matrices of the layers are FP8 with scales, but for the router; a layer that
  predicts further is the last again with what it has of its own. Returns the
  values that FP8 keeps, by name.
  """
  path = directory / "model.safetensors"
  tensors, result, kept = safetensors.numpy.load_file(path), {}, {}
  for name, w in tensors.items():
    if w.ndim == 2 and "layers" in name and not name.endswith("gate.weight"):
      packed = FP8.quantize(w.T)
      kept[name] = packed.dequantize().T
      result[name] = packed.floats
      result[name + "_scale_inv"] = packed.block_scales
    else:
      kept[name] = result[name] = w
  for name in list(result):
    if name.startswith("model.layers.4."):
      result[name.replace("layers.4.", "layers.5.")] = result[name]
  result["model.layers.5.eh_proj.weight"] = np.ones((3, 6), np.float32)
  result.update(changes)
  write_safetensors(path, {k: v for k, v in result.items() if v is not None})
  config = formats.files.read_json(directory / "config.json")
  config["quantization_config"] = PUBLISHED["quantization_config"]
  formats.files.write_json(directory / "config.json", config)
  return kept


def write_safetensors(path, tensors):
  """Their library knows 8-bit floats as torch's alone."""
  def of_numpy(w):
    if w.dtype == ml_dtypes.float8_e4m3fn:
      return torch.tensor(w.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.tensor(w)
  safetensors.torch.save_file({name: of_numpy(np.ascontiguousarray(w))
                               for name, w in tensors.items()}, path)


def test_fp8_comes_in_as_bfloat16_without_the_further_layer(tmp_path):
  _, model = reference_models.reference_model("deepseek_v3")
  model.save_pretrained(tmp_path)
  kept = in_fp8(tmp_path)
  with pytest.warns(UserWarning, match=r"tensors of layers from 5 on, which "
                    r"predict further tokens \(MTP\), are left out"):
    lm = jaxlm.load(tmp_path, dtype=None)
  dtypes = {str(w.dtype) for w in (lm.params["layers"]["3"]["moe"]["gate_up"],
                                   lm.params["layers"]["0"]["mlp"]["down"])}
  assert dtypes == {"bfloat16"}
  up = np.asarray(lm.params["layers"]["3"]["moe"]["gate_up"])
  for expert in range(12):
    theirs = f"model.layers.3.mlp.experts.{expert}."
    np.testing.assert_array_equal(up[expert], np.concatenate(
        [kept[f"{theirs}{name}_proj.weight"].T for name in ("gate", "up")], 1))
  np.testing.assert_array_equal(
      lm.params["layers"]["4"]["attention"]["kv_a_proj"],
      kept["model.layers.4.self_attn.kv_a_proj_with_mqa.weight"].T)


def test_the_balance_bias_is_never_rounded(tmp_path):
  _, model = reference_models.reference_model("deepseek_v3")
  model.save_pretrained(tmp_path)
  moe = jaxlm.load(tmp_path, dtype="bfloat16").params["layers"]["3"]["moe"]
  assert moe["router"].dtype == "bfloat16"
  np.testing.assert_array_equal(
      moe["balance_bias"],
      model.state_dict()["model.layers.3.mlp.gate.e_score_correction_bias"])


@pytest.mark.parametrize("changes, message", [
    (dict.fromkeys(["model.layers.1.self_attn.o_proj.weight_scale_inv"]),
     "o_proj.weight_scale_inv, are missing"),
    ({"model.layers.1.self_attn.o_proj.weight_scale_inv":
      np.ones((1, 1), np.float32)}, r"are float32 \[1, 1\]: expected a matrix "
     r"and float32 \[1, 2\]"),
    ({"model.layers.1.self_attn.o_proj.weight_scale_inv":
      np.ones((1, 2), np.float16)}, "are float16"),
    ({"model.layers.0.input_layernorm.weight":
      np.ones(45, ml_dtypes.float8_e4m3fn)}, "expected a matrix"),
    ({"model.layers.1.scale_inv": np.ones(2, np.float32)},
     "unexpected: model.layers.1.scale_inv"),
])
def test_scales_that_do_not_fit_are_named(changes, message, tmp_path):
  _, model = reference_models.reference_model("deepseek_v3")
  model.save_pretrained(tmp_path)
  in_fp8(tmp_path, changes)
  with pytest.raises(ValueError, match=message), pytest.warns(UserWarning):
    jaxlm.load(tmp_path)


def test_fp8_of_other_blocks_is_refused(tmp_path):
  _, model = reference_models.reference_model("deepseek_v3")
  model.save_pretrained(tmp_path)
  config = formats.files.read_json(tmp_path / "config.json")
  config["quantization_config"] = dict(quant_method="fp8",
                                       weight_block_size=[64, 128])
  formats.files.write_json(tmp_path / "config.json", config)
  with pytest.raises(NotImplementedError,
                     match=re.escape("weight_block_size=[64, 128]")):
    jaxlm.load(tmp_path)
