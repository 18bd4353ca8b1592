"""Checkpoints: whole or absent, proven before use, readable by transformers as they are.

K numbers the catalogue of bad checkpoint folders. Power cuts are in `test_crash_model.py`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from solollm import durable
from solollm.architecture import ModelConfig, RopeScaling
from solollm.backend import HostTensor, TensorSource
from solollm.certificate import Continuation
from solollm.checkpoint import (
    add_continuation,
    latest_checkpoint,
    open_checkpoint,
    prune,
    save_checkpoint,
    step_name,
    verify_checkpoints,
)
from solollm.errors import BackendError, IntegrityError, StorageError
from solollm.strictfile import encode_json
from solollm.testing.disks import CountingDisk, DyingDisk, FailingDisk
from solollm.testing.snapshots import (
    TOKEN_IDS,
    TOKENIZER_FILES,
    ArraySnapshot,
    save_arrays,
    state_at,
)

# Python 3.12 warns of forks beside threads; the children here touch no thread of their parent.
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
FORK = multiprocessing.get_context("fork")
SMALL = ModelConfig(
    vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1,
    num_attention_heads=1, num_key_value_heads=1, head_dim=4, max_position_embeddings=8,
)  # fmt: skip


def save_snapshot(
    parent: Path, model: ModelConfig, snapshot: ArraySnapshot, **options: Any
) -> Path:
    return save_checkpoint(
        parent, model=model, snapshot=snapshot, state=state_at(10),
        tokenizer_files=TOKENIZER_FILES, token_ids=TOKEN_IDS, **options,
    )  # fmt: skip


def assert_same(source: TensorSource, expected: dict[str, HostTensor]) -> None:
    assert set(source.names()) == set(expected)
    for name, tensor in expected.items():
        read = source.read(name)
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert read.data.tobytes() == tensor.data.tobytes()


@pytest.mark.parametrize("verify", ["sizes", "digests"])
@pytest.mark.parametrize("shard_bytes", [4_000_000_000, 30_000, 1])
def test_round_trip_is_bit_equal(
    tiny_config: ModelConfig, tmp_path: Path, verify: Any, shard_bytes: int
) -> None:
    """Guards: a tensor, a state field or a shard boundary lost between save and open."""
    snapshot = ArraySnapshot(tiny_config, 3)
    proof = Continuation(batches=("a", "b"), losses=(2.5, 2.25), grad_norm=0.5)
    path = save_snapshot(
        tmp_path, tiny_config, snapshot, shard_bytes=shard_bytes, continuation=proof
    )
    assert path == tmp_path / "step-00000010"
    assert (path / "model.safetensors").exists() == (shard_bytes > 10**6)
    checkpoint = open_checkpoint(path, verify)
    assert_same(checkpoint.parameters(), snapshot.weights)
    assert_same(checkpoint.optimizer(), snapshot.moments)
    assert checkpoint.state == state_at(10)
    assert checkpoint.model == tiny_config
    assert checkpoint.certificate.continuation == proof


@pytest.mark.parametrize("links", [True, False])
def test_a_continuation_is_added_and_nothing_else_changes(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a finished checkpoint that loses a file, or its proof, when it is made to say what
    comes next; also where the file system has no hard links."""
    path = save_snapshot(tmp_path, SMALL, ArraySnapshot(SMALL, 3), shard_bytes=100)
    before = open_checkpoint(path)
    content = {file.name: file.read_bytes() for file in path.iterdir()}
    assert before.certificate.continuation is None
    if not links:
        monkeypatch.setattr(durable, "DISK", LinklessDisk())
    proof = Continuation(batches=("a", "b"), losses=(2.5, 2.25), grad_norm=0.5)
    add_continuation(path, proof)
    after = open_checkpoint(path)
    assert after.certificate == before.certificate.model_copy(update={"continuation": proof})
    changed = {file.name for file in path.iterdir() if file.read_bytes() != content[file.name]}
    assert changed == {"certificate.json", "manifest.json"}
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name]


class LinklessDisk(durable.Disk):
    """A file system without second names, such as exFAT."""

    def link(self, source: Path, target: Path) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def test_float_state_survives_exactly(tmp_path: Path) -> None:
    """Guards: a loss scale or norm that JSON rounds, so that a resumed run drifts."""
    values = {
        "loss_scale": 0.1 + 0.2,
        "norm": 5e-324,
        "updates": 2**60,
        "x": -1.7976931348623157e308,
    }
    state = state_at(1).model_copy(update={"session_state": values})
    path = save_checkpoint(
        tmp_path, model=SMALL, snapshot=ArraySnapshot(SMALL), state=state,
        tokenizer_files={}, token_ids={},
    )  # fmt: skip
    read = open_checkpoint(path).state.session_state
    assert read == values
    assert [type(value) for value in read.values()] == [float, float, int, float]


def test_certificate_digest_is_of_the_bits(tmp_path: Path) -> None:
    """Guards: `equal runs` that are not, and equal ones that are told apart by their files."""
    digests = []
    for number, (seed, shard_bytes) in enumerate([(1, 10**9), (1, 100), (2, 10**9)]):
        path = save_snapshot(
            tmp_path / str(number), SMALL, ArraySnapshot(SMALL, seed), shard_bytes=shard_bytes
        )
        digests.append(open_checkpoint(path).certificate.digest)
    assert digests[0] == digests[1] != digests[2]


MODELS = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "qk norm": {"qk_norm": True},
    "llama3 rope": {"rope_scaling": RopeScaling(), "rope_theta": 500_000.0},
    "shards": {},
}


@pytest.mark.parametrize("kind", MODELS)
def test_transformers_loads_a_checkpoint_as_it_is(
    kind: str, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    """Guards: a name, a shape or a config key that Hugging Face reads otherwise."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = ModelConfig.model_validate(tiny_config.model_dump() | MODELS[kind])
    snapshot = ArraySnapshot(model, 1)
    options = {"shard_bytes": 30_000} if kind == "shards" else {}
    path = save_snapshot(tmp_path, model, snapshot, **options)
    for name in (
        "optimizer.safetensors",
        "trainer_state.json",
        "certificate.json",
        "manifest.json",
    ):
        (path / name).unlink()
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    wanted = "Qwen3ForCausalLM" if model.qk_norm else "LlamaForCausalLM"
    assert type(loaded).__name__ == wanted
    weights = dict(loaded.state_dict())
    for name, tensor in snapshot.weights.items():
        assert weights[name].dtype == torch.float32
        np.testing.assert_array_equal(weights[name].numpy(), tensor.data)
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id) == (0, 1)
    assert loaded.generation_config.pad_token_id == 2
    with torch.no_grad():
        logits = loaded(torch.arange(12)[None]).logits
    assert logits.shape == (1, 12, model.vocab_size)
    assert torch.isfinite(logits).all()


def test_pure_bf16_weights_are_stored_and_named_as_such(tmp_path: Path) -> None:
    """Guards: a config.json that makes readers widen or narrow the weights."""
    snapshot = ArraySnapshot(SMALL)
    for name, tensor in snapshot.weights.items():
        narrow = (tensor.data.view(np.uint32) >> 16).astype(np.uint16)
        snapshot.weights[name] = HostTensor("BF16", tensor.shape, narrow)
    path = save_snapshot(tmp_path, SMALL, snapshot)
    assert_same(open_checkpoint(path).parameters(), snapshot.weights)
    assert json.loads((path / "config.json").read_bytes())["torch_dtype"] == "bfloat16"


def test_no_file_names_this_machine(tmp_path: Path) -> None:
    """Guards: an absolute path that breaks a run when it is moved."""
    path = save_arrays(tmp_path, SMALL, 1)
    for file in path.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()
    moved = path.rename(tmp_path / "elsewhere")
    open_checkpoint(moved)


@pytest.mark.parametrize("place", ["weights", "moments"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_is_never_saved(place: str, value: float, tmp_path: Path) -> None:
    """Guards: the last good checkpoint rotated away by one that holds NaN."""
    snapshot = ArraySnapshot(SMALL)
    tensors = getattr(snapshot, place)
    name = next(name for name in tensors if name.endswith("up_proj.weight"))
    tensors[name].data[1, 1] = value
    with pytest.raises(IntegrityError, match=rf"{name}'.*holds NaN or infinity"):
        save_snapshot(tmp_path, SMALL, snapshot)
    assert list(tmp_path.iterdir()) == []


def test_snapshot_of_another_model_is_refused_before_writing(tmp_path: Path) -> None:
    """Guards: a folder whose config.json describes other weights."""
    other = SMALL.model_copy(update={"intermediate_size": 6})
    with pytest.raises(BackendError, match="name table"):
        save_snapshot(tmp_path, other, ArraySnapshot(SMALL))
    assert list(tmp_path.iterdir()) == []


def test_saving_works_on_another_thread(tmp_path: Path) -> None:
    """Guards: state bound to the main thread."""
    thread = threading.Thread(target=save_arrays, args=(tmp_path, SMALL, 4))
    thread.start()
    thread.join()
    assert open_checkpoint(tmp_path / "step-00000004").step == 4


def copied(path: Path) -> Path:
    """A copy beside it, to be damaged by `rewrite` or unlinking; the last copy is gone."""
    folder = path.parent / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(path, folder, copy_function=os.link))


def rewrite(path: Path, content: bytes | bytearray) -> None:
    """Give a name new content; other names of the old file keep theirs."""
    path.unlink()
    path.write_bytes(content)


def assert_refused(folder: Path, name: str) -> None:
    with pytest.raises(IntegrityError) as refusal:
        open_checkpoint(folder)
    if name:
        assert name in str(refusal.value)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """Guards: a byte that nothing covers. 600 places over every file, ends included."""
    path = save_snapshot(tmp_path, SMALL, ArraySnapshot(SMALL), shard_bytes=600)
    choose, files = random.Random(0), sorted(path.iterdir())
    assert len([file for file in files if "-of-" in file.name]) > 1
    for file in files:
        size = file.stat().st_size
        places = {0, size - 1, *(choose.randrange(size) for _ in range(600 // len(files)))}
        for place in sorted(places):
            content = bytearray(file.read_bytes())
            content[place] ^= 1 << choose.randrange(8)
            copy = copied(path)
            rewrite(copy / file.name, content)
            assert_refused(copy, "" if file.name == "manifest.json" else file.name)


def test_every_cut_and_every_addition_is_found(tmp_path: Path) -> None:
    """Guards: a file that lost its end. 240 lengths over every file."""
    path = save_snapshot(tmp_path, SMALL, ArraySnapshot(SMALL), shard_bytes=600)
    choose, files = random.Random(1), sorted(path.iterdir())
    for file in files:
        content = file.read_bytes()
        lengths = {0, len(content) - 1}
        lengths |= {choose.randrange(len(content)) for _ in range(240 // len(files))}
        for cut in (*(content[:length] for length in sorted(lengths)), content + b"\0"):
            copy = copied(path)
            rewrite(copy / file.name, cut)
            assert_refused(copy, "" if file.name == "manifest.json" else file.name)


def test_k1_k3_files_of_two_steps_are_told_apart(tmp_path: Path) -> None:
    """Guards: a valid file of another step, equal in size, put in place of the right one."""
    first = save_arrays(tmp_path, SMALL, 10)
    second = save_arrays(tmp_path, SMALL, 11)
    for file in sorted(first.iterdir()):
        if file.read_bytes() == (second / file.name).read_bytes():
            continue
        copy = copied(first)
        rewrite(copy / file.name, (second / file.name).read_bytes())
        assert_refused(copy, file.name if file.name != "manifest.json" else "")
    for file in sorted(first.iterdir()):
        copy = copied(first)
        (copy / file.name).unlink()
        assert_refused(copy, file.name)


def test_sizes_only_still_proves_each_tensor_as_it_is_read(tmp_path: Path) -> None:
    """Guards: the quick way of opening taken for a way round the digests."""
    path = save_arrays(tmp_path, SMALL, 1)
    for file, kind in (("model.safetensors", "parameters"), ("optimizer.safetensors", "optimizer")):
        copy = copied(path)
        flip_last_bit(copy / file)
        source = getattr(open_checkpoint(copy, verify="sizes"), kind)()
        *good, last = source.names()
        for name in good:
            source.read(name)
        with pytest.raises(IntegrityError, match="not the one that was certified"):
            source.read(last)


def test_weights_only_leaves_the_optimizer_to_its_readers(tmp_path: Path) -> None:
    """Guards generating from a checkpoint whose optimizer alone is damaged, and never from one
    whose weights are: the run's newest with good weights is taken."""
    save_arrays(tmp_path, SMALL, 1)
    broken_optimizer, broken_weights = (save_arrays(tmp_path, SMALL, step) for step in (2, 3))
    flip_last_bit(broken_optimizer / "optimizer.safetensors")
    flip_last_bit(broken_weights / "model.safetensors")
    newest, skipped = latest_checkpoint(tmp_path, verify="weights")
    assert newest is not None
    assert newest.step == 2
    assert len(skipped) == 1
    source = newest.optimizer()
    with pytest.raises(IntegrityError, match="not the one that was certified"):
        source.read(list(source.names())[-1])
    newest, skipped = latest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.step == 1
    assert len(skipped) == 2


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    rewrite(path, content)


def forge(folder: Path, name: str, content: bytes) -> None:
    """Replace a plain file and make the manifest agree, as an attacker would."""
    rewrite(folder / name, content)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    manifest["files"][name] = {"bytes": len(content), "digest": digest}
    rewrite(folder / "manifest.json", encode_json(manifest))


def changed(name: str, **fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        forge(folder, name, encode_json(json.loads((folder / name).read_bytes()) | fields))

    return change


def manifest_with(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        table = json.loads((folder / "manifest.json").read_bytes())
        rewrite(folder / "manifest.json", encode_json(table | fields))

    return change


FORGERIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "K2 manifest cut": (
        lambda at: rewrite(at / "manifest.json", (at / "manifest.json").read_bytes()[:100]), "JSON",
    ),
    "K2 manifest empty": (lambda at: rewrite(at / "manifest.json", b""), "JSON"),
    "K2 manifest is a list": (lambda at: rewrite(at / "manifest.json", b"[]\n"), "spelt"),
    "K2 manifest respelt": (
        lambda at: rewrite(at / "manifest.json", (at / "manifest.json").read_bytes() + b" "),
        "spelt",
    ),
    "K2 manifest is a FIFO": (
        lambda at: ((at / "manifest.json").unlink(), os.mkfifo(at / "manifest.json"))[0], "regular",
    ),
    "manifest names a path": (
        manifest_with(files={"../x": {"bytes": 1, "digest": "sha256:" + "0" * 64}}), "plain file",
    ),
    "manifest has no digest": (manifest_with(files={"x": {"bytes": 1}}), "exactly bytes and"),
    "manifest has a bad digest": (
        manifest_with(files={"x": {"bytes": 1, "digest": "md5:0"}}), "malformed digest",
    ),
    "manifest of nothing": (manifest_with(files={}), "is missing"),
    "manifest of another step": (manifest_with(step=11), "steps 11, 10 and 10 are mixed"),
    "manifest with a step of text": (manifest_with(step="10"), "are mixed"),
    "K7 data position beyond all data": (
        changed("trainer_state.json", data={"fingerprint": "f", "seed": 0, "step": 2**60}),
        "less than or equal",
    ),
    "K7 data position before all data": (
        changed("trainer_state.json", data={"fingerprint": "f", "seed": 0, "step": -1}), "greater",
    ),
    "K8 manifest of the future": (manifest_with(format_version=2), "2, not 1; open it with"),
    "K8 manifest of version true": (manifest_with(format_version=True), "True, not 1"),
    "K8 state of the future": (changed("trainer_state.json", format_version=2), "2, not 1; open"),
    "K8 certificate of the future": (changed("certificate.json", format_version=9), "9, not 1"),
    "K8 pickle as weights": (
        lambda at: rewrite(at / "model.safetensors", b"\x80\x02}q\x00." * 100), "header",
    ),
    "unknown field of the state": (changed("trainer_state.json", extra=1), "extra"),
    "state of another step": (changed("trainer_state.json", step=9), "are mixed"),
    "state is a list": (lambda at: forge(at, "trainer_state.json", b"[]\n"), "no table"),
    "state with NaN": (
        lambda at: forge(at, "trainer_state.json", b'{"format_version":1,"step":NaN}'), "NaN",
    ),
    "certificate of nothing": (changed("certificate.json", parameters={}), "in the certificate"),
    "certificate of more": (
        lambda at: changed("certificate.json", optimizer={
            **json.loads((at / "certificate.json").read_bytes())["optimizer"], "x": "0" * 64})(at),
        "'x': is certified but missing",
    ),
    "certificate of other digests": (
        lambda at: changed("certificate.json", parameters=dict.fromkeys(
            json.loads((at / "certificate.json").read_bytes())["parameters"], "0" * 64))(at),
        "not what manifest and certificate",
    ),
    "certificate without hex": (
        lambda at: changed("certificate.json", parameters=dict.fromkeys(
            json.loads((at / "certificate.json").read_bytes())["parameters"], "x"))(at),
        "parameters",
    ),
    "config of another model": (changed("config.json", num_hidden_layers=2), "is missing"),
    "config of no heads": (changed("config.json", num_attention_heads=0), "the model"),
    "config of 10 M layers": (changed("config.json", num_hidden_layers=10**7), "the model"),
    "config is a list": (lambda at: forge(at, "config.json", b"[]\n"), "is no table"),
    "second weights file": (
        lambda at: rewrite(at / "model.safetensors", (at / "optimizer.safetensors").read_bytes()),
        "not one of this model",
    ),
    "weights behind a link": (
        lambda at: ((at / "model.safetensors").rename(at / "w"),
                    (at / "model.safetensors").symlink_to("w"))[1], "symbolic link",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FORGERIES)
def test_forged_folder_is_refused_with_a_reason(case: str, tmp_path: Path) -> None:
    """Guards: a folder whose manifest agrees with it and which is wrong all the same."""
    change, reason = FORGERIES[case]
    path = save_arrays(tmp_path, SMALL, 10)
    change(path)
    for verify in ("digests", "sizes"):
        with pytest.raises(IntegrityError, match=reason) as refusal:
            open_checkpoint(path, verify)  # type: ignore[arg-type]
        assert str(path) in str(refusal.value)


def test_latest_falls_back_and_says_what_it_skipped(tmp_path: Path) -> None:
    """Guards: a resume that dies at a damaged checkpoint, or passes over one without a word."""
    assert latest_checkpoint(tmp_path / "missing") == (None, [])
    for step in (1, 2, 3, 4):
        save_arrays(tmp_path, SMALL, step)
    with (tmp_path / step_name(4) / "optimizer.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xee")
    (tmp_path / step_name(3) / "manifest.json").unlink()
    found, skipped = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 2
    assert [line.split(":")[0] for line in skipped] == [
        "skipped step-00000004", "skipped step-00000003",
    ]  # fmt: skip
    assert "is damaged (its digest differs)" in skipped[0]
    assert "never finished" in skipped[1]
    reports = [(report.step, bool(report.problem)) for report in verify_checkpoints(tmp_path)]
    assert reports == [(1, False), (2, False), (3, True), (4, True)]


def test_k4_k5_only_canonical_names_are_checkpoints(tmp_path: Path) -> None:
    """Guards: a temporary, a copy or a second spelling of one step taken for the latest."""
    real = save_arrays(tmp_path, SMALL, 7)
    for name in (".tmp-step-00000009-0a1b2c3d", "step-9", "step-000000009", "step-00000009.bak",
                 "step-00000009 copy", "Step-00000009", "step-0000000٩"):  # fmt: skip
        shutil.copytree(real, tmp_path / name)
    (tmp_path / "step-00000009").write_bytes(b"a file")
    found, skipped = latest_checkpoint(tmp_path)
    assert found is not None
    assert (found.path, skipped) == (real, [])
    shutil.rmtree(real)
    assert latest_checkpoint(tmp_path) == (None, [])


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step-*"))


def test_prune_keeps_the_latest_and_the_named(tmp_path: Path) -> None:
    """Guards: the best checkpoint deleted, or unfinished ones counted among those kept."""
    for step in range(1, 8):
        save_arrays(tmp_path, SMALL, step)
    (tmp_path / step_name(6) / "manifest.json").unlink()
    assert prune(tmp_path, keep_latest=2, keep_steps={2, 99}) == []
    assert steps_in(tmp_path) == [2, 5, 7]
    assert prune(tmp_path, keep_latest=9) == []
    assert steps_in(tmp_path) == [2, 5, 7]


def test_one_failed_delete_never_stops_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a disk that fills up because one old checkpoint could not be removed."""
    for step in range(1, 5):
        save_arrays(tmp_path, SMALL, step)
    monkeypatch.setattr(durable, "DISK", FailingDisk(1, errno.EIO))
    failures = prune(tmp_path, keep_latest=1)
    assert len(failures) == 1
    assert failures[0].startswith("step-00000001 is still there: ")
    assert steps_in(tmp_path) == [1, 4]
    assert open_checkpoint(tmp_path / step_name(1)).step == 1


def test_same_step_saved_again_is_replaced(tmp_path: Path) -> None:
    """Guards: a resume that cannot save over the damaged checkpoint it fell back from."""
    (save_arrays(tmp_path, SMALL, 5, seed=1) / "config.json").unlink()
    save_arrays(tmp_path, SMALL, 5, seed=2)
    assert_same(
        open_checkpoint(tmp_path / step_name(5)).parameters(), ArraySnapshot(SMALL, 2).weights
    )
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EMFILE])
def test_any_failing_call_of_a_save_leaves_the_last_checkpoint(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a save on a failing disk that costs the checkpoint before it. Every call fails once,
    and from it on for good."""
    disk = CountingDisk()
    monkeypatch.setattr(durable, "DISK", disk)
    (tmp_path / "count").mkdir()
    save_arrays(tmp_path / "count", SMALL, 2)
    total = disk.calls
    assert total > 60
    save_arrays(tmp_path / "run", SMALL, 1)
    for number in range(1, total + 1, 2 if code == errno.ENOSPC else 7):
        for lasting in (False, True):
            failing = FailingDisk(number, code, lasting=lasting)
            monkeypatch.setattr(durable, "DISK", failing)
            with pytest.raises(StorageError) as failure:
                save_arrays(tmp_path / "run", SMALL, 2)
            assert failing.failures
            assert failure.value.exit_code == 74
            monkeypatch.setattr(durable, "DISK", durable.Disk())
            durable.clean_stale(tmp_path / "run")
            assert set(steps_in(tmp_path / "run")) <= {1, 2}
            open_checkpoint(tmp_path / "run" / step_name(1), verify="sizes").close()
            if (tmp_path / "run" / step_name(2)).exists():  # the flush after the rename failed
                open_checkpoint(tmp_path / "run" / step_name(2))
                durable.remove_tree(tmp_path / "run" / step_name(2))
    save_arrays(tmp_path / "run", SMALL, 2)
    assert latest_checkpoint(tmp_path / "run")[1] == []


def test_room_is_asked_for_before_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: gigabytes written until the disk is full. 1.1 times the tensors must be free."""
    snapshot = ArraySnapshot(SMALL)
    tensors = [*snapshot.weights.values(), *snapshot.moments.values()]
    needed = int(1.1 * sum(tensor.data.nbytes for tensor in tensors))
    monkeypatch.setattr(durable.Disk, "free_bytes", lambda self, path: needed - 1)
    with pytest.raises(StorageError, match=f"{needed:,} bytes are needed and {needed - 1:,} are"):
        save_snapshot(tmp_path, SMALL, snapshot)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(durable.Disk, "free_bytes", lambda self, path: needed)
    save_snapshot(tmp_path, SMALL, snapshot)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from solollm.checkpoint import latest_checkpoint
from solollm.dial import from_depth
from solollm.errors import StorageError
from solollm.testing.snapshots import save_arrays
parent, model = Path(sys.argv[1]), from_depth(1, 64)
save_arrays(parent, model, 1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    save_arrays(parent, model, 2)
except StorageError as error:
    found, skipped = latest_checkpoint(parent)
    print(found.step, skipped, sorted(path.name for path in parent.iterdir()), error)
    sys.exit(error.exit_code)
"""


def test_full_disk_ends_with_74_and_the_last_checkpoint_loads(tmp_path: Path) -> None:
    """Guards: a real system call that fails otherwise than the fakes do."""
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 74, result
    assert result.stdout.startswith("1 [] ['step-00000001'] cannot write ")
    assert "more bytes were needed and" in result.stdout


@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_death_at_any_call_loses_nothing(
    stride: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: one instant of save, replace or prune at which kill -9 costs a checkpoint.
    Between two writes of data only every ninth is tried."""

    def work(parent: Path) -> None:
        save_arrays(parent, SMALL, 2)
        save_arrays(parent, SMALL, 1, seed=9)
        prune(parent, keep_latest=1)

    base = tmp_path / "base"
    save_arrays(base, SMALL, 1)
    calls: list[str] = []
    monkeypatch.setattr(durable, "DISK", CountingDisk())
    monkeypatch.setattr(CountingDisk, "before", lambda self, call: calls.append(call))
    work(shutil.copytree(base, tmp_path / "count"))
    monkeypatch.undo()
    moments = [n for n, call in enumerate(calls, 1) if call != "write" or n % 9 == 0]
    assert len(moments) > 80
    outcomes = set()
    for number in moments[::stride]:
        parent = shutil.copytree(base, tmp_path / str(number), copy_function=os.link)
        monkeypatch.setattr(durable, "DISK", DyingDisk(number))
        child = FORK.Process(target=work, args=(parent,))
        child.start()
        child.join(60)
        assert child.exitcode == errno.EINTR
        monkeypatch.setattr(durable, "DISK", durable.Disk())
        durable.clean_stale(parent)
        found, skipped = latest_checkpoint(parent)
        assert found is not None, f"call {number}"
        assert all("never finished" in line for line in skipped), skipped
        outcomes.add((found.step, len(steps_in(parent))))
        shutil.rmtree(parent)
    assert outcomes == {(1, 1), (2, 2)}


def save_for_ever(parent: Path, step: int, sender: int) -> None:
    """Save and prune without pause; acknowledge each checkpoint."""
    while True:
        step += 1
        save_arrays(parent, SMALL, step)
        os.write(sender, struct.pack("<q", step))
        prune(parent, keep_latest=2)


def kill_while_saving(parent: Path, num_kills: int, seed: int) -> int:
    """Kill -9 the saving process at random moments; the steps it got done."""
    choose, acknowledged, seconds = random.Random(seed), 0, 0.05
    for _ in range(num_kills):
        receiver, sender = os.pipe()
        child = FORK.Process(target=save_for_ever, args=(parent, acknowledged, sender))
        child.start()
        os.close(sender)
        with os.fdopen(receiver, "rb", buffering=0) as pipe:
            for _ in range(choose.randrange(3)):
                started = time.monotonic()
                (acknowledged,) = struct.unpack("<q", pipe.read(8))
                seconds = min(1.0, time.monotonic() - started)
            time.sleep(choose.uniform(0.0, seconds))
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            heard = pipe.read()
        if heard:
            (acknowledged,) = struct.unpack("<q", heard[-8:])
        durable.clean_stale(parent)
        found, skipped = latest_checkpoint(parent)
        assert all("never finished" in line for line in skipped), skipped
        assert (0 if found is None else found.step) >= acknowledged
        acknowledged = 0 if found is None else found.step
    return acknowledged


def test_kill_at_random_moments_loses_no_acknowledged_checkpoint(tmp_path: Path) -> None:
    """Guards: what the list of calls does not show, threads for one. 20 kills; the rest is slow."""
    assert kill_while_saving(tmp_path, 20, seed=0) >= 10


@pytest.mark.slow
def test_a_thousand_kills_lose_no_acknowledged_checkpoint(tmp_path: Path) -> None:
    """Guards: the same, for rarer moments."""
    assert kill_while_saving(tmp_path, 1000, seed=1) >= 500
