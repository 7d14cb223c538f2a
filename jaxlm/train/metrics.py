"""A run's metrics: lines of JSON and TensorBoard files, and when they alarm."""
import collections
import json
import math
import pathlib
import statistics
from typing import Any

import tensorboardX

from jaxlm.parallel.multihost import everyone, is_main


class MetricsWriter:
  """Writes DIRECTORY/metrics.jsonl and an event file beside it.

  A line is one write, so that a killed run leaves at most its last line
  torn. What was logged after `step`, where the run continues, is cut off: it
  will be logged again. `kept` holds the entries before. Of several processes,
  which all make the same calls, the first writes.
  """

  def __init__(self, directory, step: int = 0):
    self._path = pathlib.Path(directory) / "metrics.jsonl"
    self.kept, self._file = [], None
    if is_main():
      self._path.parent.mkdir(parents=True, exist_ok=True)
      self.kept = _cut(self._path, step)
      self._file = open(self._path, "ab", buffering=0)
      # TensorBoard drops what earlier event files have from purge_step on.
      self._events = tensorboardX.SummaryWriter(
          str(directory), purge_step=step + 1, filename_suffix=f".{step}")
    self.kept = everyone(self.kept)[0]

  def write(self, entry: dict[str, Any]) -> None:
    """One line; each number in it but `step` becomes a scalar."""
    self.kept.append(entry)
    if self._file is None:
      return
    line = (json.dumps(entry, allow_nan=False) + "\n").encode()
    try:
      if self._file.write(line) != len(line):
        raise OSError("the disk is full")
    except OSError as error:
      raise ValueError(f"{self._path}: cannot be written ({error}): free space "
                       "and run again, it continues from the last "
                       "checkpoint") from error
    for name, value in entry.items():
      if name != "step" and isinstance(value, (int, float)):
        self._events.add_scalar(name, value, entry["step"])

  def flush(self) -> None:
    """Events reach the disk now; lines do at once."""
    if self._file is not None:
      self._events.flush()

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
      self._events.close()


def _cut(path: pathlib.Path, step: int) -> list[dict]:
  """Truncates the file after the last line up to `step`; returns the lines."""
  if not path.exists():
    return []
  kept, end = [], 0
  lines = path.read_bytes().splitlines(keepends=True)
  for number, line in enumerate(lines, 1):
    try:
      entry = json.loads(line)
      if entry["step"] > step:
        break
    except (ValueError, KeyError, TypeError) as error:
      if number == len(lines):
        break
      raise ValueError(f"{path}, line {number} is no line of metrics: {error}; "
                       "delete the file and run again") from error
    if not line.endswith(b"\n"):
      break
    kept.append(entry)
    end += len(line)
  with open(path, "r+b") as file:
    file.truncate(end)
  return kept


class LossWatch:
  """Tells an ordinary loss from one that ends the run."""

  window = 32
  least = 8

  def __init__(self, spike_factor: float, recent: list[float] = ()):
    self._factor = spike_factor
    self._recent = collections.deque(recent, self.window)

  @property
  def recent(self) -> list[float]:
    return list(self._recent)

  def alarm(self, loss: float, grad_norm: float) -> str:
    """Why the run must end, or an empty string; takes note of the loss."""
    if not math.isfinite(loss):
      return f"loss is {loss}"
    if not math.isfinite(grad_norm):
      return f"the gradient's norm is {grad_norm}"
    if self._factor and len(self._recent) >= self.least:
      median = statistics.median(self._recent)
      # A loss near 0 may multiply without harm, hence the floor of 1 nat.
      if loss > self._factor * max(median, 1.0):
        return (f"loss leapt to {loss:.4g}, from a median of {median:.4g} over "
                f"the {len(self._recent)} steps before")
    self._recent.append(loss)
    return ""
