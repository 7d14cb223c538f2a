"""How far an ablation is: bars on a terminal, lines now and then elsewhere."""
import contextlib
import dataclasses
import time

import rich.console
import rich.progress

LINE_SECONDS = 20


@dataclasses.dataclass(frozen=True)
class Job:
  """Something that is trained. flops: of all its steps."""
  arm: str
  label: str
  steps: int
  flops: float


class Estimate:
  """The time left, from what was done in this sitting.

  An arm that has begun goes on at its own seconds per FLOP; the others are
  expected to need the mean of those, and as long to compile.
  """

  def __init__(self, jobs: list[Job]):
    self._left = {job: job.flops for job in jobs}
    self._spent, self._done = {}, {}  # by arm: seconds and FLOPs of steps
    self._starts = {}  # by arm: seconds before the first job's first step
    self.total = sum(self._left.values())

  @property
  def fraction(self) -> float:
    return 1 - sum(self._left.values()) / self.total if self.total else 1.0

  def started(self, job: Job, seconds: float) -> None:
    self._starts.setdefault(job.arm, seconds)

  def worked(self, job: Job, steps_left: int, seconds: float) -> None:
    """`seconds` more brought the job to so many steps before its end."""
    left = job.flops * steps_left / job.steps
    self._spent[job.arm] = self._spent.get(job.arm, 0) + seconds
    self._done[job.arm] = self._done.get(job.arm, 0) + self._left[job] - left
    self._left[job] = left

  def skip(self, job: Job) -> None:
    self._left[job] = 0

  def seconds_left(self) -> float | None:
    """None before anything is known."""
    done = sum(self._done.values())
    if not done:
      return None
    mean = sum(self._spent.values()) / done
    waiting = {job.arm for job, left in self._left.items() if left}
    start = sum(self._starts.values()) / len(self._starts)
    return start * len(waiting - set(self._starts)) + sum(
        left * (self._spent[job.arm] / self._done[job.arm]
                if self._done.get(job.arm) else mean)
        for job, left in self._left.items())


class Progress:
  """Use as a context manager around the whole ablation."""

  def __init__(self, console: rich.console.Console, jobs: list[Job]):
    self._console, self._jobs = console, jobs
    self._estimate, self._finished = Estimate(jobs), 0
    self._live = console.is_terminal
    self._printed = time.monotonic()
    self._bars = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=24),
        rich.progress.TextColumn("{task.fields[text]}"),
        console=console, disable=not self._live)
    self._whole = self._bars.add_task(
        "whole ablation", total=1.0, text=f"0/{len(jobs)} runs")
    self._current = self._bars.add_task("", total=None, text="", visible=False)

  def __enter__(self):
    self._bars.start()
    return self

  def __exit__(self, *error):
    self._bars.stop()

  @contextlib.contextmanager
  def stage(self, text: str):
    """Something else than training; yields what shows how far it is."""
    self._show(text, None, "")
    if not self._live:
      self._line(text)
    yield lambda detail: self._show(text, None, detail)

  def skip(self, job: Job) -> None:
    """It was finished in an earlier sitting."""
    self._finished += 1
    self._estimate.skip(job)
    self._show_whole()

  @contextlib.contextmanager
  def running(self, job: Job):
    """Yields what `train` calls after each step."""
    begun = last = time.monotonic()
    first = True
    self._show(job.label, job.steps, "compiling")

    def on_step(step, metrics):
      nonlocal first, last
      now = time.monotonic()
      if first:
        self._estimate.started(job, now - begun)
      self._estimate.worked(job, job.steps - step, 0 if first else now - last)
      first, last = False, now
      rate = metrics.get("tokens_per_second")
      text = (f"step {step}/{job.steps}  loss {metrics['loss']:.3f}  "
              + (f"{rate:,.0f} tokens/s" if rate else ""))
      self._show(job.label, job.steps, text, step)
      self._show_whole()
      if not self._live and now - self._printed > LINE_SECONDS:
        self._line(f"{job.label}  {text}")

    yield on_step
    if first:  # it stopped at its first step, or had been finished before
      self._estimate.skip(job)
    else:
      self._estimate.worked(job, 0, time.monotonic() - last)
    self._finished += 1
    self._show_whole()
    if not self._live:
      self._line(f"{job.label}  done")

  def print(self, text: str) -> None:
    """A line that stays."""
    self._console.print(text, markup=False, highlight=False, soft_wrap=True)

  def _show(self, label, total, text, completed=0):
    self._bars.update(self._current, description=label, total=total,
                      completed=completed, text=text, visible=True)

  def _summary(self):
    left = self._estimate.seconds_left()
    text = f"{self._finished}/{len(self._jobs)} runs"
    return text if left is None else f"{text}, {_minutes(left)} left"

  def _show_whole(self):
    self._bars.update(self._whole, completed=self._estimate.fraction,
                      text=self._summary())

  def _line(self, text):
    self._printed = time.monotonic()
    self.print(f"{self._estimate.fraction:4.0%}  {text}  ({self._summary()})")


def _minutes(seconds: float) -> str:
  """4:05, 1:04:05."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return (f"{hours}:{minutes:02}:{seconds:02}" if hours
          else f"{minutes}:{seconds:02}")
