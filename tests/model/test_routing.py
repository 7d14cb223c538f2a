import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxlm.config import MLPConfig, MoEConfig, RouterConfig
from jaxlm.model import routing

pytestmark = pytest.mark.usefixtures("quick_compile")

# Two tokens whose softmax over four experts is, row by row,
#   4/8 2/8 1/8 1/8   and   1/10 1/10 2/10 6/10.
LOGITS = np.log(np.array([[4., 2, 1, 1], [1, 1, 2, 6]], np.float32))


def moe(kind, per_token=2, num_experts=4, **router):
  return MoEConfig(num_experts, per_token, MLPConfig(8),
                   RouterConfig(kind, **router))


def gates(routed: routing.Routing, num_tokens: int) -> np.ndarray:
  """Weight of each expert for each token, 0 where not chosen."""
  expert_M = np.repeat(np.arange(len(routed.group_sizes_E)),
                       routed.group_sizes_E)
  table = np.zeros((num_tokens, len(routed.group_sizes_E)), np.float32)
  np.add.at(table, (routed.token_M, expert_M), routed.weight_M)
  return table


def gates_of(config, logits=LOGITS, **kwargs):
  return gates(routing.route(config, jnp.array(logits), **kwargs)[0],
               len(logits))


def close(found, expected, **tolerance):
  np.testing.assert_allclose(found, expected, **{"rtol": 2e-6, "atol": 1e-7,
                                                 **tolerance})


def test_softmax_then_top_k():
  close(gates_of(moe("softmax_topk")), [[.5, .25, 0, 0], [0, 0, .2, .6]])


@pytest.mark.parametrize("config", [
    moe("softmax_topk", renormalize=True), moe("topk_softmax"),
    moe("noisy_topk")])
def test_renormalised_is_a_softmax_over_the_chosen(config):
  # 4 : 2 and 2 : 6. Without a key noisy top-k has no noise, whatever its scale.
  close(gates_of(config, noise_scale_TE=jnp.full((2, 4), 9.)),
        [[2 / 3, 1 / 3, 0, 0], [0, 0, .25, .75]])


def test_switch_keeps_the_probability_of_its_one_expert():
  close(gates_of(moe("softmax_topk", 1)), [[.5, 0, 0, 0], [0, 0, 0, .6]])
  close(gates_of(moe("topk_softmax", 1)), [[1, 0, 0, 0], [0, 0, 0, 1]])


def test_sigmoids_then_top_k():
  # Odds 4, 2, 1, 1 and 1, 1, 2, 6.
  close(gates_of(moe("sigmoid_topk")), [[.8, 2 / 3, 0, 0],
                                        [0, 0, 2 / 3, 6 / 7]])
  # .8 : 2/3 is 6 : 5; 2/3 : 6/7 is 7 : 9.
  close(gates_of(moe("sigmoid_topk", renormalize=True, weight_scale=2.5)),
        2.5 * np.array([[6 / 11, 5 / 11, 0, 0], [0, 0, 7 / 16, 9 / 16]]))


def test_groups_limit_the_choice_by_hand():
  # Scores of six experts in groups of two; the bias makes 1/2 of expert 1
  # 9/10 and 1/5 of expert 2 0.
  odds = np.array([[1.5, 1, .25, 4, 3, 7 / 3]], np.float32)
  bias = jnp.array([0, .4, -.2, 0, 0, 0])
  config = moe("sigmoid_topk", 2, 6, renormalize=True, balance_bias=True,
               num_groups=3, groups_per_token=1, weight_scale=2.)
  # Groups: .6 + .9 = 1.5; 0 + .8; .75 + .7 = 1.45. The best single unbiased
  # expert, 3, is in neither of the best; the weights are .6 : .5, unbiased.
  close(gates_of(config, np.log(odds), balance_bias_E=bias),
        [[2 * 6 / 11, 2 * 5 / 11, 0, 0, 0, 0]])
  # Without the bias: 1.1, 1 and 1.45.
  close(gates_of(config, np.log(odds)),
        [[0, 0, 0, 0, 2 * .75 / 1.45, 2 * .7 / 1.45]])
  # Two groups: of .6, .9, .75 and .7 the biased choice is 1 and 4.
  two = dataclasses.replace(config, router=dataclasses.replace(
      config.router, groups_per_token=2))
  close(gates_of(two, np.log(odds), balance_bias_E=bias),
        [[0, 2 * .5 / 1.25, 0, 0, 2 * .75 / 1.25, 0]])


def test_switch_loss_of_sigmoids_takes_their_shares():
  # Sigmoids .8 2/3 .5 .5 and .5 .5 2/3 6/7, of which the first and last win.
  config = moe("sigmoid_topk", 1, renormalize=True)
  _, output = routing.route(config, jnp.array(LOGITS))
  first = .8 / (.8 + 2 / 3 + 1) + .5 / (1 + 2 / 3 + 6 / 7)
  last = .5 / (.8 + 2 / 3 + 1) + (6 / 7) / (1 + 2 / 3 + 6 / 7)
  close(output.losses["switch"], 4 * (first / 2 + last / 2) / 2)


def test_hopeless_sigmoids_make_no_nan():
  found = gates_of(moe("sigmoid_topk", renormalize=True),
                   np.full((1, 4), -200, np.float32))
  close(found, np.zeros((1, 4)))


def test_choices_are_best_first():
  expert_TA, weight_TA = routing.choose(moe("softmax_topk"), LOGITS)
  assert expert_TA.tolist() == [[0, 1], [3, 2]]
  close(weight_TA, [[.5, .25], [.6, .2]])


def test_ties_go_to_the_lower_expert():
  expert_TA, weight_TA = routing.choose(moe("topk_softmax", 3, 5),
                                        jnp.zeros((2, 5)))
  assert expert_TA.tolist() == [[0, 1, 2]] * 2
  close(weight_TA, np.full((2, 3), 1 / 3))


def test_noise_of_the_given_scale_joins_the_logits():
  key, scale = jax.random.key(3), np.array([[0., 1, 2, 3], [3, 2, 1, 0]])
  noisy = LOGITS + scale * np.asarray(jax.random.normal(key, (2, 4)))
  config = moe("noisy_topk")
  found = gates_of(config, noise_scale_TE=jnp.array(scale, jnp.float32),
                   key=key)
  close(found, gates_of(moe("topk_softmax"), noisy.astype(np.float32)))
  assert np.abs(found - gates_of(config)).max() > 0.01


def test_expert_choice_by_hand():
  # Three experts take one of three tokens each: the first two take token 0
  # (.5 and .4), the third token 2 (.6); nobody takes token 1.
  probs = np.array([[.5, .4, .1], [.4, .3, .3], [.1, .3, .6]], np.float32)
  config = moe("expert_choice", 1, 3)
  close(gates_of(config, np.log(probs)), [[.5, .4, 0], [0, 0, 0], [0, 0, .6]])
  routed, output = routing.route(config, jnp.log(probs))
  assert routed.row_TA is None
  close(output.dropped, 1 / 3)
  close(output.load_E, np.full(3, 1 / 3))
  # Seven tokens twice each over three experts: ceil(14 / 3) = 5.
  routed, _ = routing.route(moe("expert_choice", 2, 3), jnp.zeros((7, 3)))
  assert routed.group_sizes_E.tolist() == [5, 5, 5]
  # No expert takes a token twice.
  routed, _ = routing.route(moe("expert_choice", 3, 3), jnp.zeros((2, 3)))
  assert routed.group_sizes_E.tolist() == [2, 2, 2]


def test_cv_of_importance_by_hand():
  # Importance 2/3, 1/3, 1/4, 3/4: mean 1/2, mean square (5/9 + 5/8) / 4
  # = 85/288, variance 13/288, over 1/4.
  _, output = routing.route(moe("topk_softmax"), jnp.array(LOGITS))
  close(output.losses["cv_importance"], 13 / 72)


def test_switch_loss_by_hand():
  # The full softmax's means are .3 .175 .1625 .3625; with one expert a token
  # the shares are 1/2 0 0 1/2, with two 1/4 each.
  loss = lambda config: routing.route(
      config, jnp.array(LOGITS))[1].losses["switch"]
  close(loss(moe("softmax_topk", 1)), 4 * (.3 + .3625) / 2)
  close(loss(moe("topk_softmax", 2)), 1)


@pytest.mark.parametrize("per_token", [1, 2, 3])
def test_switch_loss_is_one_when_uniform(per_token):
  uniform = np.stack([np.roll([3., 2, 1, 0], i) for i in range(4)])
  _, output = routing.route(moe("softmax_topk", per_token), jnp.array(uniform))
  close(output.losses["switch"], 1)
  close(output.losses["cv_importance"], 0)


def sequence_loss(config, logits, num_sequences, **kwargs):
  return routing.route(config, jnp.array(logits), num_sequences=num_sequences,
                       **kwargs)[1].losses["sequence"]


def test_sequence_loss_by_hand():
  # Of each token alone: 4 (.5) and 4 (.6); with two experts a token
  # 4 (.5 + .25) / 2 and 4 (.2 + .6) / 2.
  close(sequence_loss(moe("softmax_topk", 1), LOGITS, 2), (2 + 2.4) / 2)
  close(sequence_loss(moe("topk_softmax", 2), LOGITS, 2), (1.5 + 1.6) / 2)
  # One sequence is what the Switch loss takes the whole batch for.
  close(sequence_loss(moe("softmax_topk", 1), LOGITS, 1),
        4 * (.3 + .3625) / 2)


def test_sequence_loss_sees_what_evens_out_over_a_batch():
  # Five sequences of three tokens, each with an expert of its own.
  logits = np.repeat(99 * np.eye(5, dtype=np.float32), 3, 0)
  config = moe("softmax_topk", 1, 5)
  close(routing.route(config, jnp.array(logits))[1].losses["switch"], 1)
  close(sequence_loss(config, logits, 5), 5)
  # A token of each in each sequence.
  close(sequence_loss(config, 99 * np.tile(np.eye(5, dtype=np.float32),
                                           (3, 1)), 3), 1)


def test_sequence_loss_and_its_gradient_are_those_of_the_formula():
  config = moe("sigmoid_topk", 2, 5, balance_bias=True)
  random = np.random.default_rng(3)
  logits = random.normal(size=(4 * 7, 5)).astype(np.float32)
  bias = random.normal(scale=.2, size=5).astype(np.float32)

  def formula(logits):
    losses = []
    for s_TE in 1 / (1 + jnp.exp(-logits.reshape(4, 7, 5))):
      order_TE = np.argsort(-(jax.lax.stop_gradient(s_TE) + bias), -1)
      f_E = np.bincount(order_TE[:, :2].reshape(-1), minlength=5) * 5 / 2 / 7
      p_E = jnp.mean(s_TE / jnp.sum(s_TE, 1, keepdims=True), 0)
      losses.append(f_E @ p_E)
    return sum(losses) / 4

  found = jax.value_and_grad(lambda logits: sequence_loss(
      config, logits, 4, balance_bias_E=jnp.array(bias)))(logits)
  for a, b in zip(found, jax.value_and_grad(formula)(jnp.array(logits))):
    close(a, b, rtol=1e-5)


def test_experts_that_choose_have_no_sequence_loss():
  _, output = routing.route(moe("expert_choice"), jnp.array(LOGITS))
  assert "sequence" not in output.losses


def test_switch_loss_is_the_number_of_experts_when_collapsed():
  _, output = routing.route(moe("softmax_topk", 1, 5),
                            jnp.tile(jnp.array([0., 99, 0, 0, 0]), (6, 1)))
  close(output.losses["switch"], 5)
  close(output.losses["cv_importance"], 4)  # (1, 0, 0, 0, 0): E - 1.
  close(routing.load_statistics(output.load_E)["max_vio"], 4)


def test_router_z_loss_by_hand():
  # The exponentials sum to 8 and to 10.
  _, output = routing.route(moe("softmax_topk"), jnp.array(LOGITS))
  close(output.losses["router_z"], (np.log(8) ** 2 + np.log(10) ** 2) / 2)


CLEAN = np.array([[1, 0, .5]], np.float32)
NOISY = np.array([[1.2, .3, .4]], np.float32)
SCALE = np.array([[.5, 1, 2]], np.float32)


@pytest.mark.parametrize("per_token, z", [
    # Expert 0 is in and must stay above .4; the others must pass 1.2.
    (1, [(1 - .4) / .5, (0 - 1.2) / 1, (.5 - 1.2) / 2]),
    # Experts 0 and 2 must stay above .3; expert 1 must pass .4.
    (2, [(1 - .3) / .5, (0 - .4) / 1, (.5 - .3) / 2]),
])
def test_smooth_load_by_hand(per_token, z):
  close(routing.smooth_load(CLEAN, NOISY, SCALE, per_token),
        stats.norm.cdf(z), rtol=1e-5)


def test_smooth_load_of_all_experts_is_all_tokens():
  close(routing.smooth_load(CLEAN, NOISY, SCALE, 3), [1, 1, 1])


@pytest.mark.parametrize("per_token", [1, 3])
def test_smooth_load_is_the_probability_it_stands_for(per_token):
  random = np.random.default_rng(1)
  clean = random.normal(size=(4, 6))
  scale = random.uniform(.3, 2, (4, 6))
  noisy = clean + scale * random.normal(size=(4, 6))
  draws, expected = 20000, np.zeros(6)
  for expert in range(6):
    again = np.repeat(noisy[None], draws, 0)
    again[:, :, expert] = (clean + scale * random.normal(
        size=(draws, 4, 6)))[:, :, expert]
    rank = np.sum(again > again[:, :, [expert]], -1)
    expected[expert] = np.mean(rank < per_token, 0).sum()
  found = routing.smooth_load(*(jnp.array(x, jnp.float32)
                                for x in (clean, noisy, scale)), per_token)
  # Four tokens' binomial errors, at four standard deviations.
  np.testing.assert_allclose(found, expected, atol=4 * (4 * .25 / draws) ** .5)


def test_noise_gets_gradients_from_the_weights_and_from_the_load():
  config, key = moe("noisy_topk"), jax.random.key(0)
  def weight(scale):
    return jnp.sum(routing.route(config, jnp.array(LOGITS), key=key,
                                 noise_scale_TE=scale)[0].weight_M ** 2)
  def load(scale):
    return routing.route(config, jnp.array(LOGITS), key=key,
                         noise_scale_TE=scale)[1].losses["cv_load"]
  for loss in (weight, load):
    gradient = jax.grad(loss)(jnp.full((2, 4), .7))
    assert np.all(np.isfinite(gradient)) and np.any(gradient != 0)
  assert "cv_load" not in routing.route(
      config, jnp.array(LOGITS), noise_scale_TE=jnp.ones((2, 4)))[1].losses


@pytest.mark.parametrize("scale", [1e-6, 1e-12, 1e-30, 0.])
def test_load_has_finite_gradients_as_the_noise_dies(scale):
  def load(clean, scale):
    return routing.squared_cv(routing.smooth_load(clean, NOISY, scale, 1))
  for gradient in jax.grad(load, (0, 1))(CLEAN, jnp.full((1, 3), scale)):
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("kind, renormalize, expected", [
    ("sigmoid_topk", False, [2 / 3, .5]),
    ("softmax_topk", False, [.25, .125]),
    ("softmax_topk", True, [2 / 3, 1 / 3]),
    ("topk_softmax", False, [2 / 3, 1 / 3]),
])
def test_the_balance_bias_moves_the_choice_and_never_the_weights(
    kind, renormalize, expected):
  # .5 - .4 falls behind .25 and .125, whose weights stay what they were.
  config = moe(kind, renormalize=renormalize, balance_bias=True)
  bias = jnp.array([-.4, 0, 0, 0])
  close(gates_of(config, LOGITS[:1], balance_bias_E=bias), [[0, *expected, 0]])
  def total(logits, bias):
    routed, output = routing.route(config, logits, balance_bias_E=bias)
    return (jnp.sum(routed.weight_M ** 2) + output.losses["switch"]
            + output.losses["cv_importance"])
  gradients = jax.grad(total, (0, 1))(jnp.array(LOGITS), bias)
  assert np.any(gradients[0] != 0) and not np.any(gradients[1])


def test_balance_bias_updates_by_hand():
  # Mean load 1/3, so shortages are -.5, .25 and .25.
  bias, load = jnp.array([.1, 0, -.1]), jnp.array([.5, .25, .25])
  update = routing.updated_balance_bias
  close(update(bias, load, .001, "sign"), [.099, .001, -.099])
  close(update(bias, load, .01, "proportional"), [.095, .0025, -.0975])
  close(update(bias, jnp.full(3, 7.), .01, "sign"), bias)
  both = update(jnp.stack([bias, bias]), jnp.stack([load, load[::-1]]), .001,
                "sign")
  close(both, [[.099, .001, -.099], [.101, .001, -.101]])
  with pytest.raises(ValueError, match="rule='up': use one of .*sign"):
    update(bias, load, .1, "up")


def test_load_statistics_by_hand():
  # Entropy: 1/2 ln 2 + 2 * 1/4 ln 4 = 1.5 ln 2.
  found = routing.load_statistics(
      jnp.array([[.5, .25, .25, 0], [.25, .25, .25, .25], [0, 0, 1, 0]]))
  close(found["max_vio"], [1, 0, 3])
  close(found["entropy"], [1.5 * np.log(2), np.log(4), 0])


CHOICES = st.integers(0, 2 ** 32 - 1).map(np.random.default_rng)


@settings(deadline=None, max_examples=40)
@given(CHOICES, st.sampled_from([(1, 1, 1), (7, 5, 2), (13, 3, 3), (2, 9, 4)]))
def test_rows_are_sorted_and_come_back(random, sizes):
  tokens, experts, per_token = sizes
  expert_TA = np.argsort(random.random((tokens, experts)))[:, :per_token]
  weight_TA = random.random((tokens, per_token), np.float32)
  routed = routing.sort_by_expert(jnp.array(expert_TA), jnp.array(weight_TA),
                                  experts)
  expert_M = np.repeat(np.arange(experts), routed.group_sizes_E)
  assert routed.group_sizes_E.sum() == tokens * per_token
  np.testing.assert_array_equal(np.sort(routed.row_TA, None),
                                np.arange(tokens * per_token))
  np.testing.assert_array_equal(expert_M[routed.row_TA], expert_TA)
  np.testing.assert_array_equal(routed.token_M[routed.row_TA],
                                np.tile(np.arange(tokens)[:, None], per_token))
  np.testing.assert_array_equal(routed.weight_M[routed.row_TA], weight_TA)
  for expert in range(experts):  # Tokens in order within an expert.
    assert np.all(np.diff(routed.token_M[expert_M == expert]) > 0)


@settings(deadline=None, max_examples=20)
@given(CHOICES, st.sampled_from(["softmax_topk", "topk_softmax",
                                 "expert_choice"]))
def test_permuted_tokens_have_permuted_gates(random, kind):
  logits = random.normal(size=(11, 4)).astype(np.float32)
  order = random.permutation(11)
  config = moe(kind)
  close(gates_of(config, logits[order]), gates_of(config, logits)[order])
  outputs = [routing.route(config, jnp.array(x))[1]
             for x in (logits, logits[order])]
  for a, b in zip(*map(jax.tree.leaves, outputs)):
    close(a, b, rtol=1e-5, atol=1e-6)
  close(outputs[0].load_E.sum(), 1)


def test_routers_and_loss_of_transformers():
  torch = pytest.importorskip("torch", reason="the peer runs on torch")
  from transformers import GptOssConfig, MixtralConfig, Qwen3MoeConfig
  from transformers.models.gpt_oss import modeling_gpt_oss
  from transformers.models.mixtral import modeling_mixtral
  from transformers.models.qwen3_moe import modeling_qwen3_moe
  experts, per_token, d_model = 7, 3, 5
  random = np.random.default_rng(0)
  x = random.normal(size=(11, d_model)).astype(np.float32)
  w, bias = (random.normal(size=s).astype(np.float32)
             for s in ((experts, d_model), experts))
  counts = dict(hidden_size=d_model, num_experts_per_tok=per_token)
  peers = {
      "qwen3": (modeling_qwen3_moe.Qwen3MoeTopKRouter(Qwen3MoeConfig(
          num_experts=experts, norm_topk_prob=True, **counts)),
          moe("softmax_topk", per_token, experts, renormalize=True)),
      "qwen2": (modeling_qwen3_moe.Qwen3MoeTopKRouter(Qwen3MoeConfig(
          num_experts=experts, norm_topk_prob=False, **counts)),
          moe("softmax_topk", per_token, experts)),
      "gpt-oss": (modeling_gpt_oss.GptOssTopKRouter(GptOssConfig(
          num_local_experts=experts, **counts)),
          moe("topk_softmax", per_token, experts, bias=True)),
      "mixtral": (modeling_mixtral.MixtralTopKRouter(MixtralConfig(
          num_local_experts=experts, **counts)),
          moe("topk_softmax", per_token, experts)),
  }
  for name, (peer, config) in peers.items():
    peer.weight.data = torch.tensor(w)
    if config.router.bias:
      peer.bias.data = torch.tensor(bias)
    with torch.no_grad():
      logits, weights, chosen = peer(torch.tensor(x))
    ours = x @ w.T + (bias if config.router.bias else 0)
    expert_TA, weight_TA = routing.choose(config, jnp.array(ours))
    np.testing.assert_array_equal(expert_TA, chosen, err_msg=name)
    close(weight_TA, weights, rtol=1e-5)
    # Theirs adds up the k choices' shares, so it is k when uniform.
    theirs = modeling_mixtral.load_balancing_loss_func(
        (logits,), experts, per_token)
    _, output = routing.route(dataclasses.replace(
        config, router=RouterConfig("topk_softmax")), jnp.array(ours))
    close(per_token * output.losses["switch"], theirs, rtol=1e-5)


@pytest.mark.parametrize("renormalize", [True, False])
def test_router_of_deepseek(renormalize):
  torch = pytest.importorskip("torch", reason="the peer runs on torch")
  from transformers import DeepseekV3Config
  from transformers.models.deepseek_v3 import modeling_deepseek_v3
  tokens, experts, d_model = 101, 15, 7
  random = np.random.default_rng(0)
  x, w, bias = (random.normal(size=s).astype(np.float32) for s in (
      (tokens, d_model), (experts, d_model), experts))
  peer = modeling_deepseek_v3.DeepseekV3TopkRouter(DeepseekV3Config(
      hidden_size=d_model, n_routed_experts=experts, num_experts_per_tok=4,
      n_group=5, topk_group=3, norm_topk_prob=renormalize,
      routed_scaling_factor=1.7))
  peer.weight.data = torch.tensor(w)
  peer.e_score_correction_bias = torch.tensor(0.3 * bias)
  with torch.no_grad():
    _, weights, chosen = peer(torch.tensor(x))
  expected = np.zeros((tokens, experts), np.float32)
  np.put_along_axis(expected, chosen.numpy(), weights.numpy(), 1)
  config = moe("sigmoid_topk", 4, experts, renormalize=renormalize,
               balance_bias=True, num_groups=5, groups_per_token=3,
               weight_scale=1.7)
  close(gates_of(config, x @ w.T, balance_bias_E=jnp.array(0.3 * bias)),
        expected, rtol=1e-5)
