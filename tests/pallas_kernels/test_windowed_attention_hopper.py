"""The attention kernels compiled for an H200, which need not be there."""
import functools
import importlib.util

import jax
from jax.experimental import topologies
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.windowed_attention import cached_attention, gpu
from pallas_kernels.windowed_attention.options import Options

PLUGIN = "jax_plugins.xla_cuda12"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None
    or importlib.util.find_spec(PLUGIN) is None,
    reason="needs, of jax's version, pip install --no-deps jax-cuda12-plugin "
           "jax-cuda12-pjrt nvidia-cuda-nvcc-cu12")

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000
  l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 141000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H200"
"""

# Name: N, K, H, window, soft_cap.
MODELS = {
    "gpt-oss-20b sliding": (64, 8, 64, 128, None),
    "gpt-oss-20b full": (64, 8, 64, None, None),
    "Gemma 3 27B sliding": (32, 16, 128, 1024, None),
    "Gemma 2 27B": (32, 16, 128, 4096, 50.0),
    "Qwen3-30B-A3B": (32, 4, 128, None, None),
    "Gemma 3 4B sliding": (8, 4, 256, 1024, None),
}


def compiled(function, *args):
  """For an H200: fails where registers spill or shared memory is too small."""
  device = topologies.get_topology_desc(
      platform="cuda", topology_name="H200", target_config=H200,
      topology="1x1x1").devices[0]
  here = jax.sharding.NamedSharding(
      jax.sharding.Mesh(np.array([device]), ("x",)),
      jax.sharding.PartitionSpec())
  mesh = jax.sharding.AbstractMesh(
      (1,), ("x",), (jax.sharding.AxisType.Auto,),
      abstract_device=jax.sharding.AbstractDevice(
          device_kind="NVIDIA H200", num_cores=132, platform="gpu"))
  with jax.sharding.use_abstract_mesh(mesh):
    lowered = jax.jit(function, in_shardings=(here,) * len(args),
                      out_shardings=here).lower(*args)
  return lowered.compile(compiler_options={
      "xla_gpu_fail_ptx_compilation_on_register_spilling": True})


@pytest.mark.parametrize("model", MODELS)
def test_no_kernel_spills_and_nothing_but_delta_is_stored(model):
  num_heads, num_kv_heads, head_dim, window, soft_cap = MODELS[model]
  options = Options(window, head_dim ** -0.5, soft_cap)
  shape = lambda heads: jax.ShapeDtypeStruct((1, 8192, heads, head_dim),
                                             jnp.bfloat16)
  q, k = shape(num_heads), shape(num_kv_heads)
  sinks = jax.ShapeDtypeStruct((num_heads,), jnp.float32)
  lse = jax.ShapeDtypeStruct((1, num_heads, 8192), jnp.float32)
  forward = compiled(
      lambda q, k, v, sinks: gpu.forward(q, k, v, sinks, None, options),
      q, k, k, sinks)
  assert forward.memory_analysis().temp_size_in_bytes <= 4096
  backward = compiled(
      lambda q, k, v, o, lse, do: gpu.backward(
          q, k, v, None, None, o, lse, do, options)[:3], q, k, k, q, lse, q)
  assert backward.memory_analysis().temp_size_in_bytes <= 4 * lse.size + 4096


@pytest.mark.parametrize("slots", [128, 32768])
@pytest.mark.parametrize("model", MODELS)
def test_no_kernel_spills_over_a_cache(model, slots):
  num_heads, num_kv_heads, head_dim, window, soft_cap = MODELS[model]
  shape = lambda *shape: jax.ShapeDtypeStruct((8, *shape), "bfloat16")
  own, cached = (shape(length, num_kv_heads, head_dim)
                 for length in (1, slots))
  positions = [jax.ShapeDtypeStruct(x.shape[:2], "int32")
               for x in (own, cached)]
  run = compiled(
      functools.partial(cached_attention, window=window, scale=1.0,
                        soft_cap=soft_cap, implementation="pallas-gpu"),
      shape(1, num_heads, head_dim), own, own, cached, cached, *positions)
  # The parts' outputs: little next to the cache.
  assert run.memory_analysis().temp_size_in_bytes < 4 * cached.size / 8
