import pytest

from experiments.claims import Claim


@pytest.mark.parametrize("changes, message", [
    ({"kind": "better"}, "kind='better' is not one of"),
    ({"metric": "loss"}, "metric='loss' is not one of"),
    ({"arms": ("a",)}, "needs two arms"),
    ({"arms": ("a", "b", "c")}, "needs two arms"),
    ({"arms": ("a", "a")}, "names an arm twice"),
    ({"margin": 0.1}, "a margin goes with kind 'equal'"),
    ({"kind": "equal"}, "a margin goes with kind 'equal'"),
    ({"kind": "equal", "margin": -1.0}, "must be above zero"),
])
def test_bad_claims_are_refused(changes, message):
  claim = dict(text="t", source="s", published="p", kind="less",
               arms=("a", "b"), metric="eval_loss")
  with pytest.raises(ValueError, match=message):
    Claim(**{**claim, **changes})
