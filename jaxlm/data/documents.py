"""Documents, and choices among them that depend on their names alone."""

import dataclasses
import hashlib
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Document:
  """One piece of text and a name that does not depend on the machine."""

  name: str
  text: str

  @property
  def num_bytes(self) -> int:
    return len(self.text.encode("utf-8"))


def split_by_file(
    documents: Sequence[Document],
    heldout_fraction: float = 0.05,
    seed: int = 0,
) -> tuple[list[Document], list[Document]]:
  """Splits into (train, heldout) by a hash of each name.

  A document's side depends on its own name and `seed` alone: adding or
  removing others moves nothing.
  """
  if not 0 < heldout_fraction < 1:
    raise ValueError(
        f"heldout_fraction={heldout_fraction} must lie between 0 and 1"
    )
  train: list[Document] = []
  heldout: list[Document] = []
  for document in documents:
    held = _uniform(f"split/{seed}/{document.name}") < heldout_fraction
    (heldout if held else train).append(document)
  if not train or not heldout:
    raise ValueError(
        f"heldout_fraction={heldout_fraction} with seed={seed} leaves "
        f"{len(train)} training and {len(heldout)} held-out of "
        f"{len(documents)} documents: use more files, another seed or a "
        "fraction nearer to a half"
    )
  return train, heldout


def sample(
    documents: Sequence[Document],
    *,
    max_documents: int | None = None,
    max_bytes: int | None = None,
) -> list[Document]:
  """At most so many documents and bytes, spread over the source.

  Documents are considered in the order of a hash of their names and kept when
  they fit; the result is in the source's order.
  """
  if max_documents is None and max_bytes is None:
    return list(documents)
  order = sorted(
      range(len(documents)),
      key=lambda i: _uniform(f"sample/{documents[i].name}"),
  )
  kept, num_bytes = [], 0
  for i in order:
    if max_documents is not None and len(kept) >= max_documents:
      break
    size = documents[i].num_bytes
    if max_bytes is None or num_bytes + size <= max_bytes:
      kept.append(i)
      num_bytes += size
  if not kept:
    raise ValueError(
        f"max_documents={max_documents}, max_bytes={max_bytes} leave none of "
        f"{len(documents)} documents: raise them"
    )
  return [documents[i] for i in sorted(kept)]


def _uniform(key: str) -> float:
  """A number in [0, 1) that depends on the key alone."""
  digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
  return int.from_bytes(digest[:8], "big") / 2**64
