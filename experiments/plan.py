"""From a config and its design to what is trained and what is reported."""
import dataclasses
import hashlib
import json

from flax import traverse_util

from experiments import budget
from experiments import environment
from experiments.design import Design
from experiments.results import Ablation, Arm
from jaxlm.config import ModelConfig
from jaxlm.config_dict import to_dict
from jaxlm.data import DataBundle
from jaxlm.model import costs
from jaxlm.model.transformer import Execution
from jaxlm.train import Balancing, OptimizerConfig, TrainConfig


def check(config) -> None:
  """Refuses what no arm could run with.

  Raises:
    ValueError: naming the entry of the config and the remedy.
  """
  rates = config.learning_rate
  if rates.method not in ("rule", "grid"):
    raise ValueError(f"learning_rate.method={rates.method!r}: use 'rule' or "
                     "'grid'")
  if rates.method == "grid":
    if not rates.grid or min(rates.grid) <= 0:
      raise ValueError(f"learning_rate.grid={rates.grid}: give positive rates")
    if rates.seed in config.seeds:
      raise ValueError(f"learning_rate.seed={rates.seed} is one of seeds="
                       f"{config.seeds}: tune with a seed that is not reported")
  elif not (rates.base > 0 and rates.reference_d_model > 0):
    raise ValueError(
        f"learning_rate.base={rates.base} and learning_rate.reference_d_model="
        f"{rates.reference_d_model}: must be positive")
  if config.data.train_tokens < 0:
    raise ValueError(f"data.train_tokens={config.data.train_tokens}: must not "
                     "be negative")
  for name, value in config.speed.items():
    if not value > 0:
      raise ValueError(f"speed.{name}={value}: must be positive")


def arm_configs(config, design: Design) -> dict:
  """By arm the config with what is otherwise for it.

  Raises:
    ValueError: an arm's overrides name what the config has not.
  """
  configs = {}
  for arm in design.models:
    configs[arm] = own = config.copy_and_resolve_references()
    changes = design.overrides.get(arm, {})
    if unknown := set(changes) - set(ARMS_OWN):
      raise ValueError(f"overrides of arm {arm!r} change {sorted(unknown)}: "
                       f"arms may differ in {ARMS_OWN}")
    try:
      own.update(changes)
    except (KeyError, TypeError) as error:
      raise ValueError(f"overrides of arm {arm!r}: {error}") from error
  return configs


# Sections of the config in which arms may differ.
ARMS_OWN = ("data", "train", "optimizer", "balancing")


def train_config(config, model: ModelConfig, learning_rate: float,
                 steps: int | None = None) -> TrainConfig:
  """How an arm is trained, by its own config."""
  train = config.train.to_dict()
  execution = Execution(**{
      name: train.pop(name)
      for name in ("dtype", "remat", "scan_layers", "simulate")})
  train["steps"] = steps or train["steps"]
  return TrainConfig(
      **train, execution=execution,
      optimizer=OptimizerConfig(learning_rate=learning_rate,
                                **config.optimizer),
      balancing=Balancing(**config.balancing) if model.moe else Balancing())


def rule(configs: dict, models: dict[str, ModelConfig]) -> dict[str, float]:
  """Each arm's learning rate by `learning_rate.method` "rule"."""
  return {arm: _rule(configs[arm].learning_rate, model.d_model)
          for arm, model in models.items()}


def _rule(rates, d_model: int) -> float:
  return rates.base * (rates.reference_d_model / d_model) ** rates.exponent


def explain_rates(config, rates: dict[str, float]) -> str:
  """How the learning rates were chosen, for the report."""
  chosen = config.learning_rate
  if chosen.method == "rule":
    return (f"Scaled by one rule for all arms: {chosen.base:g} \u00d7 "
            f"({chosen.reference_d_model} / d_model)^{chosen.exponent:g}.")
  grid = ", ".join(f"{rate:g}" for rate in sorted(chosen.grid))
  text = (f"Tuned for each arm on the same grid ({grid}): the lowest held-out "
          f"loss after {chosen.steps} steps with seed {chosen.seed}, which is "
          "not reported.")
  edge = [arm for arm, rate in rates.items()
          if rate in (min(chosen.grid), max(chosen.grid))]
  if edge:
    text += (f" At an end of the grid, so perhaps not the best: "
             f"{', '.join(edge)}.")
  return text


def describe_data(data: dict[str, DataBundle]) -> str:
  """Of each arm's; once, where all have the same."""
  by_text = {}
  for arm, bundle in data.items():
    by_text.setdefault(_describe_data(bundle), []).append(arm)
  if len(by_text) == 1:
    return next(iter(by_text))
  return " ".join(f"{', '.join(arms)}: {text}"
                  for text, arms in by_text.items())


def _describe_data(data: DataBundle) -> str:
  about = data.description
  train, heldout = about["train"], about["heldout"]
  return (
      f"{about['source']} (content {about['content_hash']}), tokenizer "
      f"{about['tokenizer']}. {train['bytes']:,} bytes in {train['files']:,} "
      f"files to train on"
      + (f", of which {len(data.train.stream):,} tokens are used"
         if len(data.train.stream) < train["tokens"] else "")
      + f"; {heldout['bytes']:,} bytes in {heldout['files']:,} other files "
      "held out."
      + (" Every row begins with an end-of-document."
         if about.get("first_token") else ""))


def ablation(config, design: Design, name: str, rates: dict[str, float],
             data: str, command: str) -> Ablation:
  """The plan as the report reads it."""
  held_equal, not_held = budget.held(design.solutions, notes=design.notes)
  train = config.train
  shown = {
      "steps": train.steps, "batch_size": train.batch_size,
      "seq_len": train.seq_len,
      "tokens": train.steps * train.batch_size * train.seq_len,
      "optimizer": config.optimizer.name,
      "schedule": config.optimizer.schedule,
      "warmup_steps": config.optimizer.warmup_steps,
      "weight_decay": config.optimizer.weight_decay, "dtype": train.dtype,
      "seeds together": "yes" if config.together else "no"}
  shown |= {f"{loss} loss": weight for loss, weight in config.balancing.items()
            if weight and loss not in ("bias_rule", "bias_rate")}
  identities = arm_identities(config, design)
  return Ablation(
      name=name, question=design.question, budget=config.budget,
      seeds=config.seeds, baseline=design.baseline,
      arms=[Arm(arm, design.descriptions[arm],
                quantities(found.config, train.seq_len), rates[arm],
                identities[arm])
            for arm, found in design.solutions.items()],
      held_equal=held_equal, not_held=not_held,
      learning_rate_rule=explain_rates(config, rates), data=data, train=shown,
      claims=design.claims, versions=environment.versions(),
      hardware=environment.hardware(), command=command, trend=design.trend)


def quantities(model: ModelConfig, seq_len: int) -> dict[str, float]:
  """What describes an arm, in the order in which the report shows it."""
  found = budget.measure(model, seq_len, "total_params", "active_params",
                         "flops_per_token")
  found |= {"num_layers": model.num_layers, "d_model": model.d_model,
            "num_heads": model.attention.num_heads,
            "head_dim": model.attention.head_dim}
  if model.mlp:
    found["d_ff"] = model.mlp.d_ff
  if model.moe:
    found |= {"num_experts": model.moe.num_experts,
              "experts_per_token": model.moe.experts_per_token,
              "d_expert": model.moe.expert.d_ff}
    if model.moe.shared:
      found["shared_d_ff"] = model.moe.shared.d_ff
  return found


def run_flops(config, model: ModelConfig, steps: int, seeds: int = 1) -> float:
  train = config.train
  return (steps * seeds * train.batch_size * train.seq_len
          * costs.flops_per_token(model, train.seq_len).total)


def identity(config, design: Design) -> dict:
  """Everything that decides the results, JSON-able and flat."""
  return traverse_util.flatten_dict(json.loads(json.dumps({
      "config": config.to_dict(),
      "arms": {arm: to_dict(model) for arm, model in design.models.items()},
      "overrides": design.overrides,
      "measurements": design.measurements,
      "claims": [dataclasses.asdict(claim) for claim in design.claims],
  })), sep=".")


def arm_identities(config, design: Design) -> dict[str, str]:
  """By arm a hash of all that decides its results but the seed and the code.

  A row of results whose arm has another one today is stale.
  """
  configs, hashes = arm_configs(config, design), {}
  for arm, model in design.models.items():
    own = configs[arm].to_dict()
    decisive = json.dumps(
        [to_dict(model), own["data"], own["train"], own["optimizer"],
         own["balancing"] if model.moe else None, own["learning_rate"],
         design.measurements], sort_keys=True)
    hashes[arm] = hashlib.sha256(decisive.encode()).hexdigest()[:16]
  return hashes


def differences(before: dict, now: dict) -> list[str]:
  """What differs between two identities, the config's own entries first."""
  def shown(values, name):
    return repr(values[name]) if name in values else "absent"
  names = [name for name in {**before, **now}
           if before.get(name) != now.get(name)]
  own = [name for name in names if name.startswith("config.")]
  return [f"{name} was {shown(before, name)}, is {shown(now, name)}"
          for name in own or names]
