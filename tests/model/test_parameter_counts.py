"""Every preset against the published number of parameters."""
import math

import jax
import pytest

import jaxlm
from jaxlm.config import stacks

TOTAL = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama3.1-8b": 8_030_261_248,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-30b-a3b-2507": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen3-235b-a22b-2507": 235_093_634_560,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 3_880_263_168,
    "gemma3-12b": 11_766_034_176,
    "gemma3-27b": 27_009_346_304,
    "mixtral-8x7b": 46_702_792_704,
    "deepseek-v3": 671_026_419_200,
    "deepseek-r1": 671_026_419_200,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
}

# All parameters but those of the experts a token does not visit.
ACTIVE = {
    "qwen3-30b-a3b": 3_353_032_704,
    "qwen3-30b-a3b-2507": 3_353_032_704,
    "qwen3-235b-a22b": 22_190_763_520,
    "qwen3-235b-a22b-2507": 22_190_763_520,
    "mixtral-8x7b": 12_879_925_248,
    # Published as 37B.
    "deepseek-v3": 37_552_297_472,
    "deepseek-r1": 37_552_297_472,
}

# The same, less the embedding, which is a look-up: gpt-oss's model card.
ACTIVE_WITHOUT_EMBEDDING = {
    "gpt-oss-20b": 3_608_307_264,
    "gpt-oss-120b": 5_132_849_472,
}


def size(tree) -> int:
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def expert_parameters(params) -> int:
  """Those of all routed experts."""
  return sum(
      size({name: leaf for name, leaf in layer["moe"].items()
            if name not in ("router", "router_bias", "balance_bias",
                            "shared")})
      for name, stack in params.items() if name.startswith("stack_")
      for layer in stack.values() if "moe" in layer)


def test_every_preset_has_a_published_number():
  assert set(TOTAL) == set(jaxlm.presets())
  mixtures = {name for name in TOTAL if jaxlm.preset(name).moe}
  assert mixtures == set(ACTIVE) | set(ACTIVE_WITHOUT_EMBEDDING)


@pytest.mark.parametrize("name", TOTAL)
def test_parameter_counts(name):
  config = jaxlm.preset(name)
  params = jaxlm.abstract_params(config)
  total = size(params)
  assert total == TOTAL[name]
  if config.moe is None:
    return
  all_experts, moe = expert_parameters(params), config.moe
  assert all_experts % moe.num_experts == 0
  idle = moe.num_experts - moe.experts_per_token
  active = total - all_experts // moe.num_experts * idle
  if name in ACTIVE:
    assert active == ACTIVE[name]
  else:
    embedding = size(params["embed"])
    assert active - embedding == ACTIVE_WITHOUT_EMBEDDING[name]


@pytest.mark.parametrize("name", TOTAL)
def test_stacks_hold_every_layer_once(name):
  config = jaxlm.preset(name)
  layers = []
  for stack in stacks(config):
    assert stack.start == len(layers)
    layers += stack.kinds * stack.repeats
  assert tuple(layers) == config.layers
