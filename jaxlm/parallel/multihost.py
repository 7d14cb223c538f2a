"""Several processes that run one program, each with its own devices."""
import atexit
import itertools
import json
import os
import subprocess
import sys

import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

_REMEDY = "Start all of them again: the run goes on from its last checkpoint"
_witness = None
_meetings = itertools.count()


def initialize(coordinator: str | None = None, num_processes: int | None = None,
               process_id: int | None = None, heartbeat_seconds: int = 60):
  """Joins the processes of this program, before jax computes anything.

  Under Slurm, on TPU slices, on GKE and under Open MPI no argument is needed;
  without them, on a machine that is none of these, there is one process, and
  so there is where jax has computed before.

  Args:
    coordinator: "HOST:PORT" of process 0.
    heartbeat_seconds: after which a process that gives no sign of life is
      given up, and the others end.

  Raises:
    ValueError: some but not all of the first three.
  """
  given = (coordinator, num_processes, process_id)
  if None in given and given != (None,) * 3:
    raise ValueError(
        f"coordinator={coordinator}, num_processes={num_processes}, "
        f"process_id={process_id}: give all three, or none where the "
        "processes find each other (Slurm, TPU slices, GKE)")
  try:
    jax.distributed.initialize(*given,
                               heartbeat_timeout_seconds=heartbeat_seconds)
  except (ValueError, RuntimeError) as error:
    # What jax says where it finds no cluster, and where it has computed.
    if coordinator is not None or not any(
        said in str(error) for said in ("coordinator_address", "before any")):
      raise
    return
  if is_several():
    _leave_last_words()


def _leave_last_words() -> None:
  """Says what to do if this process is killed, or ended by jax because another
  one was lost: neither leaves Python time to say it."""
  global _witness
  _witness = subprocess.Popen(
      ["sh", "-c", 'read -r goodbye || printf "%s\\n" "$0" >&2',
       f"error: {_who()} was ended from outside, most likely because another "
       f"process was lost: see what that one said last. {_REMEDY}"],
      stdin=subprocess.PIPE, start_new_session=True)
  atexit.register(_say_goodbye)


def _say_goodbye() -> None:
  if _witness is not None and not _witness.stdin.closed:
    _witness.communicate(b"goodbye\n")


def _who() -> str:
  return f"process {jax.process_index()} of {jax.process_count()}"


def is_several() -> bool:
  return jax.process_count() > 1


def is_main() -> bool:
  """Whether this process is the one that writes what all have to say."""
  return jax.process_index() == 0


def in_order(result):
  """The result of a program, as it is; of several processes on CPUs, waits.

  CPUs, unlike others, run two programs at once where neither needs the other.
  Their exchanges then may come in another order in another process, and wait
  for each other forever or take each other's bytes.
  """
  if is_several() and jax.default_backend() == "cpu":
    jax.block_until_ready(result)
  return result


def meet() -> None:
  """Waits for all processes, of which some may compile for long: an exchange
  between CPUs waits half a minute only."""
  if is_several():
    ocp.multihost.sync_global_processes(
        f"jaxlm meets {next(_meetings)}", timeout=3600,
        processes=set(range(jax.process_count())))


def everyone(value) -> list:
  """What each process passes, a JSON-able value, in their order.

  All have to call it, and none returns before all did.
  """
  if not is_several():
    return [value]
  content = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(content.size))
  # Few lengths, as each is a program of its own.
  padded = np.zeros(2 ** max(8, int(max(sizes) - 1).bit_length()), np.uint8)
  padded[:content.size] = content
  return [json.loads(part[:size].tobytes()) for part, size in
          zip(multihost_utils.process_allgather(padded), sizes)]


def lost(error: Exception) -> str:
  """What to say when a computation of all processes failed in this one."""
  return (f"{_who()}: {str(error).strip().splitlines()[0][:400]}. Another "
          f"process may have ended: see what it said. {_REMEDY}")


def leave(status: int) -> int:
  """Ends this process at once if others take part, who may be waiting for it:
  jax would wait for them in turn. Else returns the status."""
  if jax.distributed.is_initialized() and is_several():
    _say_goodbye()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  return status
