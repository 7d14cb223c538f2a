"""What can be measured of an arm, and published claims about it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Metric:
  """How a measured quantity is compared.

  source: "seeds" has one value a seed, compared in pairs; "repeats" has
    repeated timings of one process, compared as independent samples; "exact"
    is counted, not sampled, and compared directly.
  ratio: two arms are compared by a / b instead of a - b.
  """
  label: str
  unit: str
  lower_is_better: bool
  source: str
  ratio: bool


METRICS = {
    "eval_loss": Metric("held-out loss", "nats/token", True, "seeds", False),
    "bits_per_byte": Metric("bits per byte", "bits/byte", True, "seeds", False),
    "max_vio": Metric("MaxVio", "", True, "seeds", False),
    "late_loss": Metric("loss of the last quarter of a sequence", "nats/token",
                        True, "seeds", False),
    "long_loss": Metric("loss past the training length", "nats/token", True,
                        "seeds", False),
    "first_token_mass": Metric("attention on the first token", "", True,
                               "seeds", False),
    "sink_mass": Metric("attention on the sink", "", True, "seeds", False),
    "tokens_per_second": Metric(
        "training speed", "tokens/s", False, "seeds", True),
    "prefill_tokens_per_second": Metric(
        "prefill speed", "tokens/s", False, "repeats", True),
    "decode_tokens_per_second": Metric(
        "decode speed", "tokens/s", False, "repeats", True),
    "peak_memory_bytes": Metric("peak memory", "bytes", True, "exact", True),
    "kv_bytes_per_token": Metric(
        "KV bytes per token", "bytes", True, "exact", True),
}
KINDS = ("less", "greater", "equal", "monotone")


@dataclasses.dataclass(frozen=True)
class Claim:
  """A published claim in a form that these arms can test.

  kind:
    "less", "greater": metric(arms[0]) is less (greater) than metric(arms[1]).
    "equal": the two differ by less than `margin`, in the metric's unit, or as
      a fraction for speeds and bytes (0.05 is 5 %).
    "monotone": every arm of the list, two or more, is better than the one
      before it: lower losses, MaxVio and bytes, higher speeds.
  text: the claim in one sentence; source: where it was published;
  published: the published numbers; remark: what to expect at a small size.
  """
  text: str
  source: str
  published: str
  kind: str
  arms: tuple[str, ...]
  metric: str
  margin: float | None = None
  remark: str = ""

  def __post_init__(self):
    object.__setattr__(self, "arms", tuple(self.arms))
    if self.kind not in KINDS:
      raise ValueError(f"claim kind={self.kind!r} is not one of {KINDS}")
    if self.metric not in METRICS:
      raise ValueError(
          f"claim metric={self.metric!r} is not one of {tuple(METRICS)}")
    count = len(self.arms)
    if count < 2 or (count > 2 and self.kind != "monotone"):
      raise ValueError(
          f"a claim of kind {self.kind!r} needs "
          f"{'two or more' if self.kind == 'monotone' else 'two'} arms, "
          f"got arms={self.arms}")
    if len(set(self.arms)) != count:
      raise ValueError(f"claim arms={self.arms} names an arm twice")
    if (self.kind == "equal") != (self.margin is not None):
      raise ValueError(
          f"claim kind={self.kind!r} with margin={self.margin}: a margin goes "
          "with kind 'equal' and with no other")
    if self.margin is not None and not self.margin > 0:
      raise ValueError(f"claim margin={self.margin} must be above zero")
