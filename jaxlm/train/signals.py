"""Ends a run between steps when the process is asked to end."""
import os
import signal
import threading

import jax
from jax.experimental import multihost_utils


class Interrupted(KeyboardInterrupt):
  """A signal ended the run after its state was saved."""

  def __init__(self, signal_number: int, step: int):
    super().__init__(f"stopped by {signal.Signals(signal_number).name}; saved "
                     f"at step {step}, run again to continue")
    self.signal_number, self.step = signal_number, step

  @property
  def exit_status(self) -> int:
    """What a shell expects: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + self.signal_number


class Signals:
  """Takes note of the first SIGTERM or Ctrl-C; a second acts as ever.

  Outside the main thread, where Python allows no handlers, it notes none. With
  several processes jax takes note of SIGTERM to any of them, and tells all to
  stop at one step; Ctrl-C is passed on as that.
  """

  def __enter__(self) -> "Signals":
    self.received, self._before = 0, {}
    if threading.current_thread() is threading.main_thread():
      numbers = (signal.SIGTERM, signal.SIGINT)[jax.process_count() > 1:]
      self._before = {number: signal.signal(number, self._note)
                      for number in numbers}
    return self

  def stop(self, step: int) -> bool:
    """Whether to end before this step; all processes ask at every step."""
    if (jax.process_count() > 1
        and multihost_utils.reached_preemption_sync_point(step)):
      self.received = int(signal.SIGTERM)
    return self.received != 0

  def _note(self, number, frame):
    del frame
    self._restore()
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      self.received = int(number)

  def _restore(self):
    for number, handler in self._before.items():
      signal.signal(number, handler)
    self._before = {}

  def __exit__(self, *error):
    self._restore()
