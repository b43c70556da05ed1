"""The denoising loop of one device: it admits jobs between two steps, and takes the steps of all of them together.

    drop canceled jobs -> admit while there is room -> one step of every group -> decode and save what is done

Pictures of different people, prompts, strengths and numbers of steps share a pass of the denoiser as soon as their
latents have the same size; pictures of other sizes form groups of their own, which take steps in turn. One thread runs
the loop; another one encodes and writes finished pictures. If memory does not suffice, a step is split into smaller
passes. An error that one job causes ends that job only.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from imagine.pipeline.drawing import Drawing
from imagine.pipeline.stepping import Denoising, Stepper
from imagine.serving.settings import ServeSettings
from imagine.serving.store.records import Job
from imagine.serving.store.store import Store
from imagine.serving.worker.failures import DeviceLostError, describe, is_device_lost, is_out_of_memory
from imagine.serving.worker.loading import preset_arguments
from imagine.serving.worker.requests import Reader
from imagine.serving.worker.results import Results
from imagine.serving.worker.short_jobs import run_short_job
from imagine.serving.worker.whole_calls import CanceledError, draw_whole
from imagine.serving.worker_counts import Counts

LOG = logging.getLogger("imagine.serving")

IDLE = 0.03  # seconds between looks at an empty queue
LOOK = 0.05  # at most so often is the queue looked at while pictures are drawn
REPORT = 0.25  # at most so often is progress stored


@dataclass(eq=False)
class Work:
    """One claimed job while it is drawn: its drawing, and the Denoising that the drawing waits for."""

    job: Job
    drawing: Drawing
    iterator: Iterator[Denoising]
    run: Denoising
    shared: int = 1  # the most pictures with which it shared a step
    reported: tuple[str, int] = ("", -1)
    previewed: int = 0

    @property
    def pictures(self) -> int:
        return len(self.run.latents)


@dataclass(eq=False)
class Group:
    """Work whose pictures have the same size. `most` is how many of them fit into one pass; None: no limit is known."""

    stepper: Stepper
    work: list[Work] = field(default_factory=list)
    most: int | None = None


class Loop:
    """Claims jobs for one pipeline and draws them until it is stopped."""

    def __init__(self, pipe: Any, store: Store, settings: ServeSettings, worker: str, counts: Counts) -> None:
        self.pipe, self.store, self.settings, self.worker, self.counts = pipe, store, settings, worker, counts
        defaults = {} if settings.base is None else preset_arguments(settings.base)
        self.reader, self.results = Reader(pipe, store, defaults), Results(pipe, store, counts, settings.marks)
        self.groups: list[Group] = []
        self.last_tick = time.monotonic()
        self._saver = ThreadPoolExecutor(1, "imagine-saver")
        self._saving: list[Future[None]] = []
        self._next_look = self._next_report = 0.0

    @property
    def busy(self) -> bool:
        return any(group.work for group in self.groups)

    def run(self, stop: Callable[[], bool], drain: float = 0.0, wake: "threading.Event | None" = None) -> None:
        """Draw until `stop` returns True, then for at most `drain` seconds what was begun; give back the rest.

        Raises DeviceLostError if the device no longer works; the jobs then keep their lease, and count this attempt.
        """
        wake = wake or threading.Event()
        while not stop():
            if not self.tick():
                wake.wait(IDLE)
        end = time.monotonic() + drain
        while self.busy and time.monotonic() < end:
            self.tick(admit=False)
        self._saver.shutdown(wait=True)
        self.store.jobs.release(self.worker, self.settings.max_attempts, counted=False)

    def tick(self, admit: bool = True) -> bool:
        """Do one round of the loop; return whether there was anything to do."""
        self.last_tick = now = time.monotonic()
        for saved in [each for each in self._saving if each.done()]:
            self._saving.remove(saved)
            saved.result()  # an error of the saver itself, which is ours
        if now >= self._next_look or not self.busy:
            self._next_look = now + LOOK
            self._drop_canceled()
            if admit:
                self._admit()
        for group in self.groups:
            self._step(group)
        self.groups = [group for group in self.groups if group.work]
        self._report()
        return self.busy

    # --- admitting and dropping -------------------------------------------------------------------------------------

    def _admit(self) -> None:
        held = [work for group in self.groups for work in group.work]
        room = self.settings.max_batch - sum(work.pictures for work in held)
        for job in self.store.jobs.claim(self.worker, max(0, room), self.settings.lease, empty=not held):
            self._guarded(job, lambda job=job: self._begin(job))  # type: ignore[misc]

    def _begin(self, job: Job) -> None:
        if job.kind != "pictures":
            run_short_job(job, self.pipe, self.reader, self.store)
            self.results.clean_up(job, "succeeded")
            return
        if not hasattr(self.pipe, "drawing"):
            self._draw_whole(job)
            return
        drawing = self.reader.drawing(job)
        iterator = iter(drawing)
        self._join(Work(job, drawing, iterator, next(iterator)))

    def _draw_whole(self, job: Job) -> None:
        """Draw a job of a public base, whose pipeline cannot share steps, and hand over the result."""
        reported = 0.0

        def after_step(step: int, steps: int) -> bool:
            nonlocal reported
            now = time.monotonic()
            self.counts.step(job.count, now - self.last_tick)
            self.last_tick = now
            if now - reported < REPORT and step < steps:
                return True
            reported = now
            self.store.jobs.report([(job, "denoising", step, steps)], [])
            return (job.id, job.attempt) not in self.store.jobs.canceled_of(self.worker)

        arguments = self.reader.whole_call(job)
        self.last_tick = time.monotonic()
        try:
            out = draw_whole(self.pipe, arguments, after_step)
        except CanceledError:
            self.store.jobs.end_canceled(job)
            self.results.clean_up(job, "canceled")
            return
        if job.request.get("previews"):
            out.notes.append("A public base shows no previews.")
        self.counts.decoded += job.count
        self._saving.append(self._saver.submit(self.results.save, job, out, job.count))

    def _join(self, work: Work) -> None:
        """Add work to the group of its size, or to a new one."""
        for group in self.groups:
            if group.work and group.work[0].run.fits(work.run):
                group.work.append(work)
                return
        self.groups.append(Group(Stepper(self.pipe), [work]))

    def _drop_canceled(self) -> None:
        if not self.busy:
            return
        canceled = self.store.jobs.canceled_of(self.worker)
        for group in self.groups:
            for work in [each for each in group.work if (each.job.id, each.job.attempt) in canceled]:
                group.work.remove(work)
                self.store.jobs.end_canceled(work.job)
                self.results.clean_up(work.job, "canceled")

    def _guarded(self, job: Job, do: Callable[[], None]) -> bool:
        """Do something for one job; if that raises, fail the job and return False."""
        try:
            do()
        except Exception as error:
            if is_device_lost(error):
                raise DeviceLostError(str(error)) from error
            if is_out_of_memory(error):
                _free_memory()
            self.results.fail(job, *describe(error))
            return False
        return True

    # --- steps ------------------------------------------------------------------------------------------------------

    def _step(self, group: Group) -> None:
        """Take one step of a group, and continue the drawings whose Denoising is done."""
        if not group.work:
            return
        pictures = sum(work.pictures for work in group.work)
        started = time.monotonic()
        if self._try_together(group, pictures):
            self.counts.step(pictures, time.monotonic() - started)
        for work in group.work:
            work.shared = max(work.shared, min(pictures, group.most or pictures))
        for work in [each for each in group.work if each.run.done]:
            group.work.remove(work)
            self._guarded(work.job, lambda work=work: self._continue(work))  # type: ignore[misc]

    def _try_together(self, group: Group, pictures: int) -> bool:
        """Take one step of all work of a group; if that fails, in smaller passes, and at last of each alone."""
        while True:
            try:
                group.stepper.step([work.run for work in group.work], group.most)
                return True
            except Exception as error:
                if is_device_lost(error):
                    raise DeviceLostError(str(error)) from error
                if not is_out_of_memory(error) or group.most == 1:
                    break
                self.counts.out_of_memory += 1
                group.most = max(1, min(pictures, group.most or pictures) // 2)
                LOG.warning("out of memory in a step", extra={"pictures": pictures, "retry_with": group.most})
            _free_memory()  # outside the handler, whose error keeps the tensors of the failed step
        _free_memory()
        for work in list(group.work):
            if not self._guarded(work.job, lambda work=work: group.stepper.step([work.run], 1)):  # type: ignore[misc]
                group.work.remove(work)
        return False

    def _continue(self, work: Work) -> None:
        """Decode the pictures of a Denoising that is done, and join with the next one, or hand over the result."""
        started = time.monotonic()
        following = next(work.iterator, None)
        self.counts.decoded += work.pictures
        self.counts.decode_seconds += time.monotonic() - started
        if following is not None:
            work.run = following
            self._join(work)
            return
        self._saving.append(self._saver.submit(self.results.save, work.job, work.drawing.result(), work.shared))

    # --- progress ---------------------------------------------------------------------------------------------------

    def _report(self) -> None:
        """Store the progress of all work, and a preview where one is wanted, at most every REPORT seconds."""
        now = time.monotonic()
        if now < self._next_report or not self.busy:
            return
        self._next_report = now + REPORT
        held = [work for group in self.groups for work in group.work]
        changed = [work for work in held if (work.run.stage, work.run.number) != work.reported]
        previews = [(work.job, preview) for work in changed if (preview := self._preview(work)) is not None]
        for work in changed:
            work.reported = (work.run.stage, work.run.number)
        if changed:
            self.store.jobs.report(
                [(work.job, work.run.stage, work.run.number, work.run.steps) for work in changed], previews
            )

    def _preview(self, work: Work) -> dict[str, Any] | None:
        """Return a preview of the first pass if as many steps are done as call for the next one."""
        wanted = int(work.job.request.get("previews") or 0)
        due = (work.previewed + 1) * work.run.steps / (wanted + 1)
        if work.previewed >= wanted or work.run.number < due or work.run.stage != "denoising":
            return None
        work.previewed += 1
        try:
            return self.results.preview(work.run.clean_estimate(), work.previewed - 1)
        except Exception as error:  # a preview is not worth a job
            LOG.warning("no preview", extra={"job": work.job.id, "reason": type(error).__name__})
            return None


def _free_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
