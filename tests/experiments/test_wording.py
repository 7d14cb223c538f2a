import pytest

from experiments import wording


@pytest.mark.parametrize("value, text", [
    (57, "57.0"), (999, "999"), (9999, "9,999"), (10_000, "10.0 k"),
    (999_600, "1.00 M"), (20_914_757_184, "20.9 G"), (0, "0.00")])
def test_number(value, text):
  assert wording.number(value) == text


def test_size():
  assert wording.size(480 * 2 ** 20) == "480 MiB"
  assert wording.size(1536) == "1.50 KiB"
