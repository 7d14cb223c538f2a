"""Compiling quickly, for tests that compute little."""
import functools

import jax

# For a function that runs once or a few times: LLVM optimizes little, which
# halves the time of a test that mostly compiles.
quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0})
