"""A trace of some steps, for chrome://tracing or https://ui.perfetto.dev."""

from __future__ import annotations

import logging
import os
import tempfile

import torch

from models.training.run_folder import RunFolder

log = logging.getLogger("ingot")


class Profiler:
    """Records the steps of a range on rank 0 and writes ``profile/steps-A-B.json`` into the run's folder.

    Args:
        run: the run's folder.
        steps: half-open range of steps; None records nothing.
        rank: this process's rank.
    """

    def __init__(self, run: RunFolder, steps: tuple[int, int] | None, rank: int) -> None:
        self.run, self.steps = run, steps if rank == 0 else None
        self.end = steps[1] if steps is not None else None
        self.profile: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        """Begin when ``step`` is the first one of the range."""
        if self.steps is not None and step == self.steps[0] and self.profile is None:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.profile = torch.profiler.profile(activities=activities)
            self.profile.start()

    def ends_at(self, step: int) -> bool:
        """Whether the trace is to be written after ``step`` steps; the same on all ranks."""
        return step == self.end

    def after(self, step: int) -> None:
        """End and write the trace when ``step`` steps are done and they were the range's last."""
        if self.ends_at(step):
            self.stop()

    def stop(self) -> None:
        """Write what was recorded, if anything was."""
        if self.profile is None:
            return
        profile, self.profile = self.profile, None
        profile.stop()
        name = f"profile/steps-{self.steps[0]}-{self.steps[1]}.json"
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "trace.json")
            try:
                profile.export_chrome_trace(path)
                with open(path) as trace:
                    self.run.write_text(name, trace.read())
            except OSError as error:
                log.warning("profile: %s cannot be written: %s", self.run.uri(name), error)
            else:
                log.info("profile: %s", self.run.uri(name))
