"""The presets by name, and what their sizes alone do not show."""
import subprocess
import sys

import pytest

import jaxlm
from jaxlm.config_dict import from_dict, to_dict


@pytest.mark.parametrize("name", jaxlm.presets())
def test_a_preset_survives_json(name):
  config = jaxlm.preset(name)
  assert from_dict(jaxlm.ModelConfig, to_dict(config)) == config


@pytest.mark.parametrize("name,meant", [
    ("gpt-oss20b", "gpt-oss-20b"), ("Qwen3-8B", "qwen3-8b"),
    ("gemma-2-9b", "gemma2-9b")])
def test_an_unknown_preset_is_refused_with_a_guess(name, meant):
  with pytest.raises(ValueError, match=f"{name}.*did you mean .*{meant}"):
    jaxlm.preset(name)


def test_a_name_like_no_other_is_told_all():
  with pytest.raises(ValueError, match="use one of gpt2, .*gpt-oss-120b"):
    jaxlm.preset("xyzzy")


def test_layers_of_gpt_oss_and_gemma():
  kinds = lambda name: [k.attention for k in jaxlm.preset(name).layers]
  assert kinds("gpt-oss-20b")[:4] == ["sliding", "full", "sliding", "full"]
  assert kinds("gemma2-2b")[:2] == ["sliding", "full"]
  full = [i for i, kind in enumerate(kinds("gemma3-1b")) if kind == "full"]
  assert full == [5, 11, 17, 23]


@pytest.mark.parametrize("name,scale", [
    ("gpt-oss-20b", 64 ** -0.5), ("gemma2-9b", 256 ** -0.5),
    ("gemma2-27b", 144 ** -0.5), ("gemma3-12b", 256 ** -0.5),
    ("gemma3-27b", 168 ** -0.5)])
def test_query_scale(name, scale):
  assert jaxlm.preset(name).attention.query_scale == pytest.approx(scale)


@pytest.mark.parametrize("name,theta", [
    ("qwen3-30b-a3b", 1e6), ("qwen3-30b-a3b-2507", 1e7),
    ("qwen3-235b-a22b", 1e6), ("qwen3-235b-a22b-2507", 5e6)])
def test_rope_theta_of_the_2507_releases(name, theta):
  assert jaxlm.preset(name).attention.rope_full == jaxlm.RopeConfig(theta)


def test_presets_need_no_jax():
  code = ("import sys, jaxlm; jaxlm.preset('gpt2');"
          "sys.exit('jax' in sys.modules or 'flax' in sys.modules)")
  subprocess.run([sys.executable, "-c", code], check=True)


def test_all_names_are_there():
  for name in jaxlm.__all__:
    assert getattr(jaxlm, name)
