"""What an ablation ran on: versions of the code, and the hardware."""
import importlib.metadata
import os
import pathlib
import platform
import subprocess

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def versions() -> dict[str, str]:
  """Of Python, of the packages that compute, and the commit of this code."""
  found = {"python": platform.python_version()}
  found |= {name: importlib.metadata.version(name) for name in PACKAGES}
  return found | {"commit": _commit()}


def _commit() -> str:
  """With a + when files differ from it; "unknown" outside a clone."""
  root = pathlib.Path(__file__).parent.parent
  def git(*arguments):
    return subprocess.run(
        ("git", "-C", str(root), *arguments), check=True, text=True,
        capture_output=True).stdout.strip()
  try:
    # An installed copy may lie inside another project's clone.
    if pathlib.Path(git("rev-parse", "--show-toplevel")) != root.resolve():
      return "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
  except (OSError, subprocess.CalledProcessError):
    return "unknown"


def hardware() -> dict[str, str | int]:
  device = jax.devices()[0]
  return {
      "device": device.device_kind if device.platform != "cpu" else _cpu_name(),
      "platform": device.platform,
      "devices": jax.device_count(),
      "cores": len(os.sched_getaffinity(0)) if hasattr(
          os, "sched_getaffinity") else os.cpu_count() or 1,
      "memory_gib": round(_memory_bytes() / 2 ** 30),
      "system": f"{platform.system()} {platform.machine()}",
  }


def _cpu_name() -> str:
  try:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
      if line.startswith("model name"):
        return line.partition(":")[2].strip()
  except OSError:
    pass
  return platform.processor() or platform.machine()


def _memory_bytes() -> int:
  try:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  except (AttributeError, ValueError, OSError):
    return 0


def merged(before: dict, now: dict) -> dict:
  """Both, where they differ: what several sittings ran on."""
  def both(old, new):
    sittings = str(old).split(", then ")
    return old if str(new) == sittings[-1] else f"{old}, then {new}"
  return {name: both(before[name], now[name]) if name in before and name in now
          else before.get(name, now.get(name)) for name in {**before, **now}}
