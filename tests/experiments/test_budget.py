import itertools

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest

from experiments import budget
from experiments.budget import apart, common_targets, held, measure, solve
from experiments.budget import solve_arms
from experiments.results import Held
from jaxlm.config import (AttentionConfig, MLPConfig, ModelConfig, MoEConfig,
                          RopeConfig, RouterConfig)

SEQ_LEN = 96
ROPE = RopeConfig()


def decoder(num_layers, d_model, num_heads, **feed_forward):
  return ModelConfig(
      260, d_model, num_layers,
      AttentionConfig(num_heads, 1, 16, ROPE, ROPE, sliding_window=32,
                      biases=("q", "k", "v", "o"), sinks=True),
      layer_pattern=("sliding", "full"), tie_embeddings=True, **feed_forward)


def dense(num_layers):
  return lambda d_model, d_ff: decoder(
      num_layers, d_model, 3, mlp=MLPConfig(d_ff))


def experts(num_layers, num_experts, per_token, shared=False):
  """A shared expert takes the place of one routed expert."""
  def make(d_model, d_expert, num_heads):
    expert = MLPConfig(d_expert, "clamped_swiglu", bias=True)
    return decoder(num_layers, d_model, num_heads, moe=MoEConfig(
        num_experts - shared, per_token - shared, expert,
        RouterConfig("topk_softmax", bias=True), expert if shared else None))
  return make


def heads_fill_d_model(config):
  attention = config.attention
  return apart(attention.num_heads * attention.head_dim, config.d_model)


@settings(deadline=None, max_examples=50)
@given(d_model=st.sets(st.integers(9, 40), min_size=1, max_size=8),
       d_ff=st.sets(st.integers(9, 90), min_size=1, max_size=8),
       total=st.integers(9000, 40000), limit=st.floats(0.001, 0.5),
       second=st.sampled_from([None, "flops_per_token", "attention_params"]))
def test_search_misses_nothing(d_model, d_ff, total, limit, second):
  targets = {"total_params": total}
  if second:
    targets |= measure(dense(2)(24, 40), SEQ_LEN, second)
  free = {"d_model": d_model, "d_ff": d_ff}
  search = budget._Search(dense(2), free, targets, SEQ_LEN, 0.005)
  found = [tuple(search.model(i).dims.values()) for i in search.within(limit)]
  expected = []
  for dims in itertools.product(sorted(d_model), sorted(d_ff)):
    sizes = measure(dense(2)(*dims), SEQ_LEN, *targets)
    if all(abs(sizes[name] / targets[name] - 1) <= limit for name in targets):
      expected.append(dims)
  assert sorted(found) == expected


@pytest.mark.parametrize("ratio", [2.5, 3.1, 4.0])
@pytest.mark.parametrize("tolerance", [1e-3, 5e-3, 4e-2])
def test_shape_wins_then_friendly_sizes_then_deviation(ratio, tolerance):
  targets = measure(dense(2)(47, 147), SEQ_LEN, "total_params")
  total = targets["total_params"]
  free = {"d_model": range(36, 60), "d_ff": range(90, 220)}

  def prefer(config):
    return apart(config.mlp.d_ff, ratio * config.d_model)

  models = []
  for d_model, d_ff in itertools.product(*free.values()):
    config = dense(2)(d_model, d_ff)
    off = abs(measure(config, SEQ_LEN, "total_params")["total_params"]
              / total - 1)
    if off <= tolerance / 2:
      size = sum(2 - (n % 4 == 0) - (n % 8 == 0) for n in (d_model, d_ff))
      models.append((prefer(config), size, off, (d_model, d_ff)))
  nearest = min(models)[0]
  best = min(model[1:] for model in models if model[0] <= nearest + 0.1)
  found = solve(dense(2), free, targets, SEQ_LEN, prefer=prefer,
                tolerance=tolerance)
  assert tuple(found.dims.values()) == best[-1]


def width_arms():
  arms = {}
  for depth in (2, 4, 8):
    shrink = (4 / depth) ** 0.5
    arms[f"depth{depth}"] = dict(
        make=experts(depth, 8, 2), prefer=heads_fill_d_model, free=dict(
            d_model=range(int(30 * shrink), int(75 * shrink)),
            d_expert=range(int(45 * shrink), int(120 * shrink)),
            num_heads=range(1, int(7 * shrink))))
  return arms


def granularity_arms():
  """gpt-oss's 1 expert in 8 at three granularities, Qwen3's 1 in 16."""
  shapes = {"8of1": (8, 1, False), "16of2": (16, 2, False),
            "32of4": (32, 4, False), "32of2": (32, 2, False),
            "16of2_shared": (16, 2, True)}
  return {
      name: dict(make=experts(2, *shape), free=dict(
          d_model=range(38, 82), num_heads=range(1, 7),
          d_expert=range(800 // shape[0], 2000 // shape[0])),
          prefer=lambda c: apart(c.d_model, 48) + heads_fill_d_model(c))
      for name, shape in shapes.items()}


@pytest.mark.parametrize("arms,near,wide", [
    (width_arms(), {"total_params": 375e3, "active_params": 122e3}, None),
    (granularity_arms(), {"total_params": 410e3, "active_params": 75e3},
     "32of2"),
])
def test_small_arms_agree_in_total_and_active(arms, near, wide):
  targets = common_targets(arms, near, slack=0.05, seq_len=SEQ_LEN)
  for name, target in targets.items():
    assert target == pytest.approx(near[name], rel=0.05)
  solutions = solve_arms(arms, targets=targets, seq_len=SEQ_LEN)
  for a, b in itertools.combinations(solutions.values(), 2):
    for name, target in targets.items():
      assert abs(a.achieved[name] - b.achieved[name]) <= 0.005 * target
  for solution in solutions.values():
    assert heads_fill_d_model(solution.config) < 0.4
    assert solution.achieved == measure(solution.config, SEQ_LEN)
  equal, unequal = held(solutions)
  assert [item.quantity for item in equal][:2] == list(targets)
  assert "flops_per_token" in [item.quantity for item in unequal]
  if wide:  # fewer of its parameters are active experts: it has a wider rest
    widest = max(solutions, key=lambda name: solutions[name].config.d_model)
    assert widest == wide


def test_solving_is_deterministic_whatever_the_order_of_values():
  targets = {"total_params": 60000.0}
  free = {"d_model": list(range(20, 90)), "d_ff": list(range(20, 300))}
  turned = {name: values[::-1] for name, values in free.items()}
  assert (solve(dense(2), free, targets, SEQ_LEN)
          == solve(dense(2), turned, targets, SEQ_LEN))


def fixed(config, **targets):
  """A solution as if found, whatever it deviates."""
  achieved = measure(config, SEQ_LEN)
  return budget.Solution(config, {}, targets, achieved, {
      name: achieved[name] / target - 1 for name, target in targets.items()})


def test_held_compares_arms_of_the_same_targets():
  configs = [dense(2)(48, 144), dense(2)(40, 190), dense(4)(40, 90)]
  sizes = [measure(config, SEQ_LEN) for config in configs]
  flops = sizes[0]["flops_per_token"]
  solutions = {
      "a": fixed(configs[0], total_params=80000.0),
      "b": fixed(configs[1], total_params=80000.0),
      "c": fixed(configs[2], total_params=70000.0, flops_per_token=flops),
  }
  equal, unequal = held(solutions, notes={"attention_params": "follows"})
  worst = max(abs(size["total_params"] / 80000 - 1) for size in sizes[:2])
  assert Held("total_params", 80000.0, worst, arms=("a", "b")) in equal
  off = abs(sizes[2]["total_params"] / 70000 - 1)
  assert Held("total_params", 70000.0, off, arms=("c",)) in equal
  off = abs(sizes[2]["flops_per_token"] / flops - 1)
  assert Held("flops_per_token", flops, off, arms=("c",)) in equal
  # Two layers with one key/value head each: the caches are equal unasked.
  assert "kv_bytes_per_token" in [item.quantity for item in equal]
  off = 1 - sizes[1]["attention_params"] / sizes[0]["attention_params"]
  assert Held("attention_params", sizes[0]["attention_params"],
              pytest.approx(off), "follows", ("a", "b")) in unequal
  assert not any(item.arms == ("c",) for item in unequal)


def test_held_names_no_arms_when_all_agree():
  solution = fixed(dense(2)(48, 144), total_params=80000.0)
  equal, unequal = held({"a": solution, "b": solution})
  assert {item.arms for item in equal} == {()} and not unequal
  assert [item.quantity for item in equal] == list(budget.QUANTITIES)


FREE = {"d_model": range(16, 49, 16), "d_ff": range(16, 65, 16)}


@pytest.mark.parametrize("change,message", [
    ({"targets": {"params": 1e5}}, "name some of .*total_params"),
    ({"targets": {}}, "name some of"),
    ({"targets": {"total_params": 0}}, "must be positive"),
    ({"free": {}}, "free is empty"),
    ({"free": {"d_model": [], "d_ff": [8]}}, "'d_model'.*positive integers"),
    ({"tolerance": 0}, "tolerance=0"),
    ({"targets": {"total_params": 1e6}},
     "total_params=1,000,000 is out of reach.* 10,070 to 43,702; allow greater "
     "values of d_model or d_ff"),
    ({"targets": {"total_params": 99}}, "lower values of d_model or d_ff"),
    ({"targets": {"total_params": 22000}},
     "within 0.25%; the nearest is {'d_model': 32, 'd_ff': 32} with "
     "total_params=23,046, off by 4.75%: allow values between"),
    ({"targets": {"total_params": 29700}},
     "nearest is {'d_model': 48, 'd_ff': 16} .*allow d_model above 48 or "
     "d_ff below 16, or raise tolerance=0.005"),
])
def test_what_cannot_be_solved_is_explained(change, message):
  arguments = dict(make=dense(2), free=FREE, seq_len=SEQ_LEN,
                   targets={"total_params": 30000}) | change
  with pytest.raises(ValueError, match=message):
    solve(**arguments)


def test_an_arm_that_fails_is_named():
  arms = {"good": dict(targets=measure(dense(2)(32, 32), SEQ_LEN,
                                       "total_params")),
          "bad": dict(targets={"total_params": 1e9})}
  with pytest.raises(ValueError, match="arm 'bad': .*out of reach"):
    solve_arms(arms, make=dense(2), free=FREE, seq_len=SEQ_LEN)


def test_free_dimensions_must_make_valid_and_growing_models():
  with pytest.raises(ValueError, match="num_heads': 3.*not a multiple"):
    solve(lambda num_heads: ModelConfig(
        29, 8, 2, AttentionConfig(num_heads, 2, 4), MLPConfig(9)),
          {"num_heads": [3]}, {"total_params": 5e3}, SEQ_LEN)
  with pytest.raises(ValueError, match="total_params falls from"):
    solve(lambda divisor: dense(2)(480 // divisor, 64),
          {"divisor": range(1, 9)}, {"total_params": 50000}, SEQ_LEN)


def test_common_targets_that_do_not_exist():
  def targets(slack, b):
    arms = {"a": dict(free={"d_model": [32], "d_ff": [32, 33]}),
            "b": dict(free=b)}
    target = measure(dense(2)(32, 32), SEQ_LEN, "total_params")
    return common_targets(arms, target, slack, make=dense(2), seq_len=SEQ_LEN)

  with pytest.raises(ValueError, match="arm 'b': no model .*raise slack=0.01"):
    targets(0.01, {"d_model": [31, 33], "d_ff": [32]})
  with pytest.raises(ValueError, match="suit all arms: arm 'b' has 1 models"):
    targets(0.05, {"d_model": [33], "d_ff": [32]})


def test_a_model_of_given_dimensions_is_held_equal_to_itself():
  model = dense(2)(d_model=12, d_ff=5)
  found = budget.fixed(model, SEQ_LEN)
  assert found.config == model and not found.dims
  assert found.achieved == measure(model, SEQ_LEN)
  equal, _ = held({"a": found, "b": found})
  assert {"total_params", "active_params"} <= {
      item.quantity for item in equal}
  assert not any(item.deviation for item in equal)
