import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.expert_matmul import expert_matmul
from pallas_kernels.expert_matmul import reference

pytestmark = pytest.mark.usefixtures("quick_compile")

IMPLEMENTATIONS = ("xla", "ragged")

# Name: (rows, D, F, rows of each expert). Sizes are pairwise distinct, and
# cases of the same sizes share one compiled program.
CASES = {
    "uneven": (41, 6, 9, [20, 3, 0, 17, 1]),
    "empty first and last": (41, 6, 9, [0, 40, 0, 1, 0]),
    "all in one": (41, 6, 9, [0, 0, 0, 41, 0]),
    "rows past the last group": (41, 6, 9, [8, 0, 21, 3, 0]),
    "all rows past": (41, 6, 9, [0, 0, 0, 0, 0]),
    "one row": (1, 4, 3, [0, 0, 1, 0, 0]),
    "one row, none taken": (1, 4, 3, [0, 0, 0, 0, 0]),
    "less than a block": (5, 8, 3, [2, 1, 1, 1]),
    "one expert": (29, 3, 13, [29]),
    "many experts with few rows": (83, 5, 7, [i % 5 == 0 for i in range(150)]),
    "blocks of 256 with remainders": (1601, 3, 4, [771, 514, 255]),
}
ROWS, D, F, _ = CASES["uneven"]


def inputs(rows, d, f, sizes, dtype=jnp.float32):
  """Arguments and a cotangent, whose float values bfloat16 holds exactly."""
  random = np.random.default_rng(rows + d)
  shapes = (rows, d), (len(sizes), d, f), (len(sizes), f), (rows, f)
  x, w, b, dy = (random.normal(size=shape).astype(jnp.bfloat16).astype(dtype)
                 for shape in shapes)
  return x, w, np.array(sizes, np.int32), b, dy


@functools.partial(jax.jit, static_argnums=0)
def results(implementation, x, w, sizes, b, dy):
  """(y, dx, dw, db) of an implementation or of the reference."""
  def function(x, w, b):
    if implementation == "reference":
      return reference.expert_matmul(x, w, sizes, b)
    return expert_matmul(x, w, sizes, bias=b,
                         implementation=implementation)
  y, vjp = jax.vjp(function, x, w, b)
  return y, *vjp(dy)


def assert_close(found, expected, dtype=jnp.float32):
  """Exact products summed in float32, then rounded once to `dtype`.

  The sums may be taken in any order: 1e-6 for each unit of the largest
  result; rounding adds half a unit in the last place of bfloat16, 2^-8.
  """
  rounding = 2 ** -8 if dtype == jnp.bfloat16 else 1e-6
  for name, a, b in zip(("y", "dx", "dw", "db"), found, expected):
    assert a.dtype == dtype, name
    np.testing.assert_allclose(
        np.asarray(a, np.float32), b, err_msg=name, rtol=rounding,
        atol=2e-6 * max(1, np.max(np.abs(b))))


def test_the_reference_means_each_row_times_its_experts_matrix():
  x, w, sizes, b, _ = inputs(*CASES["rows past the last group"])
  expected, row = np.zeros((ROWS, F), np.float32), 0
  for expert, size in enumerate(sizes):
    for _ in range(size):
      expected[row] = x[row] @ w[expert] + b[expert]
      row += 1
  np.testing.assert_allclose(reference.expert_matmul(x, w, sizes, b),
                             expected, rtol=1e-5, atol=1e-5)
  assert np.all(expected[32:] == 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_references(case, implementation):
  args = inputs(*CASES[case])
  assert_close(results(implementation, *args), results("reference", *args))


def test_auto_is_what_the_cpu_is_best_at():
  args = inputs(*CASES["uneven"])
  for a, b in zip(results("auto", *args), results("xla", *args)):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", ["uneven", "rows past the last group",
                                  "many experts with few rows"])
def test_bfloat16_is_summed_in_float32(case, implementation):
  args = inputs(*CASES[case], dtype=jnp.bfloat16)
  exact = inputs(*CASES[case])
  assert_close(results(implementation, *args), results("reference", *exact),
               jnp.bfloat16)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_past_the_last_group_are_exactly_zero(implementation, dtype):
  args = inputs(*CASES["rows past the last group"], dtype=dtype)
  y, dx, *_ = results(implementation, *args)
  assert not np.any(y[32:]) and not np.any(dx[32:])
  assert np.all(np.any(np.asarray(dx[:32], np.float32) != 0, axis=1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_bias(implementation):
  x, w, sizes, b, dy = inputs(*CASES["uneven"])
  @jax.jit
  def without(x, w):
    return jax.vjp(lambda x, w: expert_matmul(
        x, w, sizes, implementation=implementation), x, w)
  y, vjp = without(x, w)
  expected = results("reference", x, w, sizes, 0 * b, dy)
  assert_close((y, *vjp(dy)), expected[:3])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 41), min_size=4, max_size=4))
def test_any_group_sizes(cuts):
  # Four groups between the cuts and an empty one; nobody has the last rows.
  edges = [0, *sorted(cuts)]
  sizes = [b - a for a, b in zip(edges, edges[1:])]
  sizes.insert(cuts[0] % 5, 0)
  args = inputs(ROWS, D, F, sizes)
  assert_close(results("xla", *args), results("reference", *args))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_several_seeds_at_once_under_vmap(implementation):
  seeds = [inputs(ROWS, D, F, sizes)
           for sizes in ([20, 3, 0, 17, 1], [0, 0, 41, 0, 0], [9, 1, 2, 3, 4])]
  together = jax.vmap(functools.partial(results, implementation))(
      *map(jnp.stack, zip(*seeds)))
  for i, seed in enumerate(seeds):
    assert_close([x[i] for x in together], results("reference", *seed))


def total(implementation, x, w, sizes):
  return jnp.sum(expert_matmul(x, w, sizes, implementation=implementation))


SPREADS = {
    "four experts": np.full(4, 256),
    "128 experts": np.full(128, 8),
    "skewed": np.bincount(np.random.default_rng(0).geometric(0.1, 1024) % 64,
                          minlength=64),
    "one expert of 64": 1024 * np.eye(64, dtype=int)[17],
    "one row each": np.arange(256) % 4 == 0,
}


@pytest.mark.parametrize("spread, implementation", [
    *((spread, "xla") for spread in SPREADS), ("128 experts", "auto")])
def test_cost_follows_the_rows_not_the_experts(spread, implementation,
                                               executed_flops):
  sizes = jnp.array(SPREADS[spread], jnp.int32)
  used, rows = int(jnp.sum(sizes > 0)), int(jnp.sum(sizes))
  x, w, *_ = inputs(1024, D, F, sizes)
  run = functools.partial(total, implementation)
  forward = executed_flops(run, x, w, sizes)
  needed = 2 * D * F * rows
  # An expert in use may waste less than a block, of at most a quarter of an
  # average expert's rows or 8.
  waste = 2 * D * F * used * max(8, 1024 // len(sizes) // 4)
  assert needed <= forward <= needed + waste
  # One more matmul for the gradient of the rows, and one for the weights.
  both = executed_flops(jax.grad(run, (0, 1)), x, w, sizes)
  assert 3 * needed <= both <= 3 * (needed + waste)


def test_the_count_sees_every_expert_on_every_row(executed_flops):
  x, w, sizes, b, _ = inputs(*CASES["uneven"])
  assert executed_flops(reference.expert_matmul, x, w, sizes, b) == (
      2 * ROWS * D * F * 5)


@pytest.mark.parametrize("change, message", [
    (dict(x_MD=jnp.ones(7)), r"x \(7,\) and weights .* expected \[M, D\]"),
    (dict(x_MD=jnp.ones((9, 6))), "rows of 6, weights .* take rows of 7"),
    (dict(group_sizes_E=jnp.array([9])), "one size for each of the 2"),
    (dict(group_sizes_E=jnp.array([4., 5.])), "float32: expected int32"),
    (dict(bias=jnp.ones(5)), r"bias \(5,\): expected \(2, 5\)"),
    (dict(x_MD=jnp.ones((9, 7), jnp.bfloat16)),
     "x is bfloat16 and weights are float32: cast both"),
    (dict(x_MD=jnp.ones((9, 7), int), weights=jnp.ones((2, 7, 5), int)),
     "floating-point"),
    (dict(implementation="loop"), "implementation='loop': use one of .*auto"),
])
def test_errors_name_the_argument_and_its_values(change, message):
  arguments = dict(x_MD=jnp.ones((9, 7)), weights=jnp.ones((2, 7, 5)),
                   group_sizes_E=jnp.array([4, 5])) | change
  with pytest.raises(ValueError, match=message):
    expert_matmul(**arguments)
