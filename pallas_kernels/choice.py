"""Which implementation of an operation is taken, and where it falls back.

An operation holds its implementations as modules by name; "xla" is always
there and supports everything.
"""
import functools

from pallas_kernels import platforms


def choose(implementations: dict, preferred, implementation: str, args,
           others=()) -> str:
  """The implementation named, if it supports `args`, or for "auto" the first
  of `preferred` that does.

  Args:
    others: further names that the operation takes care of itself.

  Raises:
    ValueError: there is none of this name.
    NotImplementedError: the one named does not support these.
  """
  if implementation == "auto":
    return next(name for name in (*preferred, "xla")
                if implementations[name].unsupported(*args) is None)
  if implementation not in implementations:
    raise ValueError(f"implementation={implementation!r}: use one of "
                     f"{('auto', *implementations, *others)}")
  if reason := implementations[implementation].unsupported(*args):
    raise NotImplementedError(f"implementation={implementation!r}: {reason}")
  return implementation


def run(implementations: dict, function: str, name: str, auto: bool, *args,
        **kwargs):
  """Calls a function of the implementation chosen; of an automatic choice for
  an accelerator XLA's, where the program is lowered for the CPU."""
  chosen, fallback = (
      functools.partial(getattr(implementations[i], function), **kwargs)
      for i in (name, "xla"))
  if not auto or name == "xla":
    return chosen(*args)
  return platforms.on_accelerator(chosen, fallback, *args)
