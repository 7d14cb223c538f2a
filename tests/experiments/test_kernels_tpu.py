"""The committed estimates of the TPU kernels: some are made again."""
import json

import pytest

from experiments.benchmarks import kernels_tpu, search_blocks

pytest.importorskip("libtpu", reason="Linux on x86 alone has libtpu")

TABLE = json.loads(kernels_tpu.TABLE.read_text())
AGAIN = {
    "v5e": ["ring of 128, decode", "window 128, backward"],
    "v5p": ["window 128, forward"],
    "v6e": ["window 128, forward", "MXFP4 experts, 16 rows"],
    "7x": ["ring of 128, decode"],
}


@pytest.mark.skipif(
    kernels_tpu.versions() != TABLE["versions"],
    reason=f"the estimates are of {TABLE['versions']}")
@pytest.mark.parametrize("generation", AGAIN)
def test_estimates_have_not_risen(generation):
  known = {row["kernel"]: row for row in TABLE["figures"]
           if row["generation"] == generation}
  for row in kernels_tpu.measure(AGAIN[generation], generation):
    # What has become faster belongs in the table too.
    assert row["cycles"] == pytest.approx(
        known[row["kernel"]]["cycles"], rel=0.05), row["kernel"]


# Alone in a program their operands are prefetched into VMEM until nothing is
# left for the kernel; at the published shapes, which are larger, they compile.
ABSENT = {("window 128, backward", "v5p"), ("MXFP4 experts, 512 rows", "v5p")}


def test_the_table_has_every_kernel_on_every_generation():
  rows = {(row["kernel"], row["generation"]) for row in TABLE["figures"]}
  assert rows | ABSENT == {
      (kernel, generation) for kernel in kernels_tpu.CASES
      for generation in kernels_tpu.tpu_static.GENERATIONS}


def test_shares_follow_from_the_cycles():
  for row in TABLE["figures"]:
    assert row == kernels_tpu.figure(row["kernel"], row["generation"],
                                     row["cycles"])


@pytest.mark.parametrize("name", kernels_tpu.CASES)
def test_sizes_to_search_are_known_and_none_twice(name):
  tried = search_blocks.candidates(name)
  assert len({json.dumps(sizes) for sizes in tried}) == len(tried) > 3
  case = kernels_tpu.CASES[name]
  options = case.options | {"blocks": tried[-1]}
  if case.grown:
    options |= {case.grown[0]: case.grown[1]}
  getattr(kernels_tpu, case.job)(**options)  # refuses sizes it does not know
