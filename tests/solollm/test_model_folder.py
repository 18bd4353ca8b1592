"""A model folder is written whole or not at all, and over nothing."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from solollm import durable
from solollm.backend import HostTensor
from solollm.errors import ConfigError, IntegrityError, StorageError
from solollm.model_folder import Origin, read_origin, write_model_folder
from solollm.tensorfile import open_weights
from solollm.testing.disks import FailingDisk

SPECS = [(f"t{n}", "F32", (4, 5)) for n in range(5)]


def tensors(count: int = 5) -> Iterator[tuple[str, HostTensor]]:
    return ((f"t{n}", HostTensor.of(np.full((4, 5), n, np.float32))) for n in range(count))


@pytest.mark.parametrize(("shard_bytes", "num_files"), [(10**6, 1), (160, 3), (1, 5)])
def test_what_is_written_is_read(shard_bytes: int, num_files: int, tmp_path: Path) -> None:
    """A tensor lost between two shards."""
    size = write_model_folder(
        tmp_path / "m", {"config.json": b"{}"}, SPECS, tensors(), shard_bytes=shard_bytes
    )
    assert size == sum(path.stat().st_size for path in (tmp_path / "m").iterdir())
    weights = open_weights(tmp_path / "m")
    assert len(weights.files) == num_files
    for name, tensor in tensors():
        np.testing.assert_array_equal(weights.read(name).data, tensor.data)


def test_nothing_is_written_over(tmp_path: Path) -> None:
    """Who checked before the work may meet a folder that came into being meanwhile."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        write_model_folder(tmp_path / "m", {}, SPECS, tensors())
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="exists already"):
        write_model_folder(tmp_path / "file", {}, SPECS, tensors())
    assert (tmp_path / "m" / "thesis.txt").read_text() == "mine"


def test_a_failing_disk_or_stream_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a model looks like a model to every loader."""
    with pytest.raises(Exception, match="promised"):
        write_model_folder(tmp_path / "m", {}, SPECS, tensors(4))
    monkeypatch.setattr(durable, "DISK", FailingDisk(6, errno.ENOSPC))
    with pytest.raises(StorageError):
        write_model_folder(tmp_path / "m", {}, SPECS, tensors())
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    """Tens of gigabytes under a hidden name, for ever."""
    left = tmp_path / f"{durable.TEMPORARY}m-01234567"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    write_model_folder(tmp_path / "m", {}, SPECS, tensors())
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_an_origin_is_read_or_refused(tmp_path: Path) -> None:
    """It ends up in a model card: no control characters, no other types."""
    assert read_origin(tmp_path) is None
    path = tmp_path / "origin.json"
    path.write_text('{"name": "a/b", "revision": "", "weights": "float32"}')
    assert read_origin(tmp_path) == Origin("a/b", "", "float32")
    for text in ('{"name": "a"}', '{"name": "a\\nb", "revision": "", "weights": ""}', "[]"):
        path.write_text(text)
        with pytest.raises(IntegrityError, match=r"origin\.json"):
            read_origin(tmp_path)
