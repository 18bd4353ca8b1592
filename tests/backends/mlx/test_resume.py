"""kill -9 on MLX: the run ends in the bits of an undisturbed one."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("mlx.core", reason="these tests need mlx")
pytest.importorskip("mlx_lm", reason="these tests need mlx-lm")

from solollm.config import RunConfig
from solollm.horizon import updated
from solollm.resume_proof import Life, prove_resume, tiny_training


def small_training(folder: Path, steps: int, *, compiled: bool) -> RunConfig:
    """Packed rows in micro-batches of 4 and 2 through one block, saves every 4 steps, one sample at
    the end."""
    config = updated(tiny_training(folder, steps=steps), "data", seq_len=32)
    assert config.model.config is not None
    model = config.model.config.model_copy(update={"num_hidden_layers": 1})
    config = updated(config, "model", config=model)
    config = updated(config, "checkpoint", every_steps=4)
    config = updated(config, "eval", sample_every_steps=steps, sample_tokens=2)
    options = {"mlx": {"compile": compiled}}
    return config.model_copy(update={"backend": "mlx", "backend_options": options})


def prove(folder: Path, *, kills: int, steps: int, compiled: bool) -> None:
    config = small_training(folder, steps, compiled=compiled)
    for seed in (3, 4, 5):  # where the kills land is chance: now and then none proves enough
        seen: list[Life] = []
        runs = folder / str(seed)
        runs.mkdir()
        proof = prove_resume(
            config, runs, kills=kills, seed=seed, start_method="forkserver", on_life=seen.append
        )
        assert proof.is_equal, proof
        assert (proof.steps, len(proof.lives)) == (steps, kills)
        if proof.kills_in_save >= 1 and max(life.start_step for life in seen) > 0:
            return
    pytest.fail("no kill has landed in a save, or no life has gone on from a checkpoint")


def test_a_run_killed_five_times_equals_an_undisturbed_one(tmp_path: Path) -> None:
    """Guards against state that lives outside of a checkpoint: the order of a loaded tree, a
    counter on the device, a generator that the process seeds."""
    prove(tmp_path, kills=5, steps=24, compiled=False)


@pytest.mark.slow
def test_a_compiled_run_killed_twenty_times_equals_an_undisturbed_one(tmp_path: Path) -> None:
    """The same with everything compiled, as runs are by default."""
    prove(tmp_path, kills=20, steps=160, compiled=True)
