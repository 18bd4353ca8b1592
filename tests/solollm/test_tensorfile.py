"""Safetensors written as a stream and read back: bits, digests, threads, and broken promises."""

from __future__ import annotations

import hashlib
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from solollm.backend import BITS_DTYPE, DType, HostTensor
from solollm.errors import BackendError, IntegrityError
from solollm.tensorfile import TensorFile, file_digest, is_finite, open_weights, write_tensors
from solollm.tensorheader import build_header

Items = list[tuple[str, HostTensor]]


def write(path: Path, items: Items, metadata: dict[str, str] | None = None) -> dict[str, str]:
    path.unlink(missing_ok=True)
    specs = [(name, tensor.dtype, tensor.shape) for name, tensor in items]
    return write_tensors(path, specs, iter(items), metadata)


def bits(dtype: DType, shape: tuple[int, ...], seed: int = 0) -> HostTensor:
    """Random bits, NaN and infinity among them."""
    size = int(np.prod(shape)) * np.dtype(BITS_DTYPE[dtype]).itemsize
    data = np.frombuffer(np.random.default_rng(seed).bytes(size), BITS_DTYPE[dtype])
    return HostTensor(dtype, shape, data.reshape(shape))


TENSORS = st.lists(
    st.tuples(
        st.sampled_from(list(BITS_DTYPE)),
        st.lists(st.integers(0, 5), max_size=4).map(tuple),
    ),
    max_size=5,
)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kinds=TENSORS, metadata=st.dictionaries(st.text(max_size=3), st.text(max_size=9), max_size=2)
)
def test_what_is_written_is_read_bit_for_bit(
    kinds: list[tuple[DType, tuple[int, ...]]],
    metadata: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Guards: a dtype, a scalar or an empty tensor that comes back other than it went; a file that
    others cannot read."""
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    items = [(f"t{n}", bits(dtype, shape, n)) for n, (dtype, shape) in enumerate(kinds)]
    digests = write(path, items, metadata)
    reference = dict(safetensors.deserialize(path.read_bytes()))
    with TensorFile(path) as file:
        assert list(file.names()) == [name for name, _ in items]
        assert dict(file.metadata) == metadata
        assert file.digests() == digests
        for name, tensor in items:
            read = file.read(name)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert read.data.shape == tensor.shape
            assert read.data.tobytes() == tensor.data.tobytes() == bytes(reference[name]["data"])
            assert digests[name] == hashlib.sha256(tensor.data.tobytes()).hexdigest()


def test_data_begins_at_a_multiple_of_8_bytes(tmp_path: Path) -> None:
    """Guards: float32 at odd addresses for readers that map the file."""
    for length in range(1, 20):
        header = build_header([("x" * length, "F32", (2,))])
        assert len(header) % 8 == 0
    write(tmp_path / "a", [("a", bits("F32", (3,)))])
    assert safetensors.numpy.load_file(tmp_path / "a")["a"].shape == (3,)


def test_file_digest_covers_every_byte(tmp_path: Path) -> None:
    """Guards: a byte of the file that no digest covers; header and digests that are mixed up."""
    path = tmp_path / "a.safetensors"
    items = [("a", bits("U8", (5,))), ("b", bits("F32", (2, 3)))]
    digests = write(path, items)
    content = path.read_bytes()
    header = build_header([(name, tensor.dtype, tensor.shape) for name, tensor in items])
    assert content[: len(header)] == header
    seen = set()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 4
        path.write_bytes(changed)
        try:
            file = TensorFile(path)
        except IntegrityError:
            continue
        with file:
            seen.add(file.file_digest(file.digests()))
    path.write_bytes(content)
    with TensorFile(path) as file:
        whole = file.file_digest(digests)
    assert whole == file_digest(header, digests.values())
    assert whole not in seen
    assert len(seen) >= 5 + 24


def test_writing_holds_one_tensor(tmp_path: Path) -> None:
    """Guards: a copy of the whole model in memory while it is saved."""
    count, size = 16, 1 << 20

    def stream() -> Iterator[tuple[str, HostTensor]]:
        for number in range(count):
            yield f"t{number}", HostTensor.of(np.full(size, number, np.float32))

    specs = [(f"t{number}", "F32", (size,)) for number in range(count)]
    tracemalloc.start()
    write_tensors(tmp_path / "a", specs, stream())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 4 * size, f"{peak / (4 * size):.1f} tensors were alive"


def test_large_files_are_digested_by_threads_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: digests that depend on how many threads share the descriptor."""
    path = tmp_path / "a"
    digests = write(path, [(f"t{n}", bits("U8", (1000 + n,), n)) for n in range(40)])
    monkeypatch.setattr("solollm.tensorfile._THREADED_BYTES", 1)
    monkeypatch.setattr("solollm.tensorfile._HASH_BYTES", 64)
    with TensorFile(path) as file:
        assert file.digests() == digests


def test_reads_from_many_threads_do_not_mix(tmp_path: Path) -> None:
    """Guards: a shared file position."""
    items = [(f"t{n}", HostTensor.of(np.full(50_000, n, np.int32))) for n in range(8)]
    write(tmp_path / "a", items)
    wrong: list[str] = []
    with TensorFile(tmp_path / "a") as file:

        def read(number: int) -> None:
            for _ in range(20):
                if not (file.read(f"t{number}").data == number).all():
                    wrong.append(f"t{number}")

        threads = [threading.Thread(target=read, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    "came",
    [
        [],
        [("a", bits("F32", (2,)))],
        [("b", bits("F32", (2,))), ("a", bits("F32", (2,)))],
        [("a", bits("F32", (2,))), ("b", bits("F32", (3,)))],
        [("a", bits("F32", (2,))), ("b", bits("I32", (2,)))],
    ],
    ids=["nothing", "too few", "swapped", "shape", "dtype"],
)
def test_what_was_not_promised_is_not_written(came: Items, tmp_path: Path) -> None:
    """Guards: a header that describes other tensors than those that follow."""
    specs = [("a", "F32", (2,)), ("b", "F32", (2,))]
    with pytest.raises(BackendError, match="was promised"):
        write_tensors(tmp_path / "a", specs, came)


def test_more_than_was_promised_is_refused(tmp_path: Path) -> None:
    """Guards: tensors at the end of a stream that are lost without a word."""
    came = [("a", bits("F32", (2,))), ("b", bits("F32", (2,)))]
    with pytest.raises(BackendError, match="more than was promised"):
        write_tensors(tmp_path / "a", [("a", "F32", (2,))], came)


def test_non_contiguous_arrays_are_written_in_order(tmp_path: Path) -> None:
    """Guards: a transposed view whose memory order reaches the file."""
    turned = HostTensor("F32", (3, 2), np.arange(6, dtype=np.float32).reshape(2, 3).T)
    write(tmp_path / "a", [("a", turned)])
    with TensorFile(tmp_path / "a") as file:
        assert file.read("a").data.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_read_of_a_missing_tensor_names_file_and_tensor(tmp_path: Path) -> None:
    """Guards: a bare KeyError."""
    path = tmp_path / "model.safetensors"
    write(path, [("a", bits("U8", (2,)))])
    with TensorFile(path) as file, pytest.raises(IntegrityError, match=r"model.*'b': is missing"):
        file.read("b")
    with pytest.raises(IntegrityError, match=r"'b': is missing"):
        open_weights(tmp_path).read("b")


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_finite_check_finds_every_nan_and_infinity(dtype: DType) -> None:
    """Guards: a NaN between numbers, which a plain maximum may pass over; a largest finite number
    that is taken for infinity."""
    patterns = {
        "F32": (0x7F800000, 0xFF800000, 0x7FC00000, 0xFF800001), "F16": (0x7C00, 0xFC00, 0x7E01),
        "BF16": (0x7F80, 0xFF80, 0x7FC0, 0xFF81),
    }[dtype]  # fmt: skip
    kind = np.uint32 if dtype == "F32" else np.uint16
    largest = {"F32": 0x7F7FFFFF, "F16": 0x7BFF, "BF16": 0x7F7F}[dtype]
    for place in range(9):
        good = np.full(9, largest, kind)
        good[::2] |= kind(1 << (31 if dtype == "F32" else 15))
        assert is_finite(HostTensor(dtype, (9,), good.view(BITS_DTYPE[dtype])))
        for pattern in patterns:
            bad = good.copy()
            bad[place] = pattern
            assert not is_finite(HostTensor(dtype, (9,), bad.view(BITS_DTYPE[dtype])))
    assert is_finite(HostTensor(dtype, (0,), np.empty(0, BITS_DTYPE[dtype])))
