"""Lines and events over kill and resume, and which losses alarm."""
import json
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from jaxlm.train.metrics import LossWatch, MetricsWriter


def events(directory) -> list[Event]:
  """Of all event files, in the order of their names."""
  found = []
  for path in sorted(directory.glob("events.*")):
    content = path.read_bytes()
    while content:
      [size] = struct.unpack("<Q", content[:8])
      found.append(Event.FromString(content[12:12 + size]))
      content = content[16 + size:]
  return found


def write(directory, step, steps):
  writer = MetricsWriter(directory, step)
  for s in steps:
    writer.write({"step": s, "loss": s / 8})
  writer.close()
  return writer


def lines(directory):
  return [json.loads(line) for line in
          (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_cuts_off_what_it_will_log_again(tmp_path):
  write(tmp_path, 0, (2, 4, 6, 8))
  again = write(tmp_path, 5, (6, 8))
  expected = [{"step": s, "loss": s / 8} for s in (2, 4, 6, 8)]
  assert lines(tmp_path) == again.kept == expected


@pytest.mark.parametrize("torn", [b'{"step": 6, "lo',
                                  b'{"step": 6, "loss": 1}'])
def test_a_torn_line_is_cut_off(tmp_path, torn):
  write(tmp_path, 0, (2, 4))
  with open(tmp_path / "metrics.jsonl", "ab") as file:
    file.write(torn)
  write(tmp_path, 6, (8,))
  assert [entry["step"] for entry in lines(tmp_path)] == [2, 4, 8]


def test_another_file_is_not_cut(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text("shopping list\nbread\n")
  with pytest.raises(ValueError, match="line 1 is no line of metrics"):
    MetricsWriter(tmp_path, 3)
  assert path.read_text() == "shopping list\nbread\n"


def test_events_hold_every_scalar_and_where_a_run_resumed(tmp_path):
  write(tmp_path, 0, (2, 4))
  write(tmp_path, 2, (4,))
  found = events(tmp_path)
  scalars = [(e.step, v.tag, v.simple_value) for e in found
             for v in e.summary.value]
  assert scalars == [(2, "loss", 0.25), (4, "loss", 0.5), (4, "loss", 0.5)]
  starts = [e.step for e in found if e.HasField("session_log")]
  assert starts == [1, 3]  # from here on TensorBoard drops what came before


def test_what_is_no_number_stands_in_its_line_alone(tmp_path):
  entry = {"step": 2, "loss": 0.5, "tokens": 7, "load": [[0.25, 0.75]]}
  writer = MetricsWriter(tmp_path)
  writer.write(entry)
  writer.close()
  assert lines(tmp_path) == [entry]
  assert [v.tag for e in events(tmp_path) for v in e.summary.value] == [
      "loss", "tokens"]


@pytest.mark.parametrize("loss, grad_norm, reason", [
    (float("nan"), 1.0, "loss is nan"), (float("inf"), 1.0, "loss is inf"),
    (2.0, float("nan"), "the gradient's norm is nan"),
    (4.1, 1.0, "loss leapt to 4.1, from a median of 2"), (3.9, 1.0, "")])
def test_what_alarms(loss, grad_norm, reason):
  watch = LossWatch(2.0, [2.0] * 20)
  assert watch.alarm(loss, grad_norm).startswith(reason)
  assert bool(watch.alarm(loss, grad_norm)) == bool(reason)


def test_small_losses_may_multiply():
  watch = LossWatch(2.0, [0.01] * 20)
  assert not watch.alarm(1.9, 1.0)
  assert watch.alarm(2.1, 1.0)


def test_no_spike_without_a_past_or_a_factor():
  assert not LossWatch(2.0, [1.0] * 7).alarm(50.0, 1.0)
  assert not LossWatch(0.0, [1.0] * 32).alarm(50.0, 1.0)


def test_a_watch_goes_on_from_what_was_recent():
  watch = LossWatch(2.0)
  for i in range(40):
    watch.alarm(1.0 + i / 100, 1.0)
  assert len(watch.recent) == 32
  assert LossWatch(2.0, watch.recent).recent == watch.recent
