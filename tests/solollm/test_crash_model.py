"""Power cuts: whatever state one leaves, what was acknowledged is there and proven.

Operations are recorded on a `RecordingDisk`, replayed into every state that `CrashModel` allows
after each of them, and each state is opened as a resume would open it. Then one flush after
another is left out of the log: a test that lets such a mutant pass tests nothing.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path

import pytest

from solollm import durable
from solollm.architecture import ModelConfig
from solollm.certificate import Continuation
from solollm.checkpoint import add_continuation, list_checkpoints, open_checkpoint, prune
from solollm.errors import IntegrityError
from solollm.testing.crashes import CrashModel, Tree, choices, write_tree
from solollm.testing.disks import Event, RecordingDisk
from solollm.testing.snapshots import save_arrays

MODEL = ModelConfig(
    vocab_size=4, hidden_size=2, intermediate_size=2, num_hidden_layers=1,
    num_attention_heads=1, num_key_value_heads=1, head_dim=2, max_position_embeddings=8,
)  # fmt: skip
TEMPORARY = re.compile(r"\.tmp-[^/]*/")
UNFINISHED = "never finished"

Found = Mapping[Hashable, Hashable]  # what recovery finds in a state
Promise = dict[Hashable, set[Hashable]]  # what it must find, and what it may


class Walk:
    """Walks the crash states of a recorded scenario and judges each by `recover`."""

    def __init__(self, root: Path, scratch: Path, recover: Callable[[Path], Found]) -> None:
        self.disk = RecordingDisk()
        self.num_states = 0
        self._root, self._scratch, self._recover = root, scratch, recover
        self._start = scratch / "start"
        shutil.copytree(root, self._start)
        self._memory: dict[Tree, Found] = {}

    def broken_promise(self, *, without: int | None = None, num_random: int = 0) -> str:
        """The first promise that a cut breaks; empty if none does. `without` drops one event.

        A mark (key, values) promises that from here on `key` is found with one of the values;
        values that contain None allow that it is not found.
        """
        model, promise = CrashModel(self._start), Promise()
        for number, event in enumerate(self.disk.log):
            if event.kind == "mark":
                key, values = event.label  # type: ignore[misc]
                promise[key] = set(values)
            if number != without:
                model.apply(self._moved(event))
            if without is not None and number < without:
                continue
            for choice in choices(num_random, number):
                found = self.recovered(model.state(choice))
                if broken := broken_keys(found, promise):
                    return f"after {event}: {broken} of {found}, promised {promise}"
        return ""

    def uncaught_mutants(self) -> list[str]:
        """Flushes that can be left out of the log without breaking a promise."""
        flushes = [n for n, event in enumerate(self.disk.log) if event.kind == "sync"]
        return [str(self.disk.log[n]) for n in flushes if not self.broken_promise(without=n)]

    def recovered(self, tree: Tree) -> Found:
        # What a temporary directory holds is deleted unread: trees that differ there are one.
        tree = frozenset(item for item in tree if not (TEMPORARY.match(item[0])))
        self.num_states += 1
        if tree not in self._memory:
            folder = self._scratch / "state"
            folder.mkdir()
            write_tree(tree, folder)
            self._memory[tree] = self._recover(folder)
            shutil.rmtree(folder)
        return self._memory[tree]

    def _moved(self, event: Event) -> Event:
        def move(path: Path) -> Path:
            return self._start / path.relative_to(self._root) if path != Path() else path

        return event._replace(path=move(event.path), target=move(event.target))


def broken_keys(found: Found, promise: Promise) -> list[Hashable]:
    """What is found other than it may be; nothing may be found that was not spoken of."""
    keys = {*found, *promise}
    return [key for key in keys if found.get(key) not in promise.get(key, {None})]


@pytest.fixture
def walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Walk]:
    """Starts recording in the folder `root`; what it holds already counts as flushed."""

    def start(recover: Callable[[Path], Found]) -> Walk:
        (tmp_path / "scratch").mkdir()
        started = Walk(tmp_path / "root", tmp_path / "scratch", recover)
        monkeypatch.setattr(durable, "DISK", started.disk)
        return started

    (tmp_path / "root").mkdir()
    return start


def checkpoints_in(folder: Path) -> Found:
    """Step -> digest, after what a resume does first; unfinished ones are no checkpoints."""
    durable.DISK, recording = durable.Disk(), durable.DISK
    try:
        durable.clean_stale(folder)
    finally:
        durable.DISK = recording
    found: dict[Hashable, Hashable] = {}
    for step, path in list_checkpoints(folder):
        try:
            with_files = open_checkpoint(path)
            found[step] = with_files.certificate.digest
            with_files.close()
        except IntegrityError as error:
            if UNFINISHED not in str(error):
                found[step] = str(error)
    return found


def test_no_power_cut_loses_a_checkpoint(walk: Callable[..., Walk], tmp_path: Path) -> None:
    """Guards: a missing or misplaced flush in save, replace and prune; thousands of states."""
    root = tmp_path / "root"
    digests: dict[tuple[int, int], str] = {}
    for step, seed in ((1, 1), (2, 2), (2, 5), (3, 3)):
        path = save_arrays(tmp_path / "elsewhere", MODEL, step, seed=seed)
        digests[step, seed] = open_checkpoint(path).certificate.digest
    steps = walk(checkpoints_in)

    def save(step: int, seed: int, *before: str) -> None:
        new = digests[step, seed]
        steps.disk.mark((step, (*(before or (None,)), new)))
        save_arrays(root, MODEL, step, seed=seed)
        steps.disk.mark((step, (new,)))

    save(1, 1)
    save(2, 2)
    save(2, 5, digests[2, 2])
    steps.disk.mark((1, (digests[1, 1], None)))
    prune(root, keep_latest=1)
    steps.disk.mark((1, (None,)))
    save(3, 3)

    assert steps.broken_promise(num_random=12) == ""
    assert steps.num_states > 10_000
    assert steps.uncaught_mutants() == []


def test_no_power_cut_loses_a_checkpoint_that_gets_a_continuation(
    walk: Callable[..., Walk], tmp_path: Path
) -> None:
    """Guards: the last checkpoint of a stopped run, rewritten to say what comes next."""
    root = tmp_path / "root"
    path = save_arrays(root, MODEL, 7)
    digest = open_checkpoint(path).certificate.digest
    promise = Continuation(batches=("a", "b"), losses=(2.0, 1.0), grad_norm=0.5)

    def recover(folder: Path) -> Found:
        found = dict(checkpoints_in(folder))
        if found.get(7) == digest:
            opened = open_checkpoint(folder / path.name)
            found["promise"] = "kept" if opened.certificate.continuation == promise else None
        return found

    steps = walk(recover)
    steps.disk.mark((7, (digest,)))
    steps.disk.mark(("promise", (None, "kept")))
    add_continuation(path, promise)
    steps.disk.mark(("promise", ("kept",)))
    assert steps.broken_promise(num_random=20) == ""
    shared = re.compile(r"(generation_|)config|tokenizer|template|safetensors|trainer_state")
    needless = [line for line in steps.uncaught_mutants() if not shared.search(line)]
    assert needless == []


def test_replaced_file_is_old_or_new(walk: Callable[..., Walk], tmp_path: Path) -> None:
    """Guards: a plan, lineage or log that a power cut leaves empty or mixed."""
    path = tmp_path / "root" / "plan.json"
    path.write_bytes(b"old")
    steps = walk(lambda folder: {"plan": (folder / "plan.json").read_bytes()})
    steps.disk.mark(("plan", (b"old", b"new content")))
    durable.replace_file(path, (b"new ", b"content"))
    steps.disk.mark(("plan", (b"new content",)))
    assert steps.broken_promise(num_random=50) == ""
    assert steps.uncaught_mutants() == []


def test_made_directory_stays(walk: Callable[..., Walk], tmp_path: Path) -> None:
    """Guards: a run directory that vanishes with all its checkpoints, flushed as they may be."""
    steps = walk(lambda folder: {"made": (folder / "a" / "b").is_dir()})
    steps.disk.mark(("made", (False, True)))
    durable.make_directory(tmp_path / "root" / "a" / "b")
    steps.disk.mark(("made", (True,)))
    assert steps.broken_promise() == ""
    assert steps.uncaught_mutants() == []


def test_staged_directory_keeps_its_folders(walk: Callable[..., Walk], tmp_path: Path) -> None:
    """Guards: a corpus whose tokenizer folder was never flushed."""

    def recover(folder: Path) -> Found:
        files = (path for path in (folder / "corpus").rglob("*") if path.is_file())
        return {"corpus": tuple(sorted((path.name, path.read_bytes()) for path in files)) or None}

    steps = walk(recover)
    whole = (("a.bin", b"12345678"), ("manifest.json", b"{}"), ("tokenizer.json", b"[]"))
    steps.disk.mark(("corpus", (None, whole)))
    with durable.staged_directory(tmp_path / "root" / "corpus") as folder:
        durable.make_directory(folder / "tokenizer")
        for name, content in (("a.bin", b"12345678"), ("tokenizer/tokenizer.json", b"[]")):
            with durable.create_file(folder / name) as file:
                file.write(content)
        with durable.create_file(folder / "manifest.json") as file:
            file.write(b"{}")
    steps.disk.mark(("corpus", (whole,)))
    assert steps.broken_promise(num_random=50) == ""
    redundant = [line for line in steps.uncaught_mutants() if ".tmp-corpus" not in line]
    assert redundant == []


def test_recovery_may_be_cut_as_well(walk: Callable[..., Walk], tmp_path: Path) -> None:
    """Guards: a second power cut, while the first one is being tidied up."""
    root = tmp_path / "root"
    digest = open_checkpoint(save_arrays(root, MODEL, 7)).certificate.digest
    (root / "step-00000007").rename(root / ".old-0a1b2c3d-step-00000007")
    save_arrays(root / ".tmp-step-00000007-0a1b2c3d", MODEL, 7)
    steps = walk(checkpoints_in)
    steps.disk.mark((7, (digest,)))
    assert durable.clean_stale(root) == [
        "restored step-00000007", "removed .tmp-step-00000007-0a1b2c3d",
    ]  # fmt: skip
    assert [path.name for path in root.iterdir()] == ["step-00000007"]
    assert steps.broken_promise(num_random=20) == ""


def test_the_model_itself_finds_a_write_without_flush(
    walk: Callable[..., Walk], tmp_path: Path
) -> None:
    """Guards: a crash model that is too kind. Plain write and rename must be found wanting."""
    steps = walk(lambda folder: {"file": content_of(folder / "a")})
    steps.disk.mark(("file", (None, b"12345678")))
    with durable.create_file(tmp_path / "root" / "b") as file:
        file.write(b"12345678")
    steps.disk.rename(tmp_path / "root" / "b", tmp_path / "root" / "a")
    assert "['file'] of {'file': b" in steps.broken_promise()


def content_of(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None
