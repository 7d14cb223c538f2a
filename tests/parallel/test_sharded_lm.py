"""A checkpoint on a mesh says what it says on one device."""
import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.config import (AttentionConfig, MLAConfig, MLPConfig, ModelConfig,
                          MoEConfig, RopeConfig, RouterConfig)
from jaxlm.convert import formats
from jaxlm.convert.quantized import quantize_experts
from jaxlm.model.transformer import init_params
from jaxlm.parallel.mesh import make_mesh
from pallas_kernels.quant import is_quantized

pytestmark = pytest.mark.usefixtures("quick_compile")

GPT_OSS = ModelConfig(
    vocab_size=48, d_model=64, num_layers=2,
    attention=AttentionConfig(8, 2, 6, RopeConfig(), RopeConfig(),
                              sliding_window=5, sinks=True, biases=("q", "o")),
    moe=MoEConfig(8, 3, MLPConfig(32, "clamped_swiglu", bias=True,
                                  interleaved=True),
                  RouterConfig("topk_softmax", bias=True)),
    layer_pattern=("sliding", "full"))
DEEPSEEK = ModelConfig(
    vocab_size=48, d_model=64, num_layers=2,
    attention=MLAConfig(4, 10, 8, 6, 12, q_rank=14),
    mlp=MLPConfig(56), num_dense_layers=1,
    moe=MoEConfig(8, 3, MLPConfig(24), RouterConfig("sigmoid_topk"),
                  shared=MLPConfig(20)))
TOKENS = np.random.default_rng(2).integers(0, 48, (4, 9))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
  """Directories by name; "mxfp4" has gpt-oss's experts packed."""
  folder = tmp_path_factory.mktemp("checkpoints")
  for name, config in (("gpt-oss", GPT_OSS), ("deepseek", DEEPSEEK)):
    # Larger than at init: so that every token depends on the context.
    params = jax.tree.map(lambda x: 2 * x,
                          init_params(config, jax.random.key(3)))
    jaxlm.save(jaxlm.LM(config, params), folder / name)
  formats.write(quantize_experts(formats.read(folder / "gpt-oss"), "mxfp4"),
                folder / "mxfp4")
  return folder


@pytest.mark.parametrize("name, sizes", [
    ("gpt-oss", {"expert": 2, "tensor": 2, "data": 2}),
    ("mxfp4", {"expert": 4, "tensor": 2}), ("mxfp4", {"data": 8}),
    ("deepseek", {"expert": 4, "tensor": 2})])
def test_a_checkpoint_on_a_mesh(checkpoints, name, sizes):
  alone = jaxlm.load(checkpoints / name, "float32")
  tokens = np.resize(TOKENS, (8, 9)) if sizes == {"data": 8} else TOKENS
  with jax.set_mesh(make_mesh(sizes)):
    split = jaxlm.load(checkpoints / name, "float32")
    logits = np.asarray(split.logits(tokens))
    text = np.asarray(split.generate(tokens, max_new_tokens=7))
  leaf = split.params["layers"]["1"]["moe"]["down"]
  assert is_quantized(leaf) == (name == "mxfp4")
  for x in jax.tree.leaves(leaf):
    held = max(shard.data.size for shard in x.addressable_shards)
    assert held * sizes.get("expert", 1) * sizes.get("tensor", 1) == x.size
  expected = np.asarray(alone.logits(tokens))
  assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()
  np.testing.assert_array_equal(
      text, np.asarray(alone.generate(tokens, max_new_tokens=7)))
