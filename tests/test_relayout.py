"""Parameters laid out for a platform are the same model, byte for byte."""
import functools

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm import lm as lm_module
from jaxlm.config import (AttentionConfig, MLPConfig, ModelConfig, MoEConfig,
                          RopeConfig, RouterConfig)
from jaxlm.convert.checkpoint import named_leaves
from jaxlm.model.transformer import per_layer
from jaxlm.relayout import relayout
from pallas_kernels.quant import MXFP4, MXFP4Pairs

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIG = ModelConfig(
    vocab_size=61, d_model=64, num_layers=2,
    attention=AttentionConfig(6, 2, 8, RopeConfig(), RopeConfig()),
    moe=MoEConfig(5, 2, MLPConfig(96, "clamped_swiglu", bias=True,
                                  interleaved=True),
                  RouterConfig("topk_softmax", bias=True)))
TOKENS = np.arange(26).reshape(2, 13)


@pytest.fixture(scope="module")
def params():
  params = jaxlm.init_params(CONFIG, jax.random.key(0))
  for name in ("gate_up", "down"):
    moe = params["stack_0"]["layer_0"]["moe"]
    moe[name] = MXFP4.quantize(moe[name])
  return params


def assert_equal(found, expected):
  found, expected = named_leaves(found), named_leaves(expected)
  assert found.keys() == expected.keys()
  for name, leaf in expected.items():
    np.testing.assert_array_equal(found[name], leaf, name)


@pytest.mark.parametrize("form", [lambda params: params,
                                  functools.partial(per_layer, CONFIG)])
def test_for_a_tpu_and_back(params, form):
  params = form(params)
  there = relayout(CONFIG, params, "tpu")
  kinds = jax.tree.leaves(there, is_leaf=lambda x: isinstance(x, MXFP4Pairs))
  pairs = [x for x in kinds if isinstance(x, MXFP4Pairs)]
  assert sorted({x.deinterleaved for x in pairs}) == [False, True]
  assert_equal(relayout(CONFIG, there, "cpu"), params)
  assert_equal(relayout(CONFIG, there, "tpu"), there)
  assert_equal(relayout(CONFIG, params, "gpu"), params)


def test_gate_and_up_are_taken_apart_where_they_alternate_alone(params):
  halves = CONFIG.moe.expert.__class__(96)
  config = jaxlm.ModelConfig(**vars(CONFIG) | {"moe": MoEConfig(
      5, 2, halves, RouterConfig("topk_softmax", bias=True))})
  layer = relayout(config, params, "tpu")["stack_0"]["layer_0"]["moe"]
  assert not layer["gate_up"].deinterleaved


def test_either_layout_gives_the_same_logits(params):
  published = jaxlm.LM(CONFIG, jax.tree.map(jax.numpy.asarray, params))
  laid_out = jaxlm.LM(CONFIG, relayout(CONFIG, published.params, "tpu"))
  np.testing.assert_array_equal(laid_out.logits(TOKENS),
                                published.logits(TOKENS))


def test_a_checkpoint_is_as_published_whatever_the_layout(params, tmp_path,
                                                          monkeypatch):
  jaxlm.save(jaxlm.LM(CONFIG, params), tmp_path / "published")
  monkeypatch.setattr(lm_module, "platform", lambda: "tpu")
  lm = jaxlm.load(tmp_path / "published", None)
  assert isinstance(lm.params["layers"]["1"]["moe"]["down"], MXFP4Pairs)
  jaxlm.save(lm, tmp_path / "again")
  first, again = ({path.relative_to(folder): path.read_bytes()
                   for path in folder.rglob("*") if path.is_file()}
                  for folder in (tmp_path / "published", tmp_path / "again"))
  assert again == first
