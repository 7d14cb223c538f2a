"""Token by token over a cache, each family computes what transformers does
for the whole sequence at once."""
import numpy as np
import pytest

import jaxlm
from jaxlm.model.cache import empty_cache
from jaxlm.model.transformer import forward_with_cache, per_layer
import reference_models
from quick import quick_jit

TOLERANCE = 3e-5
# gpt-oss's window of 128 is full after the first prompt; the second fills its
# ring while decoding.
PROMPTS = np.array([131, 113])
NEW_TOKENS = 20
VARIANTS = ("qwen3_untied", "qwen3_moe_not_renormalized", "deepseek_v3_plain")


@pytest.mark.parametrize(
    "name", [name for name in reference_models.CASES if name not in VARIANTS])
def test_cache_equals_the_whole_sequence(name):
  config, params, tokens_BT, expected_BTV = reference_models.case(name)
  params = per_layer(config, params)
  cache = empty_cache(config, len(PROMPTS), reference_models.LENGTH)

  @quick_jit
  def run(params, cache, tokens_BT, positions_BT):
    hidden_BTD, cache = forward_with_cache(config, params, cache, tokens_BT,
                                           positions_BT)
    return jaxlm.logits(config, params, hidden_BTD), cache

  # The shorter prompt is padded on its left.
  padding = PROMPTS.max() - PROMPTS
  positions_BT = np.maximum(np.arange(PROMPTS.max()) - padding[:, None], -1)
  for _ in range(1 + NEW_TOKENS):
    real_BT = positions_BT >= 0
    new_BT = np.where(real_BT,
                      np.take_along_axis(tokens_BT, positions_BT, 1), 7)
    logits_BTV, cache = run(params, cache, new_BT, positions_BT)
    for row, real in enumerate(real_BT):
      expected = expected_BTV[row, positions_BT[row, real]]
      assert reference_models.relative_difference(
          logits_BTV[row][real], expected) <= TOLERANCE
    positions_BT = positions_BT[:, -1:] + 1
