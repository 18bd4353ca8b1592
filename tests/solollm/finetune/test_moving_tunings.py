"""A tuning that moves: its samples, its adapter and its base arrive whole, and it goes on."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from solollm.checkpoint import Checkpoint, latest_checkpoint
from solollm.cli import main
from solollm.completion import open_model
from solollm.config import RunConfig
from solollm.errors import ConfigError, IntegrityError
from solollm.finetune.tuning import finetune
from solollm.packing import pack, unpack
from solollm.pretraining import resume
from solollm.pushing import Programs, push
from solollm.runs import Run
from solollm.testing.watching import StopAt

MakeConfig = Callable[..., RunConfig]
STEPS, CUT = 6, 3
KINDS = ("qlora", "dpo", "full")


@pytest.fixture(scope="module")
def runs(
    tuning: MakeConfig, dpo: MakeConfig, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Finished runs with a checkpoint half-way. Not to be written to, but for certificates."""
    home = tmp_path_factory.mktemp("here")
    configs = {
        "qlora": tuning("finetune.method=qlora", "optimizer.lr=0.01", "checkpoint.every_steps=3"),
        "dpo": dpo("finetune.method=lora", f"train.steps={STEPS}"),
        "full": tuning("finetune.method=full", "checkpoint.every_steps=3"),
    }
    for name, config in configs.items():
        finetune(config, home / name, backend="torch")
    return {name: home / name for name in configs}


@pytest.fixture(scope="module")
def archives(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each packed at its middle."""
    home = tmp_path_factory.mktemp("packed")
    for name, run in runs.items():
        pack(run, home / f"{name}.solo", step=CUT)
    return {name: home / f"{name}.solo" for name in runs}


def newest(run: Path) -> Checkpoint:
    checkpoint, _ = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    return checkpoint


def damage(path: Path, place: int) -> None:
    """Flip one bit of the file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def losses(run: Path) -> list[tuple[int, float]]:
    rows = Run.open(run).read_metrics()
    return [(row["step"], row["loss"]) for row in rows if row["kind"] == "train"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_moved_tuning_ends_like_one_that_stayed(
    runs: dict[str, Path], archives: dict[str, Path], base: Path, tmp_path: Path, kind: str
) -> None:
    """Guards the move as a whole: samples, reference, adapter, moments and base; other bits at the
    end, or a base that is only found where it lay."""
    content = archives[kind].read_bytes()
    for place in (runs[kind].parent, base):
        assert str(place).encode() not in content
    moved = unpack(archives[kind], tmp_path / "there")
    assert moved.missing == ()
    config = Run.open(moved.run).config
    assert config.data.corpus == "data"
    if kind == "full":
        assert config.train.init_from == ""
        assert not (tmp_path / "there" / "models").exists()
    else:
        (model,) = (tmp_path / "there" / "models").iterdir()
        assert config.train.init_from == f"../../models/{model.name}"
        assert not {"optimizer.safetensors", "manifest.json"} & {p.name for p in model.iterdir()}
    watcher = StopAt()
    result = resume(moved.run, sinks=[watcher])
    assert result.start_step == CUT
    assert watcher.of_kind("continuation_proven")[0]["result"] == "equal to the bit"
    assert newest(moved.run).certificate.digest == newest(runs[kind]).certificate.digest
    assert losses(moved.run) == losses(runs[kind])
    assert open_model(moved.run).is_chat


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("qlora", "data/train.safetensors"),
        ("qlora", "data/tokenizer/tokenizer.json"),
        ("qlora", "adapter_model.safetensors"),
        ("qlora", "optimizer.safetensors"),
        ("qlora", "/model.safetensors"),
        ("dpo", "data/reference/logprobs.safetensors"),
    ],
)
def test_a_changed_byte_is_refused_by_its_file(
    archives: dict[str, Path], tmp_path: Path, kind: str, place: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Guards an adapter over a base that is not quite its own, and rows that say something else."""
    changed = tmp_path / "changed.solo"
    shutil.copy(archives[kind], changed)
    with tarfile.open(changed) as opened:
        (entry,) = [m for m in opened if m.name.endswith(place)]
    with changed.open("r+b") as file:
        file.seek(entry.offset_data + entry.size - 5)
        byte = file.read(1)
        file.seek(entry.offset_data + entry.size - 5)
        file.write(bytes([byte[0] ^ 1]))
    assert main(["runs", "unpack", str(changed), str(tmp_path / "there")]) == 3
    assert entry.name in "".join(capsys.readouterr().err.split())
    assert not any((tmp_path / "there").rglob("*.json"))


def test_without_its_base(
    runs: dict[str, Path], archives: dict[str, Path], base: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Guards a large base that the other machine has: not sent, asked for, proven, and used."""
    small = tmp_path / "small.solo"
    words = ["runs", "pack", str(runs["qlora"]), str(small), "--step", str(CUT), "--without-base"]
    assert main(words) == 0
    assert small.stat().st_size < archives["qlora"].stat().st_size - 50_000
    assert main(["runs", "unpack", str(small), str(tmp_path / "there")]) == 0
    assert "--base" in capsys.readouterr().out
    run = tmp_path / "there" / "runs" / "qlora"
    with pytest.raises(ConfigError, match=r"base of .* is not at .*--base FOLDER"):
        resume(run)
    (tmp_path / "first" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"first is a run, .* is one of its checkpoints"):
        resume(run, base=tmp_path / "first")
    capsys.readouterr()
    assert main(["generate", str(run), "a"]) == 2  # which has no --base
    assert "`solollm resume` and `solollm export`" in capsys.readouterr().err
    # What is not there is no damaged file, and nothing is half written.
    assert main(["runs", "pack", str(run), str(tmp_path / "again.solo")]) == 2
    assert "is not at" in capsys.readouterr().err
    assert not (tmp_path / "again.solo").exists()
    assert main(["resume", str(run), "--base", str(base), "--json"]) == 0
    assert newest(run).certificate.digest == newest(runs["qlora"]).certificate.digest


def test_a_base_that_is_there_is_used_and_a_changed_one_refused(
    archives: dict[str, Path], tmp_path: Path
) -> None:
    """Guards two tunings of one base in one folder: the base is there once, and it is the base."""
    there = tmp_path / "there"
    unpack(archives["qlora"], there)
    (model,) = (there / "models").iterdir()
    weights = model / "model.safetensors"
    before = weights.stat().st_mtime_ns
    unpack(archives["dpo"], there)
    assert [place.name for place in (there / "models").iterdir()] == [model.name]
    assert weights.stat().st_mtime_ns == before
    shutil.rmtree(there / "runs" / "dpo")
    damage(weights, -3)
    with pytest.raises(ConfigError, match="is not the run's base"):
        unpack(archives["dpo"], there)
    assert not (there / "runs" / "dpo").exists()
    with pytest.raises(IntegrityError, match="not the base"):
        resume(there / "runs" / "qlora")


@pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync is not installed")
def test_a_pushed_tuning_goes_on_there(
    runs: dict[str, Path], archives: dict[str, Path], tmp_path: Path
) -> None:
    """Guards samples and base on the other way, and samples that are damaged where it arrives."""
    ssh = tmp_path / "ssh"  # to this very machine; a real one is in test_pushing
    ssh.write_text('#!/bin/sh\nwhile [ "$1" = -o ]; do shift 2; done\nshift\nexec sh -c "$*"\n')
    ssh.chmod(0o755)
    programs = Programs(ssh=(str(ssh),))
    run = unpack(archives["dpo"], tmp_path / "here").run
    there = tmp_path / "there"
    pushed = push(run, f"there:{there}", programs=programs)
    assert pushed.sent_files == pushed.num_files
    arrived = Path(pushed.run)
    samples = arrived / "data" / "train.safetensors"
    damage(samples, -1)
    again = push(run, f"there:{there}", programs=programs)
    assert again.sent_files == 1
    (model,) = (there / "models").iterdir()
    assert (model / "tokenizer.json").is_file()
    watcher = StopAt()
    assert resume(arrived, sinks=[watcher]).start_step == CUT
    assert watcher.of_kind("continuation_proven")[0]["result"] == "equal to the bit"
    assert newest(arrived).certificate.digest == newest(runs["dpo"]).certificate.digest


def test_a_base_that_changed_here_is_not_packed(archives: dict[str, Path], tmp_path: Path) -> None:
    """Guards an archive whose base belongs to another adapter."""
    run = unpack(archives["dpo"], tmp_path / "there").run
    (model,) = (tmp_path / "there" / "models").iterdir()
    weights = model / "model.safetensors"
    damage(weights, -3)
    with pytest.raises(IntegrityError, match="not the base"):
        pack(run, tmp_path / "again.solo")
    assert not (tmp_path / "again.solo").exists()
