"""Batches in an order, and at a position, that can be reproduced."""

import collections
import functools
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

from grain.experimental import index_shuffle
import numpy as np

from jaxlm.data import packing


# grain's own shuffle takes 4 rounds, which is too few for some lengths: over
# 65,536 rows the orders of two seeds correlate by up to 0.5, so that runs
# meant to be independent would see alike data. Eight pass; twice that is safe.
_SHUFFLE_ROUNDS = 16


class BatchIterator:
  """An endless iterator of batches whose position can be saved."""

  def __init__(
      self,
      rows: packing.Rows,
      batch_size: int,
      seed: int,
      local_rows: Sequence[int],
  ):
    self._rows = rows
    self._local_rows = local_rows
    self._next_batch = 0
    self._identity = {
        "seed": seed,
        "batch_size": batch_size,
        "rows": rows.fingerprint,
    }

  def __iter__(self) -> "BatchIterator":
    return self

  def __next__(self) -> packing.Batch:
    first = self._next_batch * self._identity["batch_size"]
    batch = self._rows.take([self._row_at(first + i) for i in self._local_rows])
    self._next_batch += 1
    return batch

  def _row_at(self, position: int) -> int:
    """The row at a position of the endless sequence of shuffled epochs."""
    epoch, index = divmod(position, len(self._rows))
    return index_shuffle(
        index,
        max_index=len(self._rows) - 1,
        seed=_epoch_seed(self._identity["seed"], epoch),
        rounds=_SHUFFLE_ROUNDS,
    )

  def get_state(self) -> dict[str, Any]:
    """The position after the batch returned last, JSON-able."""
    return {"next_batch": self._next_batch, **self._identity}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to a saved position of the same data, order and batch size."""
    expected = {"next_batch", *self._identity}
    if set(state) != expected:
      raise ValueError(
          f"data state has the keys {sorted(state)}, expected "
          f"{sorted(expected)}: it was not saved by this iterator"
      )
    for key, value in self._identity.items():
      if state[key] != value:
        raise ValueError(
            f"data state was saved with {key}={state[key]!r}, but this run "
            f"has {key}={value!r}: start with the same data, seed and batch "
            "size, or start anew"
        )
    if state["next_batch"] < 0:
      raise ValueError(f"data state next_batch={state['next_batch']} < 0")
    self._next_batch = int(state["next_batch"])


@functools.lru_cache
def _epoch_seed(seed: int, epoch: int) -> int:
  """32 bits; seed + epoch would repeat one seed's epochs in the next."""
  return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


def batches(
    rows: packing.Rows,
    batch_size: int,
    seed: int,
    *,
    start_state: dict[str, Any] | None = None,
    local_rows: Sequence[int] | None = None,
) -> BatchIterator:
  """Endless shuffled batches of `rows`; each epoch has an order of its own.

  Args:
    rows: what to draw from, each row once an epoch.
    batch_size: of the whole batch over all processes.
    seed: decides the order, alone: not the number of processes.
    start_state: a `get_state()` to continue from.
    local_rows: which rows of each batch this process reads; all by default.

  Returns:
    An iterator of `Rows.take` dicts of these rows.
  """
  if batch_size < 1:
    raise ValueError(f"batch_size={batch_size} must be at least 1")
  if local_rows is None:
    local_rows = range(batch_size)
  elif not len(local_rows) or not 0 <= min(local_rows) <= max(
      local_rows) < batch_size:
    raise ValueError(
        f"local_rows={list(local_rows)} must name rows of a batch of "
        f"batch_size={batch_size}"
    )
  if not 0 <= seed < 2**32:
    raise ValueError(f"seed={seed} must lie in 0..2**32-1")
  iterator = BatchIterator(rows, batch_size, seed, local_rows)
  if start_state is not None:
    iterator.set_state(start_state)
  return iterator


def eval_batches(
    rows: packing.Rows,
    batch_size: int,
    num_batches: int | None = None,
) -> Iterator[packing.Batch]:
  """The same batches every time, evenly spread over `rows`, in order.

  No row occurs twice: fewer batches come when the rows run out, and the last
  is filled up with padding rows (mask False). None takes every row.
  """
  if batch_size < 1:
    raise ValueError(f"batch_size={batch_size} must be at least 1")
  if num_batches is not None and num_batches < 1:
    raise ValueError(f"num_batches={num_batches} must be at least 1")
  count = len(rows)
  if num_batches is not None:
    count = min(count, batch_size * num_batches)
  index = np.arange(count) * len(rows) // count
  return (
      _padded(rows, index[first : first + batch_size], batch_size)
      for first in range(0, count, batch_size)
  )


def _padded(
    rows: packing.Rows, index_B: np.ndarray, batch_size: int
) -> packing.Batch:
  batch = rows.take(index_B)
  missing = batch_size - len(index_B)
  if not missing:
    return batch
  blank = rows.blank(missing)
  return {key: np.concatenate((batch[key], blank[key])) for key in batch}


class Prefetch:
  """An iterator whose next `size` batches are made in a thread."""

  def __init__(self, iterator: Any, size: int):
    self._iterator = iterator
    self._size = size
    self._state = iterator.get_state()
    self._waiting: collections.deque[futures.Future] = collections.deque()
    self._executor = futures.ThreadPoolExecutor(1, "prefetch")
    self._closed = False

  def __iter__(self) -> "Prefetch":
    return self

  def __next__(self) -> packing.Batch:
    if self._closed:
      raise ValueError("this prefetch iterator is closed: make a new one")
    while len(self._waiting) <= self._size:
      future = self._executor.submit(_next_and_state, self._iterator)
      self._waiting.append(future)
    try:
      batch, self._state = self._waiting.popleft().result()
    except BaseException:
      # Batches made after the failure must not be taken for the failed one.
      self.set_state(self._state)
      raise
    return batch

  def get_state(self) -> dict[str, Any]:
    """The position after the batch returned last, not after those waiting."""
    return self._state

  def set_state(self, state: dict[str, Any]) -> None:
    self._drop_waiting()
    try:
      self._iterator.set_state(state)
    except Exception:
      # The iterator is ahead of what was returned: nothing may be skipped.
      self._iterator.set_state(self._state)
      raise
    self._state = state

  def close(self) -> None:
    """Ends the thread; at most the batch in the making is waited for."""
    self._closed = True
    self._drop_waiting()
    self._executor.shutdown()

  def _drop_waiting(self) -> None:
    futures.wait([f for f in self._waiting if not f.cancel()])
    self._waiting.clear()


def _next_and_state(iterator: Any) -> tuple[packing.Batch, dict[str, Any]]:
  return next(iterator), iterator.get_state()


def prefetch(iterator: Any, size: int = 2) -> Prefetch:
  """Keeps `size` batches ready in a thread.

  The iterator needs `get_state` and `set_state`, and is the result's own from
  here on. An error is raised where the batch would have been, and the position
  stays before it.
  """
  if size < 1:
    raise ValueError(f"size={size} must be at least 1")
  return Prefetch(iterator, size)

