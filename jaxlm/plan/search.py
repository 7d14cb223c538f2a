"""Layouts of a model on a slice that make sense, the best first."""
import dataclasses
import math
from collections.abc import Iterator

from jaxlm.config import MLAConfig, ModelConfig
from jaxlm.plan.devices import GIB, Slice
from jaxlm.plan.job import make_job
from jaxlm.plan.plan import Plan, by_estimate

# More of the sequence is split from this length on.
LONG = 32768


@dataclasses.dataclass(frozen=True)
class Search:
  """plans: those that fit, the best first. refused: why the others do not,
  each reason with its layouts."""
  plans: list[Plan]
  refused: dict[str, list[str]]


def search(model: str, config: ModelConfig, task: str, slice_: Slice,
           batch=None, seq=None, weights=None) -> Search:
  """Ranks layouts by their estimated time without overlap.

  Raises:
    ValueError: the arguments cannot be right with any layout.
  """
  plans, refused = [], {}
  for sizes in layouts(config, slice_.size, seq):
    name = ",".join(f"{k}={v}" for k, v in sizes.items() if v > 1) or (
        "one device")
    try:
      found = by_estimate(make_job(model, config, task, slice_, sizes, batch,
                                   seq, weights))
    except ValueError as error:
      refused.setdefault(str(error), []).append(name)
      continue
    if found.fits:
      plans.append(found)
    else:
      refused.setdefault(
          f"needs more than {found.hbm / GIB:.2f} GiB", []).append(
              f"{name} ({found.total / GIB:.1f})")
  return Search(sorted(plans, key=lambda plan: plan.bounds["alone"]
                       / plan.tokens), refused)


def layouts(config: ModelConfig, num_devices: int,
            seq: int | None = None) -> Iterator[dict[str, int]]:
  """Sizes of data, context, expert and tensor that divide what they split."""
  a = config.attention
  heads = math.gcd(a.num_heads, a.num_heads if isinstance(a, MLAConfig)
                   else a.num_kv_heads)
  experts = config.moe.num_experts if config.moe else 1
  contexts = divisors(num_devices) if seq and seq >= LONG else [1]
  for tensor in divisors(math.gcd(num_devices, heads)):
    for expert in divisors(math.gcd(num_devices // tensor, experts)):
      for context in contexts:
        data, rest = divmod(num_devices, tensor * expert * context)
        if not rest:
          yield {"data": data, "context": context, "expert": expert,
                 "tensor": tensor}


def divisors(n: int) -> list[int]:
  return [i for i in range(1, n + 1) if n % i == 0]
