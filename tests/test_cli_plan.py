"""`jaxlm plan`: what it prints, keeps and refuses."""
import importlib.util
import json
import socket

import pytest

from jaxlm import cli


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
  """No network, and a cache of its own."""
  def refuse(*args, **kwargs):
    raise AssertionError("the network was asked")
  monkeypatch.setattr(socket, "getaddrinfo", refuse)
  monkeypatch.setenv("JAXLM_CACHE", str(tmp_path))
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def run(capsys, *arguments):
  status = cli.main(["plan", *arguments])
  captured = capsys.readouterr()
  return status, captured.out, captured.err


def test_layouts_are_ranked_and_the_best_is_shown(capsys):
  status, shown, _ = run(capsys, "--model", "gpt-oss-120b", "--slice",
                         "v5p:4x4x4", "--estimate")
  assert status == 0
  for part in ("layouts, the best first", "parameters", "optimizer", "fits",
               "useful/executed", "receiving over", "a step if all overlaps",
               "MFU"):
    assert part in shown


def test_json(capsys):
  status, shown, _ = run(
      capsys, "--model", "gpt-oss-20b", "--slice", "v5e:2x4", "--task",
      "decode", "--estimate", "--json")
  assert status == 0
  document = json.loads(shown)
  plan = document["plan"]
  assert plan["mesh"] == document["layouts"][0]["mesh"]
  assert plan["total"] == pytest.approx(
      sum(plan["state"].values()) + plan["temporaries"] + plan["other"])
  assert plan["fits"] and plan["total"] < plan["hbm"]
  assert set(plan["state"]) == {"parameters", "cache"}
  assert {"axes", "kind", "bytes"} <= set(plan["wire"][0])
  assert plan["bounds"]["overlapped"] <= plan["bounds"]["alone"]
  assert document["refused"]


def test_gpus_go_by_arithmetic(capsys):
  status, shown, _ = run(capsys, "--model", "qwen3-8b", "--slice", "h100:8",
                         "--mesh", "data=8")
  assert status == 0 and "estimate" in shown
  status, shown, _ = run(
      capsys, "--model", "gpt2", "--slice", "mine:2", "--hbm-gb", "24",
      "--tflops", "80", "--bandwidth-gbps", "900", "--seq", "1024")
  assert status == 0 and "of 22.35" in shown


@pytest.mark.parametrize("arguments, message", [
    (["--model", "gpt-os-20b", "--slice", "v5e:2x4"], "mean 'gpt-oss-20b'"),
    (["--model", "gpt2", "--slice", "v5x:2x4"], "'v5x' is not known"),
    (["--model", "gpt2", "--slice", "v5e:2x4", "--mesh", "dat=8"],
     "mesh axis 'dat'"),
    (["--model", "gpt2", "--slice", "v5e:2x4", "--mesh", "data=4"],
     "v5e:2x4 has 8"),
    (["--model", "deepseek-v3", "--slice", "v5e:2x2", "--estimate"],
     "does not fit on v5e:2x2")])
def test_failures_say_why(arguments, message, capsys):
  status, _, error = run(capsys, *arguments)
  assert status == 1 and message in error


def test_without_libtpu(capsys, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  status, _, error = run(capsys, "--model", "gpt2", "--slice", "v5e:2x2",
                         "--mesh", "data=4", "--seq", "1024")
  assert status == 1
  assert "pip install libtpu" in error and "--estimate" in error


def test_wrong_usage_is_status_2(capsys):
  with pytest.raises(SystemExit) as stop:
    cli.main(["plan", "--model", "gpt2", "--slice", "v5e:2x4", "--task",
              "decod"])
  assert stop.value.code == 2
  assert "'prefill'" in capsys.readouterr().err
