"""The notebooks run from a clean kernel, and are committed with outputs."""
import nbformat
import pytest

from colab import execute

LARGEST = 400_000  # bytes
PLOTS = 2  # at least

each = pytest.mark.parametrize("path", execute.NOTEBOOKS,
                               ids=lambda path: path.stem)


def code_cells(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell) -> set[str]:
  """What a cell shows; warnings differ between versions and do not count."""
  found = set()
  for output in cell.outputs:
    if output.output_type != "stream":
      found |= set(output.data)
    elif output.name == "stdout":
      found.add("stdout")
  return found


@each
def test_committed_outputs_are_of_one_clean_run(path):
  assert path.stat().st_size < LARGEST
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  cells = code_cells(notebook)
  assert [cell.execution_count for cell in cells] == list(
      range(1, len(cells) + 1))
  for cell in cells:
    assert "error" not in {output.output_type for output in cell.outputs}
  assert not execute.private(notebook)


@each
def test_it_opens_with_the_only_install_of_this_package(path):
  first, *rest = code_cells(nbformat.read(path, as_version=4))
  assert "'..[notebooks]'" in first.source
  assert not any("..[" in cell.source for cell in rest)


@each
@pytest.mark.slow
def test_it_runs_from_a_clean_kernel(path):
  committed = code_cells(nbformat.read(path, as_version=4))
  executed = code_cells(execute.execute(path))
  plots = 0
  for old, new in zip(committed, executed, strict=True):
    plots += "image/png" in kinds(new)
    # What is shown where there is no network, or no libtpu, is another thing.
    if "optional" not in old.metadata.get("tags", ()):
      assert kinds(new) == kinds(old), new.source
  assert plots >= PLOTS
