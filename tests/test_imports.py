"""Imports go one way: pallas_kernels <- jaxlm <- experiments."""
import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FLAGS = ("experiments", "absl", "ml_collections")
TORCH = ("torch", "transformers")


def imports(path: pathlib.Path) -> set[str]:
  """Dotted names a file imports anywhere in it, inside functions too."""
  package = path.relative_to(ROOT).with_suffix("").parts[:-1]
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      above = package[:len(package) - node.level + 1] if node.level else ()
      module = ".".join([*above, *filter(None, [node.module])])
      names |= {f"{module}.{alias.name}" for alias in node.names}
  return names


def files(*rooms: str) -> list[pathlib.Path]:
  return [path for room in rooms for path in
          ([ROOT / room] if room.endswith(".py")
           else sorted((ROOT / room).rglob("*.py")))]


def starts_with(name: str, packages) -> bool:
  return any(name == p or name.startswith(p + ".") for p in packages)


def assert_only(rooms, allowed):
  for path in files(*rooms):
    wrong = [name for name in imports(path) if not starts_with(name, allowed)]
    assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def assert_none(rooms, refused):
  for path in files(*rooms):
    wrong = [name for name in imports(path) if starts_with(name, refused)]
    assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_kernels_import_jax_alone():
  # And what jax itself cannot be installed without.
  assert_only(["pallas_kernels"], ("pallas_kernels", "jax", "numpy",
                                   "ml_dtypes", *sys.stdlib_module_names))


def test_config_imports_the_standard_library_alone():
  assert_only(["jaxlm/config.py", "jaxlm/config_dict.py"],
              sys.stdlib_module_names)


def test_the_library_has_no_flags_and_no_torch():
  assert_none(["jaxlm"], (*FLAGS, *TORCH, "colab", "tests"))


def test_the_model_knows_no_family_and_no_training():
  assert_none(["jaxlm/model"], tuple(
      f"jaxlm.{room}" for room in ("families", "convert", "train", "data",
                                   "decode", "plan", "cli")))


def test_training_knows_no_family():
  assert_none(["jaxlm/train", "jaxlm/data"],
              ("jaxlm.families", "jaxlm.convert", "jaxlm.decode"))


def test_experiments_need_no_notebook_and_no_test():
  assert_none(["experiments"], ("colab", "tests"))


@pytest.mark.parametrize("source, name", [
    ("import absl.flags", "absl.flags"),
    ("def f():\n  from jaxlm import families", "jaxlm.families"),
    ("from . import families", "jaxlm.model.families"),
    ("from ..families import gpt2", "jaxlm.families.gpt2"),
])
def test_every_form_of_import_is_seen(source, name, tmp_path, monkeypatch):
  monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
  path = tmp_path / "jaxlm" / "model" / "some.py"
  path.parent.mkdir(parents=True)
  path.write_text(source)
  assert imports(path) == {name}


def test_rooms_are_where_they_are_looked_for():
  for room in ("pallas_kernels", "jaxlm", "jaxlm/model", "jaxlm/train",
               "jaxlm/data", "experiments"):
    assert files(room), room
