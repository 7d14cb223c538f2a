"""transformers' checkpoints in and out, with every family's odd configs."""
import copy
import json

import numpy as np
import pytest
import torch
import transformers

import jaxlm
from jaxlm.convert import formats, huggingface, shards
from jaxlm.convert.checkpoint import named_leaves
from jaxlm.convert.tensors import cast, of_array
import reference_models

TOLERANCE = 1e-4
SIZES = dict(reference_models.REFERENCE_SIZES, num_hidden_layers=3,
             intermediate_size=reference_models.D_FF, eos_token_id=7)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)

# What the cases of reference_models leave out.
ODD = {
    "llama, all biases, tied": (transformers.LlamaConfig, dict(
        attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "llama, linear scaling, GELU": (transformers.LlamaConfig, dict(
        rope_scaling=dict(type="linear", factor=2.5), rope_theta=777.0,
        hidden_act="gelu")),
    "qwen2, last layers slide": (transformers.Qwen2Config, dict(
        use_sliding_window=True, sliding_window=37, max_window_layers=2)),
    "qwen3, biases, layer types, YaRN": (transformers.Qwen3Config, dict(
        attention_bias=True, use_sliding_window=True, sliding_window=131,
        layer_types=["sliding_attention", "full_attention",
                     "full_attention"], rope_scaling=YARN)),
    "qwen3_moe, first layer dense": (transformers.Qwen3MoeConfig, dict(
        moe_intermediate_size=19, num_experts=7, num_experts_per_tok=3,
        mlp_only_layers=[0], tie_word_embeddings=True)),
    "mixtral, all layers slide": (transformers.MixtralConfig, dict(
        sliding_window=41, num_local_experts=7, num_experts_per_tok=3,
        tie_word_embeddings=True)),
    "gemma2, no caps, untied": (transformers.Gemma2Config, dict(
        attn_logit_softcapping=None, final_logit_softcapping=None,
        sliding_window=131, query_pre_attn_scalar=22,
        tie_word_embeddings=False)),
    "gemma3, cap, biases": (transformers.Gemma3TextConfig, dict(
        final_logit_softcapping=2.0, sliding_window=131,
        attention_bias=True, query_pre_attn_scalar=31,
        sliding_window_pattern=2)),
    "gpt_oss, no scaling, other clamp": (transformers.GptOssConfig, dict(
        rope_parameters=dict(rope_type="default", rope_theta=5000.0),
        swiglu_limit=1.5, num_local_experts=7, num_experts_per_tok=3)),
    "gpt2, untied, ReLU": (transformers.GPT2Config, dict(
        tie_word_embeddings=False, activation_function="relu", n_layer=3,
        n_positions=163, n_embd=45, n_head=5, vocab_size=101)),
}


def model_of(name):
  if name in reference_models.CASES:
    return reference_models.reference_model(name)[1]
  cls, fields = ODD[name]
  if cls is not transformers.GPT2Config:
    fields = SIZES | fields
  with torch.random.fork_rng():
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        cls(**fields), dtype=torch.float32, attn_implementation="eager",
        experts_implementation="eager").eval()
    reference_models.randomize(
        model, norm_center=0.0 if "gemma" in name else 1.0)
  return model


def assert_same_tensors(a: dict, b: dict):
  assert a.keys() == b.keys()
  for name, x in a.items():
    x, y = (t.read() if hasattr(t, "read") else np.asarray(t)
            for t in (x, b[name]))
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("name", [*reference_models.CASES, *ODD])
def test_a_checkpoint_in_and_out(name, tmp_path):
  model = model_of(name)
  model.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
  lm = jaxlm.load(tmp_path / "theirs", dtype=None)
  if name in reference_models.CASES:
    assert lm.config == reference_models.CASES[name]()[0]

  # The function is the same.
  tokens_BT = np.random.default_rng(1).integers(
      0, reference_models.VOCAB, (reference_models.BATCH,
                                  reference_models.LENGTH))
  with torch.no_grad():
    expected = model(torch.tensor(tokens_BT), use_cache=False).logits
  assert reference_models.relative_difference(
      lm.logits(tokens_BT), expected) <= TOLERANCE

  # What is saved is what transformers saved, and what it loads.
  jaxlm.save(lm, tmp_path / "ours", "hf")
  assert_same_tensors(shards.read_directory(tmp_path / "theirs"),
                      shards.read_directory(tmp_path / "ours"))
  again = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / "ours", dtype="auto", attn_implementation="eager",
      experts_implementation="eager")
  assert_same_tensors(model.state_dict(), again.state_dict())
  with torch.no_grad():
    logits_BTV = again(torch.tensor(tokens_BT), use_cache=False).logits
  np.testing.assert_array_equal(logits_BTV, expected)

  # So is what goes through jaxlm's own layout.
  jaxlm.save(lm, tmp_path / "native")
  back = jaxlm.load(tmp_path / "native", dtype=None)
  assert (back.config, back.about) == (lm.config, lm.about)
  assert_same_tensors(named_leaves(lm.params), named_leaves(back.params))


def saved(tmp_path, name="qwen3_tied", **options):
  directory = tmp_path / "theirs"
  model_of(name).save_pretrained(directory, **options)
  return directory


def edit_config(directory, **fields):
  path = directory / "config.json"
  values = json.loads(path.read_text()) | fields
  path.write_text(json.dumps(values))


def rewrite(directory, change):
  """Puts what `change` makes of a dict of arrays in place of its tensors."""
  arrays = {name: x.read() for name, x
            in shards.read_directory(directory).items()}
  shards.write_directory(directory, {
      name: of_array(x) for name, x in change(arrays).items()})


def rename(directory, change):
  """Gives tensors other names, or takes them away (None)."""
  rewrite(directory, lambda arrays: {
      change(name): x for name, x in arrays.items()
      if change(name) is not None})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_short_floats_stay_as_they_are(dtype, tmp_path):
  # Not the model that other tests share: its tables would stay rounded.
  model = copy.deepcopy(model_of("llama")).to(getattr(torch, dtype))
  model.save_pretrained(tmp_path / "theirs")
  lm = jaxlm.load(tmp_path / "theirs", dtype=None)
  jaxlm.save(lm, tmp_path / "ours", "hf")
  assert json.loads((tmp_path / "ours/config.json").read_text())[
      "torch_dtype"] == dtype
  assert_same_tensors(shards.read_directory(tmp_path / "theirs"),
                      shards.read_directory(tmp_path / "ours"))


def test_dtypes_on_loading(tmp_path):
  directory = saved(tmp_path)
  for dtype in ("bfloat16", "float32", "float16"):
    params = named_leaves(jaxlm.load(directory, dtype=dtype).params)
    assert {str(x.dtype) for x in params.values()} == {dtype}
  assert jaxlm.load(directory).execution.dtype == "bfloat16"
  with pytest.raises(ValueError, match="dtype='int8': use one of"):
    jaxlm.load(directory, dtype="int8")


def test_values_past_float16_are_refused(tmp_path):
  checkpoint = huggingface.read(saved(tmp_path))
  name = "final_norm/scale"
  large = checkpoint.tensors[name]
  large = large._replace(read=lambda: np.full(large.shape, 1e5, np.float32))
  with pytest.raises(ValueError, match="final_norm/scale.*float16.*bfloat16"):
    cast({name: large}, "float16")[name].read()


def test_gpt2_without_its_prefix_and_with_masks(tmp_path):
  """As it was published."""
  directory = saved(tmp_path, "gpt2")
  lm = jaxlm.load(directory)
  rename(directory, lambda name: name.removeprefix("transformer."))
  rewrite(directory, lambda arrays: arrays | {
      "h.0.attn.bias": arrays["ln_f.bias"],
      "h.2.attn.masked_bias": arrays["ln_f.bias"]})
  assert_same_tensors(named_leaves(lm.params),
                      named_leaves(jaxlm.load(directory).params))


@pytest.mark.parametrize("prefix", ["language_model.model.",
                                    "model.language_model."])
def test_the_decoder_of_the_whole_gemma3(prefix, tmp_path):
  directory = saved(tmp_path, "gemma3")
  lm = jaxlm.load(directory)
  text = json.loads((directory / "config.json").read_text())
  (directory / "config.json").write_text(json.dumps(dict(
      model_type="gemma3", text_config=text, vision_config={"a": 1},
      image_token_index=5, eoi_token_index=6, mm_tokens_per_image=256,
      architectures=["Gemma3ForConditionalGeneration"])))
  rename(directory, lambda name: name.replace("model.", prefix, 1))
  rewrite(directory, lambda arrays: arrays | dict.fromkeys(
      ("vision_tower.vision_model.a", "multi_modal_projector.b"), np.ones(3)))
  with pytest.warns(UserWarning, match="2 tensors of the part that reads im"):
    whole = jaxlm.load(directory)
  assert whole.config == lm.config
  assert_same_tensors(named_leaves(lm.params), named_leaves(whole.params))


def test_a_copy_of_tied_embeddings_is_left_out(tmp_path):
  directory = saved(tmp_path)
  expected = jaxlm.load(directory)
  rewrite(directory, lambda arrays: arrays | {
      "lm_head.weight": arrays["model.embed_tokens.weight"]})
  assert_same_tensors(named_leaves(expected.params),
                      named_leaves(jaxlm.load(directory).params))


def test_all_missing_and_unexpected_tensors_are_named(tmp_path):
  directory = saved(tmp_path)
  rename(directory, lambda name: None if "k_norm" in name
         else name.replace("1.self_attn.q_proj", "1.self_attn.query"))
  with pytest.raises(ValueError) as error:
    jaxlm.load(directory)
  for part in ("model.layers.{0..2}.self_attn.k_norm.weight",
               "model.layers.1.self_attn.q_proj.weight",
               "unexpected: model.layers.1.self_attn.query.weight"):
    assert part in str(error.value)


def test_a_config_of_other_sizes_is_refused(tmp_path):
  directory = saved(tmp_path)
  edit_config(directory, num_key_value_heads=3)
  with pytest.raises(ValueError, match=r"v_proj.weight is \[110, 45\], "
                                       r"expected \[66, 45\]"):
    jaxlm.load(directory)


@pytest.mark.parametrize("fields,message", [
    (dict(model_type="mamba"), "model_type='mamba' is not known"),
    (dict(model_type=None), "model_type=None is not known"),
    (dict(quantization_config={"quant_method": "gptq"}), "'gptq'"),
])
def test_unsupported_checkpoints_are_refused(fields, message, tmp_path):
  directory = saved(tmp_path)
  edit_config(directory, **fields)
  with pytest.raises((ValueError, NotImplementedError), match=message):
    jaxlm.load(directory)


def test_no_family_has_every_architecture(tmp_path):
  config = jaxlm.preset("qwen3-0.6b")
  odd = jaxlm.ModelConfig(
      vocab_size=31, d_model=12, num_layers=1,
      attention=jaxlm.AttentionConfig(3, 1, 4), mlp=jaxlm.MLPConfig(
          7, "relu", gated=False))
  import jax
  params = jaxlm.init_params(odd, jax.random.key(0))
  with pytest.raises(ValueError, match="no family of Hugging Face's"):
    jaxlm.save(jaxlm.LM(odd, params), tmp_path / "x", "hf")
  assert not (tmp_path / "x").exists()
  with pytest.raises(ValueError, match="missing: .*layers/"):
    jaxlm.save(jaxlm.LM(config, params), tmp_path / "x")
  jaxlm.save(jaxlm.LM(odd, params), tmp_path / "x")
  assert formats.format_of(tmp_path / "x") == "native"
