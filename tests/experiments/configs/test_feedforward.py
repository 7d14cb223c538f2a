"""Arms of the feed-forward experiment."""
import pytest

from experiments.configs import feedforward


def test_arms_differ_in_the_activation_alone():
  found = feedforward.get_design(feedforward.get_config())
  forms = {arm: (model.mlp.activation, model.mlp.gated)
           for arm, model in found.models.items()}
  assert forms == {
      "gelu": ("gelu", False), "swiglu": ("silu", True),
      "geglu": ("gelu", True), "clamped": ("clamped_swiglu", True)}
  assert found.baseline == "gelu"
  gated = {found.solutions[arm].dims["d_ff"]
           for arm in ("swiglu", "geglu", "clamped")}
  assert len(gated) == 1
  plain = found.solutions["gelu"].dims["d_ff"]
  assert plain / gated.pop() == pytest.approx(1.5, rel=0.02)
  assert len({(m.d_model, m.num_layers, m.attention)
              for m in found.models.values()}) == 1
  assert [claim.arms for claim in found.claims if claim.kind == "less"] == [
      ("swiglu", "gelu"), ("geglu", "gelu")]


def test_arms_are_chosen_by_the_config():
  config = feedforward.get_config("minute")
  config.model.arms = ("swiglu", "geglu")
  found = feedforward.get_design(config)
  assert found.baseline == "swiglu"
  assert [claim.kind for claim in found.claims] == ["equal"]
  config.model.arms = ("swiglu", "reglu")
  with pytest.raises(ValueError, match=r"\['reglu'\]: use some of"):
    feedforward.get_design(config)
