"""How many layers need to see everything, and how far must the others see?

All arms have the same parameters. In an arm NtoM, of N + M layers N see a
window and M everything; in window_W every other layer sees W tokens; in "full"
all layers see everything.
"""
from experiments import design
from experiments.claims import Claim

MODEL = {
    "arms": ("full", "1to1", "3to1", "5to1", "window_16", "window_64",
             "window_512"),
    "baseline": "full",
    "total_params": 70e3, "num_layers": 12, "d_model": 24, "num_heads": 1,
    "vocab_size": 260, "head_dim": 16, "num_kv_heads": 1,
    # Of arms that do not name their own.
    "sliding_window": 128,
    "d_ff": 48, "slack": 0.05,
}
BUDGETS = {
    "minute": {
        "model": {"arms": ("full", "1to1", "window_16")},
        "train": {"seq_len": 512, "batch_size": 2}},
    "laptop": {
        "train": {"seq_len": 1024, "batch_size": 1, "eval_batches": 24,
                  "steps": 200, "eval_every": 50, "checkpoint_every": 100},
        # So narrow and deep that 4e-3 made a run diverge.
        "learning_rate": {"base": 2e-3},
        "speed": {"prompt_tokens": 960}},
    "gpu": {
        "model": {
            "arms": ("full", "1to1", "3to1", "5to1", "window_16", "window_64",
                     "window_256", "window_512"),
            "total_params": 4e6, "d_model": 160, "num_heads": 6,
            "head_dim": 32, "num_kv_heads": 2, "d_ff": 480},
        # Half as many steps: long contexts cost twice as much a token.
        "train": {"seq_len": 4096, "batch_size": 4, "steps": 500,
                  "eval_every": 125},
        "speed": {"prompt_tokens": 4032}},
}


def get_config(budget="laptop"):
  return design.make_config(MODEL, BUDGETS, budget)


def get_design(config) -> design.Design:
  model = config.model
  kinds = {arm: _parse(arm, model.sliding_window) for arm in model.arms}
  solutions = design.solve(
      config, {arm: _arm(config, *kind) for arm, kind in kinds.items()},
      total_params=model.total_params)
  return design.Design(
      "How few layers may see the whole context, and how little may the "
      "others see, before it costs loss?", model.baseline, solutions,
      {arm: _describe(found.config) for arm, found in solutions.items()},
      _claims(kinds), {
          "flops_per_token": "layers with a window have fewer scores to "
          "compute: that is what they are for",
          "kv_bytes_per_token": "a layer with a window keeps no more than "
          "its window"},
      measurements=("by_position",))


def _parse(name, default):
  """3to1: (("sliding",) * 3 + ("full",), default)."""
  if name == "full":
    return ("full",), default
  kind, _, window = name.partition("_")
  if kind == "window" and window.isdecimal():
    return ("sliding", "full"), int(window)
  some, to, others = name.partition("to")
  if not to or not some.isdecimal() or not others.isdecimal():
    raise ValueError(f"model.arms names {name!r}: use 'full' or names such as "
                     "'3to1' or 'window_64'")
  return ("sliding",) * int(some) + ("full",) * int(others), default


def _arm(config, pattern, window):
  model = config.model
  def make(d_ff):
    return design.decoder(
        config, model.num_layers, model.d_model, model.num_heads,
        attention={"sliding_window": window}, layer_pattern=pattern,
        mlp=design.feed_forward(d_ff))
  return {"make": make, "free": {"d_ff": design.around(model.d_ff)}}


def _describe(config):
  layers = [kind.attention for kind in config.layers]
  sliding = layers.count("sliding")
  if not sliding:
    return f"all {len(layers)} layers see everything"
  return (f"{sliding} of {len(layers)} layers see "
          f"{config.attention.sliding_window} tokens")


def _claims(kinds):
  """Ratios against "full", windows against the widest."""
  ratios = sorted((arm for arm in kinds if "to" in arm),
                  key=lambda arm: kinds[arm][0].count("sliding")
                  / len(kinds[arm][0]))
  windows = sorted((arm for arm in kinds if arm.startswith("window_")),
                   key=lambda arm: -kinds[arm][1])
  gemma = "Gemma 3 (arXiv 2503.19786)"
  margin = ("0.1 of a perplexity near 10 is 0.01 nats; twice that is allowed, "
            "as small models' seeds differ more. A model that has seen so "
            "little hardly uses distant tokens: weak evidence")
  claims = [
      Claim(f"Layers that see everything may be few: {arm} is as good as full",
            f"{gemma}, Fig. 3", "1:1 to 7:1: perplexity within 0.1", "equal",
            (arm, "full"), "eval_loss", 0.02, margin)
      for arm in ratios if "full" in kinds]
  claims += [
      Claim(f"The window hardly matters: {arm} is as good as {windows[0]}",
            f"{gemma}, Fig. 4", "512 to 4096 tokens: perplexity within 0.02",
            "equal", (arm, windows[0]), "eval_loss", 0.02,
            "as a share of the context Gemma's windows are wider, and its "
            f"margin is a tenth of this one; {margin}")
      for arm in windows[1:]]
  for arms, what in ((("full", *ratios), "more layers have a window"),
                     (windows, "narrower the window")):
    if len(arms) > 1 and set(arms) <= set(kinds):
      claims.append(Claim(
          f"The {what}, the smaller the cache", f"{gemma}, Fig. 5",
          "32k tokens, 2B: cache over weights 60 % if all layers are full, "
          "under 15 % at 3:1 and 1024", "monotone", arms,
          "kv_bytes_per_token", remark="counted, so exact"))
  return tuple(claims)
