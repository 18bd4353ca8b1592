"""What a run is trained in: recorded, kept where it can be, compared where it cannot.

On the machine and backend that trained it so far a run keeps every setting that decides bits;
anywhere else micro-batch, precision and memory are planned anew for the same global batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from solollm.backend import Backend, Plan, TrainSession
from solollm.checkpoint import Checkpoint, Environment, list_checkpoints, open_checkpoint
from solollm.config import RunConfig
from solollm.errors import IntegrityError
from solollm.hardware import read_machine
from solollm.horizon import updated
from solollm.runs import Run
from solollm.strictfile import refused


class Recorded(NamedTuple):
    """Where a checkpoint was trained. `cpu` is the processor's name, "" where nobody noted it."""

    environment: Environment
    cpu: str

    @classmethod
    def of(cls, run: Run, checkpoint: Checkpoint) -> Recorded:
        """What the checkpoint and the run's lineage say of it."""
        parts = [p for p in run.read_lineage() if p["first_step"] <= checkpoint.step]
        noted = parts[-1]["environment"] if parts else {}
        cpu = noted.get("cpu", "") if isinstance(noted, Mapping) else ""
        return cls(checkpoint.state.environment, str(cpu))

    @classmethod
    def newest(cls, run: Run) -> Recorded | None:
        """Of the newest checkpoint that opens, its tensors unread; None where there is none."""
        for _, path in reversed(list_checkpoints(run.checkpoints)):
            with suppress(IntegrityError), closing(open_checkpoint(path, "sizes")) as checkpoint:
                return cls.of(run, checkpoint)
        return None

    @classmethod
    def parse(cls, entry: Mapping[str, Any], path: Path) -> Recorded:
        """From what `lineage_entry` wrote. Raises IntegrityError; `path` is named in it."""
        fields = {key: value for key, value in entry.items() if key != "cpu"}
        try:
            return cls(Environment.model_validate(fields), str(entry.get("cpu", "")))
        except ValidationError as error:
            raise refused(path, "environment", str(error.errors()[0]["msg"])) from error

    @property
    def is_same_machine(self) -> bool:
        """Whether that was on a machine like this one."""
        return self.cpu in ("", read_machine().cpu)

    def fits(self, backend: Backend) -> bool:
        """Whether `backend`, here, is what it was trained with."""
        place = (backend.name, backend.capabilities().device)
        return self.is_same_machine and place == (self.environment.backend, self.environment.device)

    def changes(self, now: Environment) -> list[str]:
        """What is not as it was, and may change bits."""
        before = {"cpu": self.cpu, **self.environment.model_dump(mode="json")}
        if not self.cpu:
            del before["cpu"]
        return [
            f"{key} was {before[key]}, is {value}"
            for key, value in lineage_entry(now).items()
            if key in before and before[key] != value
        ]


def environment_of(backend: Backend, plan: Plan, session: TrainSession) -> Environment:
    """What a session trains in."""
    capabilities = backend.capabilities()
    return Environment(
        backend=backend.name,
        device=capabilities.device,
        versions=dict(capabilities.versions),
        micro_batch_size=plan.micro_batch_size,
        compute_dtype=plan.compute_dtype,
        activation_checkpointing=plan.activation_checkpointing,
        world_size=session.world_size,
        settings=dict(session.settings),
    )


def lineage_entry(environment: Environment) -> dict[str, Any]:
    """What the lineage of a run says of steps trained here."""
    return {"cpu": read_machine().cpu, **environment.model_dump(mode="json")}


def for_here(config: RunConfig, recorded: Recorded, backend: Backend) -> RunConfig:
    """The config of a run that goes on: pinned to what it was trained in where that is possible,
    freed from what was chosen for another machine where not."""
    if recorded.fits(backend):
        return _as_recorded(config, recorded.environment)
    dtype, capabilities = config.train.compute_dtype, backend.capabilities()
    if dtype not in capabilities.train_dtypes:
        dtype = "auto"
    if not capabilities.paged_states:
        config = updated(config, "optimizer", paged=False)
    return updated(
        config, "train", micro_batch_size=None, activation_checkpointing=None, compute_dtype=dtype
    )


def _as_recorded(config: RunConfig, recorded: Environment) -> RunConfig:
    pinned = updated(
        config,
        "train",
        micro_batch_size=recorded.micro_batch_size,
        compute_dtype=recorded.compute_dtype,
        activation_checkpointing=recorded.activation_checkpointing,
    )
    options = {**config.backend_options.get(recorded.backend, {}), **recorded.settings}
    return pinned.model_copy(
        update={"backend_options": {**config.backend_options, recorded.backend: options}}
    )
