"""jaxlm's and OpenAI's layouts, and telling formats apart."""
import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest

import jaxlm
from jaxlm.convert import files, formats, native, openai, shards
from jaxlm.convert.checkpoint import Checkpoint, leaf_shapes
from jaxlm.convert.tensors import cast, of_array
from pallas_kernels.quant import MXFP4
from reference_models import shrink

BF16 = np.dtype(ml_dtypes.bfloat16)


def gpt_oss(d_model=64, d_ff=32):
  config = shrink("gpt-oss-20b", 3)
  expert = dataclasses.replace(config.moe.expert, d_ff=d_ff)
  return dataclasses.replace(
      config, d_model=d_model,
      moe=dataclasses.replace(config.moe, expert=expert))


def checkpoint_of(config, packed=None):
  """Random values; of each leaf in `packed`, those of its parts."""
  rng = np.random.default_rng(0)
  return Checkpoint(config, {
      path: of_array(
          rng.integers(0, 256, shape).astype(np.uint8)
          if path.endswith(("/blocks", "/scales"))
          else rng.normal(size=shape).astype(BF16))
      for path, shape in leaf_shapes(config, packed).items()},
      {"eos_token_id": 7}, {"tokenizer.json": b"{}"})


def packed_leaves(config):
  return {f"layers/{i}/moe/{name}": MXFP4 for i in range(config.num_layers)
          for name in ("gate_up", "down")}


def read_all(tensors):
  return {name: tensor.read() for name, tensor in tensors.items()}


def assert_same(a, b):
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", formats.FORMATS)
def test_gpt_oss_in_every_layout(name, packed, tmp_path):
  config = gpt_oss()
  checkpoint = checkpoint_of(config, packed_leaves(config) if packed else None)
  written = []
  formats.write(checkpoint, tmp_path / "x", name, written.append)
  assert sum(written) == checkpoint.nbytes
  assert formats.format_of(tmp_path / "x") == name
  back = formats.read(tmp_path / "x")
  assert back.config == config and back.files == checkpoint.files
  assert_same(read_all(back.tensors), read_all(checkpoint.tensors))
  # And on to each of the others, and back again, byte for byte.
  for other in formats.FORMATS:
    formats.write(back, tmp_path / other, other)
    formats.write(formats.read(tmp_path / other), tmp_path / "again", name)
    if name != "native":
      assert_same(*(read_all(shards.read_directory(tmp_path / d))
                    for d in ("x", "again")))
    shutil.rmtree(tmp_path / "again")


def test_openais_names_and_shapes(tmp_path):
  config = gpt_oss()
  formats.write(checkpoint_of(config, packed_leaves(config)), tmp_path / "x",
                "openai")
  found = {name: (tensor.shape, str(tensor.dtype)) for name, tensor
           in shards.read_directory(tmp_path / "x").items()
           if ".1." in name or "block" not in name}
  heads, kv, size = 15, 5, 22
  assert found == {
      "embedding.weight": ((101, 64), "bfloat16"),
      "unembedding.weight": ((101, 64), "bfloat16"),
      "norm.scale": ((64,), "bfloat16"),
      "block.1.attn.norm.scale": ((64,), "bfloat16"),
      "block.1.attn.qkv.weight": (((heads + 2 * kv) * size, 64), "bfloat16"),
      "block.1.attn.qkv.bias": (((heads + 2 * kv) * size,), "bfloat16"),
      "block.1.attn.sinks": ((heads,), "bfloat16"),
      "block.1.attn.out.weight": ((64, heads * size), "bfloat16"),
      "block.1.attn.out.bias": ((64,), "bfloat16"),
      "block.1.mlp.norm.scale": ((64,), "bfloat16"),
      "block.1.mlp.gate.weight": ((11, 64), "bfloat16"),
      "block.1.mlp.gate.bias": ((11,), "bfloat16"),
      "block.1.mlp.mlp1_weight.blocks": ((11, 64, 2, 16), "uint8"),
      "block.1.mlp.mlp1_weight.scales": ((11, 64, 2), "uint8"),
      "block.1.mlp.mlp1_bias": ((11, 64), "bfloat16"),
      "block.1.mlp.mlp2_weight.blocks": ((11, 64, 1, 16), "uint8"),
      "block.1.mlp.mlp2_weight.scales": ((11, 64, 1), "uint8"),
      "block.1.mlp.mlp2_bias": ((11, 64), "bfloat16"),
  }


def test_openais_published_config():
  values = dict(
      num_hidden_layers=24, num_experts=32, experts_per_token=4,
      vocab_size=201088, hidden_size=2880, intermediate_size=2880,
      swiglu_limit=7.0, head_dim=64, num_attention_heads=64,
      num_key_value_heads=8, sliding_window=128, initial_context_length=4096,
      rope_theta=150000, rope_scaling_factor=32.0, rope_ntk_alpha=1,
      rope_ntk_beta=32)
  assert openai.from_config(values) == jaxlm.preset("gpt-oss-20b")
  assert openai.to_config(jaxlm.preset("gpt-oss-20b")) == values
  with pytest.raises(ValueError, match="'moe_every': 2"):
    openai.from_config(values | {"moe_every": 2})


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "gpt2", "deepseek-v3"])
def test_openais_layout_is_of_gpt_oss_alone(name, tmp_path):
  config = jaxlm.preset(name)
  with pytest.raises(ValueError, match="gpt-oss alone.*Use another format"):
    formats.write(Checkpoint(config, {}), tmp_path / "x", "openai")
  assert not list(tmp_path.iterdir())


def small(tmp_path):
  config = shrink("qwen3-0.6b", 2)
  checkpoint = checkpoint_of(config)
  formats.write(checkpoint, tmp_path / "x")
  return checkpoint, tmp_path / "x"


def test_native_checkpoints_hold_what_no_other_format_can(tmp_path):
  config = shrink("qwen3-30b-a3b", 3)
  config = dataclasses.replace(
      config, moe=dataclasses.replace(
          config.moe, shared=jaxlm.MLPConfig(7),
          router=jaxlm.RouterConfig("noisy_topk", bias=True)))
  checkpoint = checkpoint_of(config)
  with pytest.raises(ValueError, match="no family"):
    formats.write(checkpoint, tmp_path / "x", "hf")
  formats.write(checkpoint, tmp_path / "x")
  back = formats.read(tmp_path / "x")
  assert (back.config, back.about) == (config, checkpoint.about)
  assert_same(read_all(back.tensors), read_all(checkpoint.tensors))


def test_large_arrays_are_stored_in_chunks(tmp_path):
  native._write(tmp_path / "x", of_array(x := np.arange(
      9 * 2 ** 21, dtype=np.float32).reshape(9, 2 ** 21)), x)
  assert len(list((tmp_path / "x" / "c").iterdir())) == 2
  np.testing.assert_array_equal(native._open(tmp_path / "x").read(), x)


def damage_missing_leaf(directory):
  shutil.rmtree(directory / "params/layers/1/mlp/down")


def damage_misshapen_leaf(directory):
  path = directory / "params/layers/1/mlp/down/zarr.json"
  values = json.loads(path.read_text())
  path.write_text(json.dumps(values | {"shape": [2, 2]}))


def damage_metadata(directory):
  (directory / "params/layers/1/mlp/down/zarr.json").write_text("{")


def damage_config(directory):
  values = files.read_json(directory / "config.json")
  values["config"]["attention"]["num_heads"] = "many"
  files.write_json(directory / "config.json", values)


def damage_version(directory):
  values = files.read_json(directory / "config.json")
  files.write_json(directory / "config.json", values | {"version": 99})


@pytest.mark.parametrize("damage,message", [
    (damage_missing_leaf, "missing: layers/1/mlp/down"),
    (damage_misshapen_leaf, r"layers/1/mlp/down is \[2, 2\], expected"),
    (damage_metadata, "mlp/down cannot be read"),
    (damage_config, "config.attention.num_heads='many'"),
    (damage_version, "version=99")])
def test_damaged_native_checkpoints_are_refused(damage, message, tmp_path):
  _, directory = small(tmp_path)
  damage(directory)
  with pytest.raises(ValueError, match=message):
    formats.read(directory)


@pytest.mark.parametrize("how", ["flipped", "short", "gone"])
def test_a_damaged_chunk_is_seen_when_it_is_read(how, tmp_path):
  _, directory = small(tmp_path)
  chunk = directory / "params/embed/embedding/c/0/0"
  content = bytearray(chunk.read_bytes())
  content[5] ^= 1
  chunk.unlink()
  if how != "gone":
    chunk.write_bytes(content if how == "flipped" else content[:-1])
  tensors = formats.read(directory).tensors
  with pytest.raises(ValueError, match="embed/embedding cannot be read"):
    tensors["embed/embedding"].read()


def test_what_is_no_checkpoint(tmp_path):
  with pytest.raises(ValueError, match="x does not exist"):
    formats.read(tmp_path / "x")
  with pytest.raises(ValueError, match="is no checkpoint: expected"):
    formats.read(tmp_path)
  (tmp_path / "config.json").write_text('{"hello": 3}')
  with pytest.raises(ValueError, match="is no checkpoint: expected"):
    formats.read(tmp_path)
  with pytest.raises(ValueError, match="format='onnx': use one of"):
    formats.write(checkpoint_of(gpt_oss()), tmp_path / "x", "onnx")


def test_a_failure_half_way_leaves_nothing(tmp_path):
  checkpoint = checkpoint_of(gpt_oss())
  bad = cast(checkpoint.tensors, "float16")
  name = list(bad)[-1]
  huge = np.full(bad[name].shape, 1e30, BF16)
  bad = cast(checkpoint.tensors | {name: of_array(huge)}, "float16")
  for format in formats.FORMATS:
    with pytest.raises(ValueError, match=f"{name} has values beyond float16"):
      formats.write(dataclasses.replace(checkpoint, tensors=bad),
                    tmp_path / "x", format)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fields", [
    dict(num_layers=10 ** 9), dict(vocab_size=10 ** 9), dict(d_model=10 ** 9)])
def test_absurd_sizes_are_refused_at_once(fields):
  config = dataclasses.replace(jaxlm.preset("qwen3-0.6b"), **fields)
  with pytest.raises(ValueError, match="is of no model"):
    leaf_shapes(config)


@pytest.mark.parametrize("name", ["gpt-oss-20b", "gemma3-1b", "deepseek-v3"])
def test_leaves_of_the_presets(name):
  config = jaxlm.preset(name)
  shapes = leaf_shapes(config)
  total = sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values())
  assert total == sum(x.size for x in jax.tree.leaves(
      jaxlm.abstract_params(config)))
  layers = [path.split("/")[1] for path in shapes if path.startswith("layers/")]
  assert layers == sorted(layers, key=int)
