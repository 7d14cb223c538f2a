"""Which way of bringing tokens to their experts should be quickest.

What counts is the time in which T tokens a device, A copies of each, pass the
busiest link. A torus of N devices with d sides, the longest of them s: to
gather all tokens everywhere takes (N - 1) T / 2d, for all links of a device
bring something new all the time; an all-to-all takes A T s / 8, for a copy
goes s / 4 steps along that side, which has two links. On a ring of any size
that is A / 4 of gathering, on 4 x 4 A / 8, on 4 x 4 x 4 A / 21. A switch (or
one memory) takes (N - 1) T and A T (N - 1) / N. Handing results back takes as
long again, and so do gradients.
"""
import math

SCHEMES = ("gather", "all_to_all", "ragged_all_to_all", "capacity")
# Room in blocks that all have one size, in equal shares.
SHARES = 1.25
# Of rows a device so few are gathered: it is steps that count, not bytes.
FEW_ROWS = 64
# Gathering must be so much quicker: it takes more memory, and adds rows up.
GATHER = 0.75

# Sides of the tori in which neighbours on a mesh's axis are thought to lie.
_SIDES = {"v4": (4, 4), "v5p": (4, 4), "7x": (4, 4), "v5e": (16,), "v6e": (16,)}


def torus(shards: int, generation: str) -> tuple[int, ...]:
  """Of so many neighbours on a large slice: sides of 4 along three axes, or
  of 16 along two."""
  sides, rest = [], shards
  for most in _SIDES[generation]:
    sides.append(math.gcd(rest, most))
    rest //= sides[-1]
  return tuple(side for side in (*sides, rest) if side > 1) or (1,)


def costs(shards: int, per_token: int,
          sides: tuple[int, ...] | None = None) -> dict[str, float]:
  """Time of each scheme that drops nothing, in tokens a device passing a
  link. sides: of a torus; None for a switch."""
  if sides is None:
    gather, exchange = shards - 1, per_token * (shards - 1) / shards
  else:
    gather = (shards - 1) / (2 * len(sides))
    exchange = per_token * max(sides) / 8
  return {"gather": gather, "ragged_all_to_all": exchange,
          "all_to_all": SHARES * exchange}


def choose_scheme(num_tokens: int, per_token: int, shards: int, *,
                  platform: str, sides: tuple[int, ...] | None = None,
                  generation: str | None = None) -> str:
  """The scheme for `num_tokens` tokens a device, with experts on `shards`
  devices.

  Args:
    platform: "tpu", "gpu" or "cpu", which has no ragged exchange.
    sides: of the torus of these devices; by default as `torus` guesses for
      the TPU's generation (v5p without), and a switch on other platforms.
  """
  if shards == 1 or num_tokens * per_token <= FEW_ROWS:
    return "gather"
  if sides is None and platform == "tpu":
    sides = torus(shards, generation or "v5p")
  cost = costs(shards, per_token, sides)
  exchange = "all_to_all" if platform == "cpu" else "ragged_all_to_all"
  return ("gather" if cost["gather"] < GATHER * cost[exchange] else exchange)
