"""Programs that several tests compile are compiled once."""
import types

import jax
import pytest

from jaxlm.train import train
import toy_training as toy


@pytest.fixture(scope="session")
def program_cache(tmp_path_factory):
  """A directory of compiled programs, this process's and its children's."""
  directory = tmp_path_factory.mktemp("programs")
  # Compiling these programs takes far longer than running them.
  options = {"jax_disable_most_optimizations": True,
             "jax_compilation_cache_dir": str(directory),
             "jax_persistent_cache_min_compile_time_secs": 0.2,
             "jax_persistent_cache_min_entry_size_bytes": -1}
  before = {name: jax.config.values[name] for name in options}
  for name, value in options.items():
    jax.config.update(name, value)
  yield directory
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory, program_cache):
  """An uninterrupted run: workdir, result, what on_step was told."""
  workdir, shown = tmp_path_factory.mktemp("whole"), []
  [result] = train(toy.DENSE, toy.TRAIN, toy.counting_data(), workdir,
                   seeds=(7,), on_step=lambda *told: shown.append(told))
  return types.SimpleNamespace(workdir=workdir, result=result, shown=shown)
