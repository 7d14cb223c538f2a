"""What do narrow numbers cost?

One mixture of experts, trained and evaluated in float32, in bfloat16, with its
experts in MXFP4 (4.25 bits a weight) after training or already while training,
and with matmuls as if in FP8. d_model and d_expert are whole blocks of 32.
"""
from experiments import budget as solver
from experiments import design
from experiments.claims import Claim

# By arm what of the config's train section is otherwise.
TRAIN = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "mxfp4_after": {"eval_simulate": "mxfp4_experts"},
    "mxfp4_aware": {"simulate": "mxfp4_experts"},
    "fp8": {"simulate": "fp8"},
}
DESCRIPTIONS = {
    "float32": "all in float32",
    "bfloat16": "activations in bfloat16, parameters and optimizer in float32",
    "mxfp4_after": "trained in float32; evaluated with experts rounded to "
    "MXFP4",
    "mxfp4_aware": "experts rounded to MXFP4 in training too, the gradient "
    "passed straight through",
    "fp8": "matmuls of inputs rounded to FP8, otherwise float32",
}
MODEL = {
    "arms": tuple(TRAIN), "num_layers": 2, "vocab_size": 260, "d_model": 64,
    "num_heads": 4, "head_dim": 16, "num_kv_heads": 1, "sliding_window": 128,
    "num_experts": 8, "experts_per_token": 2, "d_expert": 64,
}
BUDGETS = {
    "minute": {"model": {"arms": ("float32", "mxfp4_after", "fp8"),
                         "num_experts": 4}},
    "laptop": {},
    "gpu": {"train": {"dtype": "float32"}, "model": {
        "num_layers": 8, "d_model": 224, "num_heads": 8, "head_dim": 32,
        "num_kv_heads": 2, "num_experts": 32, "experts_per_token": 4,
        "d_expert": 96}},
}
# MXFP4 shares a scale among so many weights.
BLOCK = 32


def get_config(budget="laptop"):
  return design.make_config(MODEL, BUDGETS, budget)


def get_design(config) -> design.Design:
  model = config.model
  if unknown := set(model.arms) - set(TRAIN):
    raise ValueError(f"model.arms names {sorted(unknown)}: use some of "
                     f"{tuple(TRAIN)}")
  for name in ("d_model", "d_expert"):
    if model[name] % BLOCK:
      raise ValueError(f"model.{name}={model[name]}: MXFP4 needs a multiple "
                       f"of {BLOCK}")
  shared = solver.fixed(design.decoder(
      config, model.num_layers, model.d_model, model.num_heads,
      moe=design.experts(model.num_experts, model.experts_per_token,
                         model.d_expert)), config.train.seq_len)
  return design.Design(
      "What do bfloat16, FP8 and experts in MXFP4 cost in held-out loss, and "
      "does training with MXFP4 make up for it?",
      model.arms[0], dict.fromkeys(model.arms, shared),
      {name: DESCRIPTIONS[name] for name in model.arms},
      tuple(claim for claim in CLAIMS if set(claim.arms) <= set(model.arms)),
      overrides={name: {"train": TRAIN[name]} for name in model.arms
                 if TRAIN[name]})


_LOSS = "of a loss of 2.1, as other experiments of this size have"
CLAIMS = (
    Claim("Training in FP8 changes the loss by less than 0.25 %",
          "DeepSeek-V3 (arXiv 2412.19437), section 3.3",
          "relative error below 0.25 %, against BF16", "equal",
          ("fp8", "float32"), "eval_loss", margin=0.00525,
          remark=f"the margin is 0.25 % {_LOSS}; simulated on the CPU"),
    Claim("bfloat16 trains as well as float32",
          "Kalamkar et al. (arXiv 1905.12322)",
          "the same results in the same number of steps", "equal",
          ("bfloat16", "float32"), "eval_loss", margin=0.00525,
          remark="no number says the same: the margin is that of FP8"),
    Claim("Experts in MXFP4 after training cost little",
          "gpt-oss model card (arXiv 2508.10925), section 2.1",
          "no number; the weights are published so", "equal",
          ("mxfp4_after", "float32"), "eval_loss", margin=0.021,
          remark=f"the margin is 1 % {_LOSS}; gpt-oss was also trained "
          "further in the format"),
    Claim("Training with MXFP4 weights costs little",
          "Rouhani et al. (arXiv 2310.10537), section 6",
          "little loss in quality from 20M to 1.5B parameters", "equal",
          ("mxfp4_aware", "float32"), "eval_loss", margin=0.021,
          remark=f"the margin is 1 % {_LOSS}; there activations and "
          "gradients are narrow too"),
    Claim("Training with MXFP4 makes up for some of its cost",
          "LLM-QAT (arXiv 2305.17888)",
          "4-bit weights: better than quantized after training", "less",
          ("mxfp4_aware", "mxfp4_after"), "eval_loss"),
)
