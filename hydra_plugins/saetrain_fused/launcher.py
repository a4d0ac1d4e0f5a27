"""hydra/launcher=fused: the jobs of a saetrain sweep in one process, each batch read once.

Hydra looks for plugins in this namespace and nowhere else. The launcher composes all jobs and hands
them over together; what it means to train them is in `saetrain.sweep`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, filter_overrides, setup_globals
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict, read_write

# A plain mapping: Hydra imports plugins in a way in which dataclasses cannot be declared.
ConfigStore.instance().store(
    group="hydra/launcher",
    name="fused",
    node={"_target_": "hydra_plugins.saetrain_fused.launcher.FusedLauncher"},
    provider="saetrain",
)


class FusedLauncher(Launcher):
    """Calls `task_function.together` with number, overrides and composer of each job."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.config, self.context, self.task = config, hydra_context, task_function

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """One return per job; its value is the job's score, for sweepers that look for the best."""
        together = getattr(self.task, "together", None)
        if together is None:
            raise HydraException("hydra/launcher=fused trains SAEs: use it with saetrain -m …")
        setup_globals()
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
        jobs = [
            (number, tuple(filter_overrides(words)), self._composer(list(words), number))
            for words, number in zip(job_overrides, numbers, strict=True)
        ]
        values = together(jobs)
        return [
            _done(list(words), value) for words, value in zip(job_overrides, values, strict=True)
        ]

    def _composer(self, overrides: list[str], number: int) -> Callable[[], DictConfig]:
        def compose() -> DictConfig:
            config = self.context.config_loader.load_sweep_config(self.config, overrides)
            with open_dict(config):
                config.hydra.job.id = config.hydra.job.num = number
            HydraConfig.instance().set_config(config)  # for ${hydra:…} in the settings
            task = deepcopy(config)
            with read_write(task), open_dict(task):
                del task["hydra"]
            return task

        return compose


def _done(overrides: list[str], value: Any) -> JobReturn:
    ret = JobReturn(overrides=overrides, status=JobStatus.COMPLETED)
    ret.return_value = value
    return ret
