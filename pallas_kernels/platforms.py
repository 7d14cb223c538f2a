"""Which platform, and which generation of TPU, is being compiled for."""
import jax
from jax import lax

# By the start of a device's kind; megacore chips before those without.
_TPU_KINDS = (("TPU v5 lite", "v5e"), ("TPU v5e", "v5e"), ("TPU v5", "v5p"),
              ("TPU v6", "v6e"), ("TPU7x", "7x"), ("TPU v4", "v4"))


def device_kind() -> str:
  """The kind of the device that is being compiled for.

  Ahead of time it is the abstract mesh's (`jax.sharding.use_abstract_mesh`
  around the lowering), otherwise the default device's.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return (jax.devices()[0] if device is None else device).device_kind


def platform() -> str:
  """"tpu", "gpu" or "cpu": what is being compiled for, as `device_kind`."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is None:
    return jax.default_backend()
  if device.device_kind.startswith("TPU"):
    return "tpu"
  return "cpu" if device.device_kind.lower() == "cpu" else "gpu"


def tpu_generation() -> str | None:
  """"v4", "v5e", "v5p", "v6e" or "7x"; None for what is none of these."""
  kind = device_kind()
  return next((generation for start, generation in _TPU_KINDS
               if kind.startswith(start)), None)


def on_accelerator(function, fallback, *args):
  """`function` of arrays; `fallback` where this is lowered for a CPU, as a
  process with an accelerator may do too."""
  return lax.platform_dependent(*args, cpu=fallback, default=function)
