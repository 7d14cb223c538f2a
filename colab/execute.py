"""Executes notebooks and writes their outputs into them.

  python colab/execute.py [NOTEBOOK ...]

runs all beside this file, or those named, each from a new kernel of this
Python in an empty folder, on the CPU, and keeps of the outputs what is not of
this machine. The tests run them the same way.
"""
import argparse
import os
import pathlib
import re
import socket
import sys
import tempfile
import time

from ipykernel.kernelspec import write_kernel_spec
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
import nbclient
import nbformat

FOLDER = pathlib.Path(__file__).resolve().parent
ROOT = FOLDER.parent
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# For a whole notebook: it needs less than 300, but beside other tests longer.
SECONDS = 900
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python",
                   "name": "python3"},
    "language_info": {"name": "python"}}


def execute(path: pathlib.Path) -> nbformat.NotebookNode:
  """The notebook with new outputs; nothing is written.

  Raises:
    nbclient.exceptions.CellExecutionError: a cell raised.
    TimeoutError: it took longer than `SECONDS`.
  """
  notebook = nbformat.read(path, as_version=4)
  for cell in notebook.cells:
    if cell.cell_type == "code":
      cell.outputs, cell.execution_count = [], None
  deadline = time.monotonic() + SECONDS
  with tempfile.TemporaryDirectory() as folder:
    write_kernel_spec(os.path.join(folder, "kernels", "python3"))
    specs = KernelSpecManager(kernel_dirs=[os.path.join(folder, "kernels")])
    work = os.path.join(folder, "work")
    os.mkdir(work)
    nbclient.NotebookClient(
        notebook, AsyncKernelManager(kernel_spec_manager=specs),
        resources={"metadata": {"path": work}}, record_timing=False,
        coalesce_streams=True,
        timeout_func=lambda cell: max(1, deadline - time.monotonic()),
    ).execute(cleanup_kc=True, env=_environment())
  return _clean(notebook)


def private(notebook) -> list[str]:
  """What the outputs tell of the machine they were made on."""
  outputs = [output for cell in notebook.cells
             for output in cell.get("outputs", ())]
  text = "\n".join([
      *(output.get("text", "") for output in outputs),
      *(str(data) for output in outputs
        for kind, data in output.get("data", {}).items()
        if not kind.startswith("image/"))])
  return [*re.findall(r"(?<![\w.~/])/(?:[\w.+-]+/)+[\w.+-]*", text),
          *re.findall(rf"\b{re.escape(socket.gethostname())}\b", text)]


def _environment() -> dict[str, str]:
  """This checkout and this Python's commands come first; no accelerator."""
  paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
  commands = [os.path.dirname(sys.executable), os.environ["PATH"]]
  return {**os.environ, "PYTHONPATH": os.pathsep.join(paths),
          "PATH": os.pathsep.join(commands), "JAX_PLATFORMS": "cpu"}


def _clean(notebook):
  notebook.metadata = nbformat.from_dict(METADATA)
  for i, cell in enumerate(notebook.cells):
    cell.id = f"cell-{i}"
    cell.metadata = nbformat.from_dict(
        {"tags": cell.metadata.tags} if "tags" in cell.metadata else {})
    if cell.cell_type == "code":
      # Progress bars, with their times, and warnings.
      cell.outputs = [output for output in cell.outputs
                      if output.get("name") != "stderr"]
      for output in cell.outputs:
        if "metadata" in output:
          output.metadata = nbformat.from_dict({})
  return notebook


def main():
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("notebooks", nargs="*", type=pathlib.Path,
                      default=NOTEBOOKS, metavar="NOTEBOOK")
  for path in parser.parse_args().notebooks:
    start = time.monotonic()
    notebook = execute(path)
    if found := private(notebook):
      sys.exit(f"{path}: its outputs name {found}: print less, nothing is "
               "written")
    nbformat.write(notebook, path)
    print(f"{path}: {time.monotonic() - start:.0f} s, "
          f"{path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
  main()
