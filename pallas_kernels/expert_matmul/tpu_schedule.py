"""Which rows meet which expert, as a list of tiles for a sequential grid.

Rows are cut into row tiles of a fixed size, wherever an expert ends; a row
tile is visited once for each expert that has rows in it, experts in order.
So visits of one expert follow each other (its weights are fetched once), and
so do visits of one row tile (its result stays in fast memory until whole).
M rows in tiles of R make at most ceil(M / R) + min(E, M) - 1 visits.
"""
import typing

import jax
import jax.numpy as jnp


class Visits(typing.NamedTuple):
  """int32 arrays, one element a visit; then how many visits there are.

  A visit multiplies rows `start` to `end` of all (those within its row tile)
  by its expert. `flags`: see below.
  """
  row_tile: jax.Array
  expert: jax.Array
  start: jax.Array
  end: jax.Array
  flags: jax.Array
  count: jax.Array


# The expert's first visit; the row tile's first; the expert's `large_scales`.
NEW_EXPERT, NEW_TILE, LARGE_SCALES = 1, 2, 4


def most_visits(num_experts: int, num_rows: int, rows: int) -> int:
  return -(-num_rows // rows) + min(num_experts, num_rows) - 1


def visits(group_sizes_E, num_rows: int, rows: int, *, large_E=None,
           of_each_expert=False) -> Visits:
  """All row tiles are visited, those past the last group with no rows; or,
  `of_each_expert`, all experts are, and such row tiles are not."""
  num_experts, row_tiles = group_sizes_E.shape[0], -(-num_rows // rows)
  end_E = jnp.minimum(jnp.cumsum(group_sizes_E.astype(jnp.int32)), num_rows)
  start_E = jnp.concatenate([jnp.zeros(1, jnp.int32), end_E[:-1]])
  used_E = end_E > start_E
  first_E = jnp.minimum(start_E // rows, row_tiles - 1)
  count_E = jnp.where(used_E, -(-end_E // rows) - first_E, 0)
  # The group of those past the last comes as one more, without rows.
  rest = -(-end_E[-1:] // rows)
  if of_each_expert:
    count_E = jnp.maximum(count_E, 1)
    last = most = row_tiles + num_experts - 1
  else:
    most = most_visits(num_experts, num_rows, rows)
    last = jnp.max(jnp.where(used_E, jnp.arange(num_experts), 0))
  groups = [(first_E, rest), (start_E, rest * 0), (end_E, rest * 0),
            (count_E, rest * 0 if of_each_expert else row_tiles - rest)]
  first_G, start_G, end_G, count_G = map(jnp.concatenate, groups)
  stop_G = jnp.cumsum(count_G)
  i = jnp.arange(most)
  group = jnp.sum(stop_G <= i[:, None], 1)
  group = jnp.minimum(group, num_experts)
  row_tile = first_G[group] + i - (stop_G - count_G)[group]
  row_tile = jnp.clip(row_tile, 0, row_tiles - 1)
  expert = jnp.where(group < num_experts, group, last)
  if of_each_expert:
    expert = jnp.minimum(expert, num_experts - 1)
  def changes(x):
    return jnp.concatenate([jnp.ones(1, bool), x[1:] != x[:-1]])
  flags = NEW_EXPERT * changes(expert) + NEW_TILE * changes(row_tile)
  if large_E is not None:
    flags += LARGE_SCALES * large_E[expert]
  arrays = row_tile, expert, start_G[group], end_G[group], flags, stop_G[-1]
  return Visits(*(x.astype(jnp.int32) for x in arrays))
