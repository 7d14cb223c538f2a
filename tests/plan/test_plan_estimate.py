"""Arithmetic against trees of shapes, published sizes and compiled programs."""
import math

import jax
import pytest

import jaxlm
from jaxlm.model import cache as cache_lib
from jaxlm.model.costs import cache_bytes, parameter_counts
from jaxlm.plan import bounds, devices, programs, search
from jaxlm.plan.estimate import estimate
from jaxlm.model.cache import abstract_cache
from jaxlm.plan.job import make_job
from pallas_kernels import platforms


def job(model, slice_, task, sizes, **options):
  return make_job(model, jaxlm.preset(model), task,
                  devices.parse_slice(slice_), sizes, **options)


def state(job_):
  return programs.bytes_by_kind(job_, programs.abstract_mesh(job_.sizes))


@pytest.mark.parametrize("model", [
    "gpt2", "gpt-oss-120b", "qwen3-30b-a3b", "gemma3-27b", "deepseek-v3"])
def test_what_one_device_holds(model):
  total = parameter_counts(jaxlm.preset(model)).total
  seq = 1024
  found = state(job(model, "h100:1", "train", {}, seq=seq))
  assert found["parameters"] == 4 * total
  # Two moments and a few counts.
  assert found["optimizer"] == pytest.approx(8 * total, abs=64)
  found = state(job(model, "h100:1", "decode", {}, seq=seq, batch=3))
  config = jaxlm.preset(model)
  slots = sum(cache_lib.cache_slots(config, layer.attention, seq)
              for layer in config.layers)
  assert found["parameters"] == 2 * total
  assert found["cache"] == 3 * (cache_bytes(config, seq) + 4 * slots)


def test_packed_experts():
  model = "gpt-oss-120b"
  config = jaxlm.preset(model)
  found = state(job(model, "v5e:4x4", "decode", {"expert": 8, "tensor": 2},
                    weights="mxfp4"))
  counts = parameter_counts(config)
  experts = counts.experts + counts.idle_experts
  # 4 bits and a share of a scale, with little padding; the rest in bfloat16.
  packed = experts * (4 + 8 / 32) / 8
  least = packed / 16 + (counts.total - experts) * 2 / 16
  assert least < found["parameters"] < 1.25 * least


def test_what_many_devices_hold_is_a_part():
  found = state(job("gpt-oss-120b", "v5p:4x4x4", "train",
                    {"data": 8, "expert": 8}))
  whole = 4 * parameter_counts(jaxlm.preset("gpt-oss-120b")).total
  assert whole / 64 <= found["parameters"] < 1.01 * whole / 64


@pytest.mark.parametrize("model", ["gpt-oss-20b", "deepseek-v3"])
def test_the_cache_is_a_tpus(model, monkeypatch):
  config = jaxlm.preset(model)
  monkeypatch.setattr(platforms, "platform", lambda: "tpu")
  made = jax.eval_shape(
      lambda: cache_lib.empty_cache(config, 3, 300, "bfloat16"))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(
      lambda x: (x.shape, x.dtype), abstract_cache(
          config, 3, 300, "bfloat16", "tpu"))


def test_more_devices_need_less_of_each():
  small, large = (estimate(job("qwen3-30b-a3b", f"v5p:{shape}", "train",
                               {"data": n // 8, "expert": 8}))
                  for shape, n in (("2x2x4", 16), ("4x4x4", 64)))
  assert large.total < small.total
  assert large.useful == small.useful  # a sequence each


def test_layouts_divide_and_the_best_come_first():
  config = jaxlm.preset("gpt-oss-20b")
  slice_ = devices.parse_slice("v5e:2x4")
  assert all(math.prod(sizes.values()) == 8
             for sizes in search.layouts(config, 8))
  found = search.search("gpt-oss-20b", config, "decode", slice_)
  times = [plan.bounds["alone"] for plan in found.plans]
  assert times == sorted(times) and all(plan.fits for plan in found.plans)
  # Each device would hold all experts.
  assert any("data=8" in name for names in found.refused.values()
             for name in names)


def test_bounds_by_hand():
  slice_ = devices.parse_slice("v5p:4x4x4")
  mesh = {"stage": 1, "data": 4, "context": 1, "expert": 16, "tensor": 1}
  found = bounds.bounds(slice_, mesh, useful=459e12, executed=2 * 459e12,
                        traffic=2765e9, wire={("data", "all-gather"): 180e9,
                                              ("expert", "all-gather"): 720e9})
  assert (found.compute, found.memory) == (2, 1)
  # A ring of 4 gives from both sides, one of 4x4 in both dimensions.
  assert found.wire == {"data": 1, "expert": 2}
  assert (found.overlapped, found.alone) == (2, 5)
  assert (found.mfu_overlapped, found.mfu_alone) == (0.5, 0.2)
  found = bounds.bounds(slice_, mesh, 1, 1, 1, {
      ("expert", "all-to-all"): 180e9})
  assert found.alone == pytest.approx(1)  # each link of a ring's is passed
  assert bounds.aligned(slice_, mesh)
  assert not bounds.aligned(slice_, {**mesh, "data": 8, "expert": 8})


@pytest.mark.parametrize("text, message", [
    ("v5q:4x4", "did you mean v5"), ("v5p:4x4", "3 dimensions"),
    ("v5e:4xx4", "write v5e"), ("mine:8", "--hbm-gb, --tflops"),
    ("h100", "write h100:8")])
def test_slices_are_refused(text, message):
  with pytest.raises(ValueError, match=message):
    devices.parse_slice(text)


def test_a_device_by_its_figures():
  slice_ = devices.parse_slice("mine:3", hbm=8e9, flops=1e12, bandwidth=1e11)
  assert (slice_.size, slice_.device.hbm) == (3, 8e9)
  assert devices.parse_slice("h100:8", hbm=96e9).device.hbm == 96e9


@pytest.mark.parametrize("options, message", [
    (dict(task="trian"), "did you mean 'train'"),
    (dict(sizes={"data": 4}), "v5e:2x4 has 8"),
    (dict(batch=3), "multiple of 8"), (dict(weights="bf16"), "float32"),
    (dict(task="decode", weights="mxfp4", model="qwen3-8b"), "no experts"),
    (dict(model="gpt2", seq=2048), "1024 learned")])
def test_jobs_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    job(**{"model": "gpt-oss-20b", "slice_": "v5e:2x4", "task": "train",
           "sizes": {"data": 8}} | options)
