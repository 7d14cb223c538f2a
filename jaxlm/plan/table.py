"""Plans for people to read, and for programs."""
import dataclasses

import rich.table
from rich.markup import escape

from jaxlm.plan.devices import GIB
from jaxlm.plan.plan import Plan
from jaxlm.plan.search import Search

SHOWN = 5


def as_json(plan: Plan) -> dict:
  return {**dataclasses.asdict(plan), "layout": plan.layout,
          "wire_bytes": plan.wire_bytes}


def show(console, plan: Plan):
  """One plan as a table of two columns, then what to beware of."""
  table = rich.table.Table(show_header=False, title=escape(
      f"{plan.model} {plan.task} on {plan.slice} ({plan.devices} devices), "
      f"{plan.layout}"), title_justify="left")
  table.add_column(style="bold")
  table.add_column()
  for name, lines in _sections(plan):
    table.add_row(name, escape("\n".join(lines)))
  console.print(table)
  for warning in plan.warnings:
    console.print(f"[yellow]note:[/yellow] {escape(warning)}", soft_wrap=True)


def _sections(plan: Plan):
  yield "step", [
      f"{plan.batch} sequences of {plan.seq} tokens"
      + (" in the cache, one new token each" if plan.task == "decode" else ""),
      f"weights {plan.weights}, activations bf16" + (
          ", AdamW's moments float32, layers computed again (remat)"
          if plan.task == "train" else "")]
  parts = [*plan.state.items(), ("padding, inputs, outputs", plan.other),
           ("activations, temporaries", plan.temporaries)]
  yield "HBM a device", [
      *(f"{size / GIB:9.3f} GiB {name}" for name, size in parts if size),
      f"{plan.total / GIB:9.3f} GiB of {plan.hbm / GIB:.2f}: "
      + ("fits" if plan.fits else "DOES NOT FIT")]
  lines = [f"{plan.useful_flops:9.3g} useful",
           f"{plan.executed_flops:9.3g} executed (useful/executed "
           f"{plan.useful_flops / plan.executed_flops:.2f})"]
  lines += [f"{flops:9.3g} of these in kernel {name}"
            for name, flops in plan.kernel_flops.items()]
  yield "FLOPs a device", lines
  rows = sorted(plan.wire, key=lambda row: -row["bytes"])
  small = [row for row in rows if row["bytes"] < 2 ** 20]
  lines = [f"{_bytes(row['bytes'])} {row['kind']} over {row['axes']}" + (
      f", {row['times']:.0f} times" if "times" in row else "")
           for row in rows if row not in small]
  if small:
    lines.append(f"{_bytes(sum(row['bytes'] for row in small))} in "
                 f"{len(small)} more kinds")
  yield "received a device", lines + [f"{_bytes(plan.wire_bytes)} in all"]
  yield "time at least", _times(plan)
  how = [plan.method]
  how += [f"{name} {seconds:.1f} s" for name, seconds in plan.seconds.items()]
  if plan.host_memory:
    how.append(f"{plan.host_memory / GIB:.1f} GiB of host memory")
  how += [f"{name} {version}" for name, version in plan.versions.items()]
  yield "made by", [", ".join(how)]


def _times(plan: Plan) -> list[str]:
  found = plan.bounds
  lines = [f"{_seconds(found['compute'])} computing",
           f"{_seconds(found['memory'])} reading and writing what stays"]
  lines += [f"{_seconds(seconds)} receiving over {axes}"
            for axes, seconds in found["wire"].items() if seconds > 1e-6]
  for name, text in (("overlapped", "a step if all overlaps"),
                     ("alone", "a step if nothing sent overlaps")):
    lines.append(f"{_seconds(found[name])} {text}: MFU "
                 f"{found[f'mfu_{name}']:.2f}, "
                 f"{plan.tokens / found[name]:,.0f} tokens/s")
  return lines


def show_search(console, search: Search):
  """The best layouts, and why others are none."""
  table = rich.table.Table(title="layouts, the best first (estimates)",
                           title_justify="left")
  for column in ("layout", "HBM GiB", "received GiB", "s a step", "MFU"):
    table.add_column(column, overflow="fold")
  for plan in search.plans[:SHOWN]:
    found = plan.bounds
    table.add_row(
        plan.layout, f"{plan.total / GIB:.1f} of {plan.hbm / GIB:.1f}",
        f"{plan.wire_bytes / GIB:.3g}",
        f"{found['overlapped']:.3g}..{found['alone']:.3g}",
        f"{found['mfu_overlapped']:.2f}..{found['mfu_alone']:.2f}")
  if search.plans:
    console.print(table)
  if left := len(search.plans) - SHOWN:
    if left > 0:
      console.print(f"{left} more fit.")
  for reason, layouts in search.refused.items():
    some = "; ".join(layouts[:SHOWN])
    more = f" and {len(layouts) - SHOWN} more" if len(layouts) > SHOWN else ""
    console.print(escape(f"not {some}{more}: {reason}"), soft_wrap=True)


def _bytes(size: float) -> str:
  if size >= 2 ** 30 / 100:
    return f"{size / GIB:9.3f} GiB"
  return f"{size / 2 ** 20:9.3f} MiB"


def _seconds(seconds: float) -> str:
  if seconds >= 0.1:
    return f"{seconds:9.3f} s"
  return f"{1e3 * seconds:9.3f} ms"
