"""Models from GGUF files give what transformers computes."""
import dataclasses
import functools

import gguf
import jax
import numpy as np
import pytest
import torch

from gguf_files import small_model, write_model
from jaxlm.convert import gguf as gguf_format
from jaxlm.convert.gguf_config import hf_config
from jaxlm.convert.gguf_file import read_file
from jaxlm.lm import load, save
from jaxlm.model.transformer import Execution
from pallas_kernels.quant import MXFP4, is_quantized
from reference_models import (CASES, our_logits,
                              relative_difference)
from quick import quick_jit

Kind = gguf.GGMLQuantizationType
TOKENS = np.random.default_rng(1).integers(0, 101, (2, 151))


@torch.no_grad()
def assert_same_logits(lm, model):
  theirs = model(torch.tensor(TOKENS), use_cache=False).logits.numpy()
  packed = any(map(is_quantized, jax.tree.leaves(lm.params,
                                                 is_leaf=is_quantized)))
  execution = Execution(
      scan_layers=False, attention="reference",
      experts="auto" if packed else "ragged")  # which is quick to compile
  ours = quick_jit(functools.partial(our_logits, lm.config,
                                     execution=execution))
  assert relative_difference(ours(lm.params, TOKENS), theirs) < 1e-4


@pytest.mark.parametrize("case", [
    "llama", "qwen2", "qwen3_tied", "qwen3_untied", "qwen3_moe", "mixtral",
    "gemma3", "gpt_oss"])
def test_logits_are_those_of_transformers(case, tmp_path):
  model = small_model(case)
  path = tmp_path / "model.gguf"
  write_model(path, model)
  lm = load(path, "float32")
  expected = CASES[case]()[0]
  if case == "gemma3":
    expected = dataclasses.replace(expected, attention=dataclasses.replace(
        expected.attention, scale=None))
  assert dataclasses.replace(lm.config, dropout=0.0) == expected
  assert_same_logits(lm, model)


def of_32(**changes):
  """gpt-oss in sizes that are multiples of a block."""
  return small_model("gpt_oss", hidden_size=64, intermediate_size=96,
                         num_hidden_layers=2,
                         layer_types=["sliding_attention", "full_attention"],
                         **changes)


@torch.no_grad()
def test_experts_in_mxfp4_keep_the_published_bytes(tmp_path):
  model, path = of_32(), tmp_path / "model.gguf"
  published = {}
  for name, w in model.named_parameters():
    if name.endswith(("gate_up_proj", "down_proj")):
      published[name] = MXFP4.quantize(w.numpy())
      w.copy_(torch.tensor(published[name].dequantize("float32").copy()))
  write_model(path, model, lambda name, array: (
      Kind.MXFP4 if name.endswith("exps.weight") else None))
  lm = load(path, "float32")
  for i in range(2):
    moe, theirs = lm.params["layers"][str(i)]["moe"], f"model.layers.{i}.mlp"
    for ours, name in (("gate_up", "gate_up_proj"), ("down", "down_proj")):
      leaf = published[f"{theirs}.experts.{name}"]
      assert isinstance(moe[ours], MXFP4)
      np.testing.assert_array_equal(moe[ours].blocks, leaf.blocks)
      np.testing.assert_array_equal(moe[ours].scales, leaf.scales)
  assert_same_logits(lm, model)
  for format in ("native", "hf"):
    save(lm, tmp_path / format, format)
    again = load(tmp_path / format, None)
    jax.tree.map(np.testing.assert_array_equal, again.params, lm.params)


@torch.no_grad()
def test_mxfp4_where_not_all_of_a_leaf_is_dequantizes(tmp_path):
  model, path = of_32(), tmp_path / "model.gguf"
  write_model(path, model, lambda name, array: (
      Kind.MXFP4 if "ffn_gate_exps.weight" in name or "attn_q.w" in name
      else Kind.Q8_0 if "ffn_up_exps.weight" in name
      else Kind.F16 if name.endswith("norm.weight") else None))
  lm = load(path, None)
  moe = lm.params["layers"]["1"]["moe"]
  assert moe["gate_up"].dtype == np.float32
  w = dict(model.named_parameters())["model.layers.1.mlp.experts.gate_up_proj"]
  np.testing.assert_array_equal(
      moe["gate_up"][..., ::2],
      MXFP4.quantize(w[..., ::2].numpy()).dequantize("float32"))
  step = w[..., 1::2].abs().max() / 127
  assert np.abs(moe["gate_up"][..., 1::2] - w[..., 1::2].numpy()).max() < step
  norm = lm.params["layers"]["0"]["mlp_norm"]["scale"]
  assert norm.dtype == np.float16


def test_a_model_is_described_by_what_hugging_face_published(tmp_path):
  """Float32 metadata become the numbers that were meant."""
  path = tmp_path / "model.gguf"
  write_model(path, small_model("llama"))
  values = hf_config(read_file(path))
  assert values["rms_norm_eps"] == 1e-5 and values["rope_theta"] == 500000.0
  assert values["rope_scaling"] == dict(
      rope_type="llama3", factor=8.0, low_freq_factor=1.0,
      high_freq_factor=4.0, original_max_position_embeddings=8192)


def damaged(tmp_path, case="llama", drop=(), rename=None, **more):
  """The error of a model with something wrong."""
  path = tmp_path / "model.gguf"
  model = small_model(case, num_hidden_layers=1)
  def metadata(writer):
    for name, value in more.items():
      writer.kv_data[0].pop(f"{case}.{name.replace('__', '.')}", None)
      if value is not None:
        add = {int: writer.add_uint32, float: writer.add_float32,
               str: writer.add_string}[type(value)]
        add(f"{case}.{name.replace('__', '.')}", value)
  write_model(path, model, metadata=metadata)
  with pytest.raises((ValueError, NotImplementedError)) as error:
    gguf_format.read(path)
  return str(error.value)


@pytest.mark.parametrize("changes, message", [
    (dict(block_count=2), "block_count=2, but there are tensors of 1 layers"),
    (dict(block_count=None), "the metadata lack llama.block_count"),
    (dict(block_count=1.5), "llama.block_count=1.5: expected int"),
    (dict(attention__head_count=2 ** 31), "head_count=2147483648: expected"),
    (dict(attention__head_count=0), "num_heads=0"),
    (dict(attention__head_count=10), "attn_q.weight is"),
    (dict(embedding_length=44), "token_embd.weight is"),
    (dict(rope__dimension_count=10), "only the whole head of 22"),
    (dict(rope__scaling__type="longrope"), "only none, linear and yarn"),
    (dict(rope__freq_base=1e4), "rope_freqs.weight is not Llama 3's"),
])
def test_metadata_that_do_not_fit_are_named(changes, message, tmp_path):
  if "rope__scaling__type" in changes:
    case = "qwen2"
  else:
    case = "llama"
  assert message in damaged(tmp_path, case, **changes)
