"""From GPT-2 to gpt-oss, one change at a time: which step brought what?

The path of S. Raschka's article "From GPT-2 to gpt-oss" (2025). Each arm is
the one before it and one change more; the last is gpt-oss in small. GPT-2 has
biases everywhere, and so has gpt-oss: they stay.

All arms have equal active parameters, mixtures of experts also equal total
ones: d_model is the same throughout, and d_ff or d_expert takes up what a
change leaves. Where query heads come to share keys and values there are more
of them, so that attention has as many parameters: in gpt-oss too the heads
together are wider than d_model.
"""
from experiments import budget as solver
from experiments import design
from experiments.claims import Claim
from jaxlm.config import MLPConfig, NormConfig

# In order; by arm the change against the arm before.
STEPS = {
    "gpt2": "GPT-2: learned positions, LayerNorm, GELU, dropout 0.1, as many "
    "key/value heads as query heads",
    "no_dropout": "no dropout",
    "rope": "RoPE in place of learned positions",
    "swiglu": "SwiGLU, in gpt-oss's clamped form, in place of GELU",
    "moe": "experts in place of one feed-forward network",
    "gqa": "query heads share keys and values, and are more",
    "window": "a sliding window on every other layer",
    "rmsnorm": "RMSNorm in place of LayerNorm",
    "sinks": "sinks: gpt-oss in small",
}
MODEL = {
    "arms": tuple(STEPS), "num_layers": 2, "vocab_size": 260, "d_model": 48,
    "head_dim": 16,
    # num_heads before they share keys and values, num_kv_heads after.
    "num_heads": 3, "num_kv_heads": 1, "sliding_window": 128,
    "num_experts": 8, "experts_per_token": 2,
    # d_expert decides the size of all arms; d_ff is where the search for that
    # of a gated network begins.
    "d_expert": 72, "d_ff": 144,
}
BUDGETS = {
    # Every arm is the one named before it in STEPS and one change more.
    "minute": {"model": {"arms": ("gpt2", "no_dropout", "moe", "gqa")}},
    "laptop": {},
    "gpu": {"train": {"steps": 700, "eval_every": 175}, "model": {
        "num_layers": 8, "d_model": 224, "head_dim": 32, "num_heads": 7,
        "num_kv_heads": 2, "num_experts": 32, "experts_per_token": 4,
        "d_expert": 112, "d_ff": 448}},
}


def get_config(budget="laptop"):
  return design.make_config(MODEL, BUDGETS, budget)


def get_design(config) -> design.Design:
  model, seq_len = config.model, config.train.seq_len
  if unknown := set(model.arms) - set(STEPS):
    raise ValueError(f"model.arms names {sorted(unknown)}: use some of "
                     f"{tuple(STEPS)}")
  names = [name for name in STEPS if name in model.arms]
  arms = {name: _arm(config, name) for name in STEPS}
  mixtures = [name for name, arm in arms.items() if "d_expert" in arm["free"]]
  # Norms, biases and sinks differ by less than one more of d_expert: all
  # mixtures are near their mean.
  sizes = [solver.measure(arms[name]["make"](model.d_expert), seq_len,
                          "total_params", "active_params")
           for name in mixtures]
  targets = {key: sum(size[key] for size in sizes) / len(sizes)
             for key in sizes[0]}
  dense = {"active_params": targets["active_params"]}
  solutions = {}
  for name in names:
    solutions |= solver.solve_arms(
        {name: arms[name]}, seq_len=seq_len,
        targets=targets if name in mixtures else dense)
  return design.Design(
      "From GPT-2 to gpt-oss at equal active parameters: which step brought "
      "what?", names[0], solutions,
      _descriptions(names),
      tuple(claim for claim in CLAIMS if set(claim.arms) <= set(names)), {
          "total_params": "learned positions are a table that is only looked "
          "up, and experts not visited are there all the same",
          "flops_per_token": "more query heads look at the context more "
          "often, those with a window at less of it"})


def _descriptions(names):
  """By arm the steps from the arm before it."""
  found, steps = {}, []
  for name, step in STEPS.items():
    steps.append(step)
    if name in names:
      found[name], steps = "; ".join(steps), []
  return found


def _longest(config):
  """Positions of training, and of what is generated to measure speed."""
  speed = config.speed
  return max(config.train.seq_len, speed.prompt_tokens + speed.new_tokens)


def _arm(config, name):
  """What the steps up to this one make."""
  model = config.model
  def has(step):
    return list(STEPS).index(name) >= list(STEPS).index(step)
  heads = model.num_heads
  attention = {
      "num_heads": 2 * heads - model.num_kv_heads if has("gqa") else heads,
      "num_kv_heads": model.num_kv_heads if has("gqa") else heads,
      "sinks": has("sinks")}
  if not has("rope"):
    attention |= {"rope_full": None, "rope_sliding": None}
  changes = {
      "attention": attention,
      "max_positions": 0 if has("rope") else _longest(config),
      "layer_pattern": ("sliding", "full") if has("window") else ("full",),
      "norm": NormConfig("rmsnorm" if has("rmsnorm") else "layernorm", 1e-5),
      "dropout": 0.0 if has("no_dropout") else 0.1}

  def make(**feed_forward):
    return design.decoder(
        config, model.num_layers, model.d_model, attention["num_heads"],
        **feed_forward, **changes)

  def mixture(d_expert):
    return make(moe=design.experts(
        model.num_experts, model.experts_per_token, d_expert))

  def gated(d_ff):
    return make(mlp=design.feed_forward(d_ff))

  def plain(d_ff):
    return make(mlp=MLPConfig(d_ff, "gelu_tanh", gated=False, bias=True))

  if has("moe"):
    return {"make": mixture, "free": {
        "d_expert": design.around(model.d_expert)}}
  if has("swiglu"):
    return {"make": gated, "free": {"d_ff": design.around(model.d_ff)}}
  return {"make": plain, "free": {"d_ff": design.around(1.5 * model.d_ff)}}


_ONE_PERCENT = "the margin is about 1 % of the loss"
CLAIMS = (
    Claim("No dropout is better in one epoch",
          "Liu, Bauer and Manning (arXiv 2505.24788)",
          "Pythia 160M and 1.4B: better without", "less",
          ("no_dropout", "gpt2"), "eval_loss"),
    Claim("RoPE is better than learned positions",
          "EleutherAI, Rotary Embeddings: A Relative Revolution (2021)",
          "125M, OpenWebText2: loss 2.759 against 2.809", "less",
          ("rope", "no_dropout"), "eval_loss"),
    Claim("SwiGLU is better than GELU at equal size",
          "Shazeer (arXiv 2002.05202), Table 1",
          "log-perplexity after 65,536 steps: 1.944 against 1.983", "less",
          ("swiglu", "rope"), "eval_loss"),
    Claim("Experts are better at equal active parameters",
          "OLMoE (arXiv 2409.02060), section 4.1",
          "the dense model's quality with a third of the tokens", "less",
          ("moe", "swiglu"), "eval_loss"),
    Claim("Shared keys and values cost nothing",
          "Gemma 2 (arXiv 2408.00118), Table 8",
          "9B, mean of 4 benchmarks: 50.8 against 50.3", "equal",
          ("gqa", "moe"), "eval_loss", margin=0.025,
          remark=f"{_ONE_PERCENT}, which is what the benchmarks differ by"),
    Claim("Shared keys and values save memory",
          "Ainslie et al. (arXiv 2305.13245)",
          "in proportion to the key/value heads", "less", ("gqa", "moe"),
          "kv_bytes_per_token"),
    Claim("A window on every other layer costs nothing",
          "Gemma 3 (arXiv 2503.19786), Fig. 3",
          "perplexity within 0.1", "equal", ("window", "gqa"), "eval_loss",
          margin=0.025, remark=_ONE_PERCENT),
    Claim("A window on every other layer saves memory",
          "Gemma 3 (arXiv 2503.19786), section 5.3",
          "in proportion to the keys kept", "less", ("window", "gqa"),
          "kv_bytes_per_token"),
    Claim("RMSNorm is as good as LayerNorm",
          "Zhang and Sennrich (arXiv 1910.07467)",
          "comparable on every task", "equal", ("rmsnorm", "window"),
          "eval_loss", margin=0.025, remark=_ONE_PERCENT),
    Claim("Sinks change nothing at the length of training",
          "Xiao et al. (arXiv 2309.17453), section 4.2",
          "160M: the same loss with a learnable sink", "equal",
          ("sinks", "rmsnorm"), "eval_loss", margin=0.025,
          remark=f"{_ONE_PERCENT}; there the sink is a token, and serves "
          "texts longer than the cache"),
)
