"""Compiling quickly, for tests that compute little."""
import contextlib
import functools

import jax
from jax.experimental.compilation_cache import compilation_cache

# For a function that runs once or a few times: LLVM optimizes little, which
# halves the time of a test that mostly compiles.
quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@contextlib.contextmanager
def jax_options(**options):
  """Within, jax has these options; what is done to others of them is undone.

  Whether and where compiled programs are kept is decided at the first
  compilation and then stands, whatever the options say: it is decided anew.
  """
  before = dict(jax.config.values)
  for name, value in options.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  try:
    yield
  finally:
    for name, value in before.items():
      if jax.config.values[name] != value:
        jax.config.update(name, value)
    compilation_cache.reset_cache()
