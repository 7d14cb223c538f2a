"""MHA, GQA, MQA or MLA?

All arms have the same number of parameters: what attention saves goes to the
feed-forward. gqa, mla_equal_cache, mha_equal_cache and mqa_equal_cache also
keep the same bytes for each token: MHA by having fewer heads, MQA by having
wider ones. mla keeps what mqa keeps. No arm has sinks or biases, which MLA
lacks, and all layers see everything.
"""
import dataclasses

from experiments import budget as solver
from experiments import design
from experiments.claims import Claim
from jaxlm.config import MLAConfig
from jaxlm.model import costs

MODEL = {
    "arms": ("mha", "gqa", "mqa", "mla", "mla_equal_cache", "mha_equal_cache",
             "mqa_equal_cache"),
    "baseline": "gqa",
    "total_params": 60e3, "num_layers": 2, "d_model": 48,
    # Of GQA; the other arms' heads follow from these.
    "num_heads": 6, "num_kv_heads": 2, "head_dim": 8,
    "vocab_size": 260, "sliding_window": 128,
    "d_ff": 120, "slack": 0.05,
}
BUDGETS = {
    "minute": {"model": {"arms": ("mha", "gqa", "mla_equal_cache")}},
    "laptop": {},
    "gpu": {"model": {
        "total_params": 4e6, "num_layers": 8, "d_model": 192, "num_heads": 6,
        "num_kv_heads": 2, "head_dim": 32, "d_ff": 560}},
}
# With gqa: held to what it keeps.
EQUAL_CACHE = ("gqa", "mla_equal_cache", "mha_equal_cache", "mqa_equal_cache")


def get_config(budget="laptop"):
  return design.make_config(MODEL, BUDGETS, budget)


def get_design(config) -> design.Design:
  model, seq_len = config.model, config.train.seq_len
  makers = _makers(config)
  if unknown := set(model.arms) - set(makers):
    raise ValueError(f"model.arms names {sorted(unknown)}: use some of "
                     f"{list(makers)}")
  arms = {name: {"make": makers[name],
                 "free": {"d_ff": design.around(model.d_ff)}}
          for name in model.arms}
  targets = solver.common_targets(
      arms, {"total_params": model.total_params}, model.slack, seq_len=seq_len)
  found = {}
  for name, arm in arms.items():
    own = dict(targets)
    if name in EQUAL_CACHE:
      own["kv_bytes_per_token"] = costs.kv_bytes_per_token(
          makers["gqa"](model.d_ff), seq_len)
    found |= solver.solve_arms({name: arm}, targets=own, seq_len=seq_len)
  return design.Design(
      "At equal parameters, and at an equal cache, which kind of attention "
      "is best?", model.baseline, found,
      {name: _describe(arm.config) for name, arm in found.items()},
      tuple(claim for claim in _claims() if set(claim.arms) <= set(found)), {
          "attention_params": "what a kind saves goes to the feed-forward",
          "kv_bytes_per_token": "MHA, GQA and MQA differ in just this"})


def _makers(config):
  """By arm, the model of a width of the feed-forward."""
  model = config.model
  heads, kv_heads, size = model.num_heads, model.num_kv_heads, model.head_dim
  def grouped(num_heads, num_kv_heads, head_dim):
    def make(d_ff):
      return design.decoder(
          config, model.num_layers, model.d_model, num_heads,
          attention={"num_kv_heads": num_kv_heads, "head_dim": head_dim,
                     "sinks": False, "biases": ()},
          layer_pattern=("full",), mlp=design.feed_forward(d_ff))
    return make
  def latent(kept):
    # As in DeepSeek-V2, half a head's width is rotary.
    attention = MLAConfig(heads, kept - size // 2, size, size // 2, size)
    dense = grouped(heads, kv_heads, size)
    return lambda d_ff: dataclasses.replace(dense(d_ff), attention=attention)
  return {
      "mha": grouped(heads, heads, size),
      "gqa": grouped(heads, kv_heads, size),
      "mqa": grouped(heads, 1, size),
      "mla": latent(2 * size),
      "mla_equal_cache": latent(2 * kv_heads * size),
      "mha_equal_cache": grouped(kv_heads, kv_heads, size),
      "mqa_equal_cache": grouped(heads // kv_heads, 1, kv_heads * size),
  }


def _describe(config):
  attention = config.attention
  heads = f"{attention.num_heads} heads"
  if isinstance(attention, MLAConfig):
    return (f"{heads}, a latent of {attention.kv_rank} and "
            f"{attention.rope_head_dim} rotary components kept")
  return (f"{heads} of {attention.head_dim}, {attention.num_kv_heads} kept")


def _claims():
  gemma = "Gemma 2 (arXiv 2408.00118), Table 8"
  gqa = "GQA (arXiv 2305.13245), Table 1"
  v2 = "DeepSeek-V2 (arXiv 2405.04434)"
  less_kept = (f"{v2}, Table 9",
               "16B of experts: MMLU 50.0 with MLA and 15.6k values kept a "
               "token, 48.7 with MHA and 110.6k")
  small = "expect little at a small size"
  return (
      Claim("GQA is as good as MHA", gemma,
            "9B, mean of 4 benchmarks: GQA 50.8, MHA 50.3", "equal",
            ("gqa", "mha"), "eval_loss", 0.02,
            "no loss was published; the margin is what a few percent more "
            "training bring at this size"),
      Claim("MQA is slightly worse than MHA", gqa,
            "T5 XXL, mean score: MQA 46.6, MHA 47.2, GQA 47.1", "greater",
            ("mqa", "mha"), "eval_loss", remark=small),
      Claim("MQA is slightly worse than GQA", gqa,
            "T5 XXL, mean score: MQA 46.6, GQA 47.1", "greater",
            ("mqa", "gqa"), "eval_loss", remark=small),
      Claim("MLA is better than GQA that keeps as much", v2,
            "as much as 2.25 groups of GQA keep, stronger than MHA", "less",
            ("mla_equal_cache", "gqa"), "eval_loss", remark=small),
      Claim("MLA is better than MHA that keeps as much", v2,
            "stronger than MHA that keeps far more", "less",
            ("mla_equal_cache", "mha_equal_cache"), "eval_loss"),
      Claim("MLA is better than MQA that keeps as much", v2,
            "stronger than MHA that keeps far more", "less", ("mla", "mqa"),
            "eval_loss", remark=small),
      Claim("MLA is better than MHA, and keeps less", *less_kept, "less",
            ("mla", "mha"), "eval_loss"),
      Claim("The fewer key/value heads, the smaller the cache", gqa,
            "one key/value head, a group's or every head's", "monotone",
            ("mha", "gqa", "mqa"), "kv_bytes_per_token",
            remark="counted, so exact"),
      Claim("MLA keeps less than MHA", *less_kept, "less", ("mla", "mha"),
            "kv_bytes_per_token", remark="counted, so exact"),
  )
