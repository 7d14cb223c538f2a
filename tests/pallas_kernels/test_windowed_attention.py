import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.windowed_attention import windowed_attention

pytestmark = pytest.mark.usefixtures("quick_compile")

# Name: sizes (B, T, S, K, G, H), then options. S is T unless q_offset shifts
# the queries.
CASES = {
    "short full": ((2, 5, 5, 1, 3, 4), dict()),
    "one token": ((3, 1, 1, 2, 1, 5), dict(window=1, sinks=True)),
    "odd full, spans": ((1, 1091, 1091, 1, 2, 3), dict(sinks=True)),
    "odd window and length": ((2, 333, 333, 2, 1, 7), dict(window=37)),
    "window of one": ((1, 70, 70, 3, 2, 5), dict(window=1)),
    "window past the end": ((1, 150, 150, 1, 2, 6),
                            dict(window=151, sinks=True)),
    "gpt-oss": ((1, 389, 389, 1, 8, 64), dict(window=128, sinks=True)),
    "four to one, capped": ((2, 267, 267, 1, 4, 5),
                            dict(window=129, soft_cap=1.5, sinks=True)),
    "full, capped, segments": ((2, 269, 269, 3, 1, 4),
                               dict(soft_cap=1.5, segments=True)),
    "window, segments": ((2, 301, 301, 2, 2, 5),
                         dict(window=130, segments=True, sinks=True)),
    "offset window": ((1, 131, 211, 2, 1, 3), dict(window=50, q_offset=73)),
    "offset full": ((1, 131, 311, 1, 2, 3),
                    dict(q_offset=180, segments=True, sinks=True)),
    "window past a chunk": ((1, 700, 700, 1, 1, 3), dict(window=300)),
    "narrow values": ((2, 271, 271, 3, 2, 7), dict(v_head_dim=5, sinks=True)),
    "wide values": ((1, 269, 269, 2, 1, 4),
                    dict(v_head_dim=9, window=37, segments=True)),
}


def inputs(sizes, options, dtype=jnp.float32):
  """((q, k, v, sinks or None, segments or None), cotangent)."""
  batch, t, s, kv_heads, group, head_dim = sizes
  random = np.random.default_rng(t + s)
  def normal(*shape):
    return random.normal(size=shape).astype(jnp.bfloat16).astype(dtype)
  heads = kv_heads * group
  v_head_dim = options.get("v_head_dim", head_dim)
  q, do = (normal(batch, t, heads, dim) for dim in (head_dim, v_head_dim))
  k, v = (normal(batch, s, kv_heads, dim) for dim in (head_dim, v_head_dim))
  sinks = normal(heads) if options.get("sinks") else None
  segments = None
  if options.get("segments"):
    # Runs of uneven length; id 1 belongs to nobody and -7 is no count.
    segments = np.sort(random.choice([-7, 0, 2, 3, 900], (batch, s)), axis=1)
    segments = segments.astype(np.int32)
  return (q, k, v, sinks, segments), do


@functools.partial(jax.jit, static_argnums=(0, 1))
def results(implementation, options, q, k, v, sinks, segments, do):
  """The output and the gradients, by name."""
  options = dict(options)
  window = options.pop("window", None)
  for given_as_arrays in ("sinks", "segments", "v_head_dim"):
    options.pop(given_as_arrays, None)
  def function(q, k, v, sinks):
    return windowed_attention(
        q, k, v, window=window, scale=0.6,
        sinks_N=sinks, segment_ids=segments,
        implementation=implementation, **options)
  o, vjp = jax.vjp(function, q, k, v, sinks)
  return dict(o=o, **dict(zip(("dq", "dk", "dv", "dsinks"), vjp(do))))


def run(implementation, case, dtype=jnp.float32):
  sizes, options = CASES[case]
  args, do = inputs(sizes, options, dtype)
  return results(implementation, tuple(sorted(options.items())), *args, do)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_references(case):
  # Sums of float32 in another order: a few units in the last place of the
  # largest value.
  found, expected = run("xla", case), run("reference", case)
  for name, b in expected.items():
    if b is not None:
      np.testing.assert_allclose(found[name], b, rtol=2e-5, err_msg=name,
                                 atol=2e-6 * max(1, np.max(np.abs(b))))


@pytest.mark.parametrize("case", ["gpt-oss", "full, capped, segments"])
def test_bfloat16_has_its_softmax_in_float32(case):
  found, expected = run("xla", case, jnp.bfloat16), run("reference", case)
  for name, b in expected.items():
    if b is not None:
      # Probabilities, products and results are each rounded to 8 bits.
      a = np.asarray(found[name], np.float32)
      assert found[name].dtype == jnp.bfloat16, name
      assert np.linalg.norm(a - b) <= 2 ** -7 * np.linalg.norm(b), name


def by_the_definition(q, k, v, window, scale, sinks, soft_cap, segments):
  """One head, one query at a time, in float64."""
  rows = []
  for t in range(len(q)):
    seen = [s for s in range(t + 1) if t - s < window
            and segments[s] == segments[t]]
    scores = np.array([scale * q[t] @ k[s] for s in seen])
    scores = soft_cap * np.tanh(scores / soft_cap)
    weights = np.exp(scores)
    rows.append(weights @ v[seen] / (weights.sum() + np.exp(sinks)))
  return np.array(rows)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_the_definition(implementation):
  (q, k, v, sinks, segments), _ = inputs(
      (1, 83, 83, 1, 2, 5), dict(sinks=True, segments=True, v_head_dim=3))
  found = windowed_attention(
      q, k, v, window=11, scale=0.7, sinks_N=sinks, soft_cap=2.0,
      segment_ids=segments, implementation=implementation)
  for n in range(2):
    expected = by_the_definition(
        *(x[0, :, i].astype(np.float64) for x, i in ((q, n), (k, 0), (v, 0))),
        11, 0.7, float(sinks[n]), 2.0, segments[0])
    np.testing.assert_allclose(found[0, :, n], expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("window", [1, 2, 64, 128, 129, None])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_query_sees_its_last_keys_and_itself(window, implementation):
  # With one-hot values the output is the attention weights themselves.
  length = 300
  q = k = np.zeros((1, length, 1, length), np.float32)
  weights = windowed_attention(
      q, k, np.eye(length, dtype=np.float32)[None, :, None], window=window,
      scale=1.0, implementation=implementation)[0, :, 0]
  distance = np.subtract.outer(np.arange(length), np.arange(length))
  reach = length if window is None else window
  seen = (0 <= distance) & (distance < reach)
  np.testing.assert_allclose(weights, seen / seen.sum(1, keepdims=True),
                             rtol=1e-6)
  assert np.array_equal(weights > 0, seen)


@pytest.mark.parametrize("window", [128, None])
def test_the_gradient_reaches_what_the_query_sees(window):
  length, query = 300, 290
  (q, k, v, *_), _ = inputs((1, length, length, 1, 1, 5), {})
  def one_query(k, v):
    return jnp.sum(windowed_attention(q, k, v, window=window,
                                      scale=1.0)[0, query])
  for gradient in jax.jit(jax.grad(one_query, (0, 1)))(k, v):
    reached = np.flatnonzero(np.any(gradient[0, :, 0] != 0, axis=-1))
    first = 0 if window is None else query - 127
    np.testing.assert_array_equal(reached, np.arange(first, query + 1))


def band(window, length, head_dim=2):
  """A loss whose gradient takes the whole work of a layer, and its inputs."""
  q = np.ones((1, length, 1, head_dim), np.float32)
  def loss(q, k, v):
    return jnp.sum(windowed_attention(q, k, v, window=window, scale=1.0) ** 2)
  return jax.value_and_grad(loss, (0, 1, 2)), q, q, q


def test_twice_the_tokens_are_twice_the_work_in_a_window(executed_flops):
  at = {(window, length): executed_flops(*band(window, length))
        for window in (128, None) for length in (2048, 4096)}
  assert at[128, 4096] <= 2.05 * at[128, 2048]
  # Two matmuls forward and five backward over a window and a chunk of keys.
  assert at[128, 4096] <= 7 * 2 * 4096 * 2 * (128 + 128)
  # The count does see quadratic work, of which causality needs half.
  full = 7 * 2 * 4096 ** 2 * 2
  assert at[None, 4096] >= 3.9 * at[None, 2048]
  assert full / 2 <= at[None, 4096] <= 0.6 * full


@pytest.mark.parametrize("window", [128, 1000, None])
def test_no_array_holds_all_scores(window, largest_array):
  length = 2048
  assert largest_array(*band(window, length)) < length ** 2 / 4


def test_the_largest_array_is_seen_in_the_reference(largest_array):
  q = np.ones((1, 64, 1, 2), np.float32)
  assert largest_array(functools.partial(
      windowed_attention, window=5, scale=1.0, implementation="reference"),
                       q, q, q) == 64 ** 2


Q, K = np.ones((1, 5, 6, 4), np.float32), np.ones((1, 7, 2, 4), np.float32)


@pytest.mark.parametrize("change, message", [
    (dict(q_BTNH=Q[0]), r"q \(5, 6, 4\).*expected \[B, T, N, H\]"),
    (dict(v_BSKH=K[:, 1:]), r"v \(1, 6, 2, 4\)"),
    (dict(v_BSKH=K[..., 0]), r"v \(1, 7, 2\): expected"),
    (dict(v_BSKH=K[..., :0]), r"v \(1, 7, 2, 0\): nothing to attend"),
    (dict(q_BTNH=Q[..., :3]), "differ in batch or head_dim"),
    (dict(q_BTNH=Q[:, :, :5]), "5 query heads are not a multiple of 2 key"),
    (dict(window=0), "window=0: .* use None"),
    (dict(sinks_N=np.ones(5)), "expected one for each of 6 query heads"),
    (dict(segment_ids=np.ones((1, 5), int)), r"expected \(1, 7\)"),
    (dict(segment_ids=np.ones((1, 7))), "float64: expected integers"),
    (dict(q_offset=3), "q_offset=3 puts 5 queries past the 7 keys"),
    (dict(q_offset=-1), "q_offset=-1"),
    (dict(implementation="flash"), "implementation='flash': use one of .*auto"),
])
def test_errors_name_the_argument_and_its_values(change, message):
  arguments = dict(q_BTNH=Q, k_BSKH=K, v_BSKH=K, window=3, scale=1.0) | change
  with pytest.raises(ValueError, match=message):
    windowed_attention(**arguments)
