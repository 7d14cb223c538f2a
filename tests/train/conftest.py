"""Programs that several tests compile are compiled once."""
import types

import pytest

from jaxlm.train import train
from quick import jax_options
import toy_training as toy


@pytest.fixture(scope="session")
def program_directory(tmp_path_factory):
  return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def program_cache(program_directory):
  """A directory of compiled programs, this process's and its children's."""
  # Compiling these programs takes far longer than running them.
  with jax_options(jax_disable_most_optimizations=True,
                   jax_compilation_cache_dir=str(program_directory),
                   jax_persistent_cache_min_compile_time_secs=0.2,
                   jax_persistent_cache_min_entry_size_bytes=-1):
    yield program_directory


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, program_cache):
  """An uninterrupted run: workdir, result, what on_step was told."""
  workdir, shown = tmp_path_factory.mktemp("whole"), []
  [result] = train(toy.DENSE, toy.TRAIN, toy.counting_data(), workdir,
                   seeds=(7,), on_step=lambda *told: shown.append(told))
  return types.SimpleNamespace(workdir=workdir, result=result, shown=shown)
