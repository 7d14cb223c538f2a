import functools

from hypothesis import given, settings, strategies as st
import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.windowed_attention import (cached_attention, decode,
                                               decode_tpu, windowed_attention)
from pallas_kernels.windowed_attention.decode_tpu import Blocks

pytestmark = pytest.mark.usefixtures("quick_compile")

# Name: sizes (B, T, S, K, G, H), options, the TPU kernel's blocks.
CASES = {
    "gpt-oss": ((3, 1, 128, 8, 8, 64), dict(window=128, sinks=True),
                Blocks(2, 128)),
    "gpt-oss, guesses": ((2, 4, 131, 8, 8, 64), dict(window=128, sinks=True),
                         Blocks(1, 131)),
    "window of one": ((2, 3, 5, 3, 2, 20), dict(window=1), None),
    "packed in lanes": ((12, 2, 40, 4, 2, 32), dict(window=31, sinks=True),
                        Blocks(12, 40, together=2)),
    "packed, in steps": ((8, 1, 100, 2, 3, 64), dict(soft_cap=3.0),
                         Blocks(4, 32)),
    "one slot": ((5, 1, 1, 2, 3, 7), dict(), Blocks(2, 1, together=1)),
    "long, in steps": ((3, 1, 203, 2, 4, 96), dict(sinks=True),
                       Blocks(2, 64)),
    "long, nothing skipped": ((2, 2, 96, 2, 1, 24), dict(soft_cap=1.5),
                              Blocks(1, 32, skip=False)),
    "Gemma": ((2, 1, 100, 2, 2, 256), dict(window=77, soft_cap=2.0),
              Blocks(2, 32)),
    "one key head": ((2, 2, 70, 1, 5, 12), dict(sinks=True, v_head_dim=9),
                     Blocks(4, 32)),
    "latents": ((2, 1, 70, 1, 6, 40), dict(latent=32), Blocks(1, 64)),
    "latents of two heads": ((2, 2, 33, 2, 3, 40), dict(latent=16), None),
}


def inputs(sizes, options, dtype=jnp.float32):
  """The arrays in order, and the sinks or None.

  Slots are filled in any order. A fifth is empty, some hold guesses that
  failed, and their values would be noticed; some queries are padding.
  """
  batch, length, slots, kv_heads, group, head_dim = sizes
  random = np.random.default_rng(slots + length)
  def normal(*shape):
    return random.normal(size=shape).astype(jnp.bfloat16).astype(dtype)
  first = random.integers(0, 2 * slots, (batch, 1))
  held = np.stack([random.permutation(np.arange(f - slots + 2, f + 2))
                   for f in first[:, 0]])
  held[random.random(held.shape) < 0.2] = -1
  held = np.maximum(held, -1)
  unseen = (held < 0) | (held >= first)
  places = first + np.arange(length)
  places[0, length // 2 + 1:] = -1
  if batch > 2:
    places[2] = -1
  v_head_dim = options.get("v_head_dim", head_dim)
  own, cached = (
      [normal(batch, n, kv_heads, dim) for dim in (head_dim, v_head_dim)]
      for n in (length, slots))
  for x in cached:
    x[unseen] = 1e4
  if "latent" in options:
    own[1] = cached[1] = None
  q = normal(batch, length, kv_heads * group, head_dim)
  sinks = normal(kv_heads * group) if options.get("sinks") else None
  return (q, *own, *cached, places.astype(np.int32),
          held.astype(np.int32)), sinks


def run(implementation, case, dtype=jnp.float32, **kwargs):
  sizes, options, blocks = CASES[case]
  arrays, sinks = inputs(sizes, options, dtype)
  if implementation == "pallas-tpu":
    kwargs = dict(blocks=blocks, interpret=True) | kwargs
  @jax.jit
  def call(arrays, sinks):
    return cached_attention(
        *arrays, window=options.get("window"), scale=0.3, sinks_N=sinks,
        soft_cap=options.get("soft_cap"), v_head_dim=options.get("latent"),
        implementation=implementation, **kwargs)
  return np.asarray(call(arrays, sinks).astype(jnp.float32))


@functools.cache
def expected(case, dtype):
  return run("reference", case, dtype)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", ["xla", "pallas-tpu"])
def test_every_implementation_is_the_reference(implementation, case):
  found = run(implementation, case)
  want = expected(case, jnp.float32)
  # Sums of float32 in another order, and base-2 exponentials.
  np.testing.assert_allclose(found, want, rtol=2e-5,
                             atol=5e-6 * np.abs(want).max())
  places = inputs(*CASES[case][:2])[0][5]
  assert not found[places < 0].any() and found[places >= 0].any(-1).all()


@pytest.mark.parametrize("case", ["gpt-oss", "Gemma", "latents"])
@pytest.mark.parametrize("implementation", ["xla", "pallas-tpu"])
def test_bfloat16_has_its_softmax_in_float32(implementation, case):
  found = run(implementation, case, jnp.bfloat16)
  want = expected(case, jnp.bfloat16)
  # Probabilities, products and results are each rounded to 8 bits.
  assert np.linalg.norm(found - want) <= 2 ** -7 * np.linalg.norm(want)


@pytest.mark.parametrize("case", ["gpt-oss, guesses", "long, in steps"])
def test_the_tpu_interpreter_finds_no_race(case, capfd):
  found = run("pallas-tpu", case,
              interpret=pltpu.InterpretParams(detect_races=True))
  want = expected(case, jnp.float32)
  np.testing.assert_allclose(found, want, rtol=2e-5,
                             atol=5e-6 * np.abs(want).max())
  # Some versions of jax print what others raise.
  assert "RACE" not in "".join(capfd.readouterr()).upper()


@functools.partial(jax.jit, static_argnums=(0, 1))
def attend(implementation, window, *arrays):
  options = dict(window=window, scale=0.5, implementation=implementation)
  if len(arrays) == 3:
    return windowed_attention(*arrays, **options)
  return cached_attention(*arrays, **options,
                          interpret=implementation == "pallas-tpu")


@given(past=st.integers(0, 13), length=st.integers(1, 3),
       window=st.sampled_from([None, 1, 4, 16]), seed=st.integers(0, 1 << 32))
@settings(max_examples=50, deadline=None)
def test_a_ring_in_any_order_gives_the_last_rows(past, length, window, seed):
  """... of windowed_attention over all, whatever else its slots hold."""
  random = np.random.default_rng(seed)
  most, slots, total = 3, 17, 16
  q, k, v = (random.normal(size=(1, total, heads, 3)).astype(np.float32)
             for heads in (4, 2, 2))
  want = attend("reference", window, q, k, v)[:, past:past + length]
  # Other slots are empty, have left the window or hold guesses that failed.
  first = 0 if window is None else max(0, past - window + 1)
  seen = np.arange(first, past)
  others = [-1, *range(first), *range(past, past + 5)]
  held = random.permutation(
      [*seen, *random.choice(others, slots - len(seen))])
  needed = np.isin(held, seen)[None, :, None, None]
  cached = [np.where(needed, x[:, np.clip(held, 0, total - 1)], 1e4).astype(
      np.float32) for x in (k, v)]
  # Of the new tokens the first are padding.
  padding = most - length
  places = np.arange(past - padding, past + length)
  own = [np.where((places >= past)[None, :, None, None], x[:, places], 1e4)
         for x in (q, k, v)]
  places = np.where(places >= past, places, -1)[None]
  for implementation in ("reference", "xla", "pallas-tpu"):
    found = attend(implementation, window, *own, *cached, places, held[None])
    np.testing.assert_allclose(found[:, padding:], want, rtol=2e-5, atol=1e-5,
                               err_msg=implementation)


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas-tpu"])
def test_over_an_empty_cache_a_query_sees_itself(implementation):
  (q, k, v, *cached, _, held), _ = inputs((2, 1, 3, 1, 2, 8), {})
  found = cached_attention(
      q, k, v, *cached, np.zeros((2, 1), int), np.full_like(held, -1),
      window=None, scale=1.0, implementation=implementation,
      interpret=implementation == "pallas-tpu")
  np.testing.assert_allclose(found, np.repeat(v, 2, 2), rtol=1e-6)


def test_a_cache_is_neither_joined_nor_moved(largest_array):
  """By xla: all that is computed is smaller than the cache."""
  (q, k, v, *cached, places, held), _ = inputs((1, 1, 4096, 2, 1, 16), {})
  size = largest_array(functools.partial(
      cached_attention, window=None, scale=1.0, implementation="xla"),
      q, k, v, *cached, places, held)
  assert size < cached[0].size


VALID = dict(zip(
    ("q_BTNH", "k_BTKH", "v_BTKH", "k_BSKH", "v_BSKH", "q_positions_BT",
     "k_positions_BS"), inputs((2, 3, 5, 2, 3, 8), {})[0]))


@pytest.mark.parametrize("change, message", [
    (dict(q_BTNH=np.ones((2, 3, 5, 8))), "5 query heads are not a multiple"),
    (dict(k_BTKH=np.ones((2, 1, 2, 8))), r"own keys \(2, 1, 2, 8\)"),
    (dict(k_BSKH=np.ones((2, 0, 2, 8))), "nothing to attend"),
    (dict(v_BSKH=np.ones((2, 4, 2, 8))), r"cached values \(2, 4, 2, 8\)"),
    (dict(v_BTKH=None), "own values None"),
    (dict(v_BTKH=None, v_BSKH=None), "v_head_dim=None: without values"),
    (dict(v_BTKH=None, v_BSKH=None, v_head_dim=9), "the keys' 8 numbers"),
    (dict(v_head_dim=8), "v_head_dim=8: expected values"),
    (dict(q_positions_BT=np.ones((2, 2), int)), r"positions int64\(2, 2\)"),
    (dict(k_positions_BS=np.ones((2, 5))), r"float64\(2, 5\): expected int"),
    (dict(window=0), "window=0: .* use None"),
    (dict(sinks_N=np.ones(5)), r"sinks \(5,\): expected one for each of 6"),
    (dict(implementation="paged"), "implementation='paged': use one of"),
    (dict(implementation="pallas-tpu", interpret=True,
          blocks=Blocks(0, 8)), "Blocks.*sequences=0"),
    (dict(implementation="pallas-tpu", interpret=True,
          blocks=Blocks(1, 3)), "slots=3: .* multiple of 32"),
    (dict(implementation="pallas-tpu", interpret=True, blocks=(1, 2)),
     r"blocks=\(1, 2\): expected .*Blocks"),
])
def test_errors_name_the_argument_and_its_values(change, message):
  with pytest.raises(ValueError, match=message):
    cached_attention(**(VALID | dict(window=4, scale=1.0) | change))


def test_what_is_not_supported_is_said():
  mixed = VALID | {name: np.asarray(VALID[name], jnp.bfloat16)
                   for name in ("k_BSKH", "v_BSKH")}
  options = dict(window=None, scale=1.0)
  message = r"\['bfloat16', 'float32'\]: cast"
  assert decode.unsupported("xla", *mixed.values(), **options) is None
  reason = decode.unsupported("pallas-tpu", *mixed.values(), **options)
  with pytest.raises(NotImplementedError, match=message):
    cached_attention(**mixed, **options, implementation="pallas-tpu")
  assert reason.startswith("['bfloat16', 'float32']")
