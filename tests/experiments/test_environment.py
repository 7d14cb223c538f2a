import platform

import jax

from experiments import environment


def test_versions_are_those_that_run():
  found = environment.versions()
  assert found["python"] == platform.python_version()
  assert found["jax"] == jax.__version__
  assert found["commit"]


def test_hardware_is_named():
  found = environment.hardware()
  assert found["platform"] == jax.devices()[0].platform
  assert found["cores"] >= 1 and found["device"]


def test_what_differs_between_sittings_is_kept():
  before = {"jax": "0.10.2", "cores": 2, "same": "x", "old": "y"}
  once = environment.merged(before, {"jax": "0.11.0", "cores": 4, "same": "x",
                                     "new": "z"})
  assert once == {"jax": "0.10.2, then 0.11.0", "cores": "2, then 4",
                  "same": "x", "old": "y", "new": "z"}
  assert environment.merged(once, {"jax": "0.11.0"})["jax"] == once["jax"]
