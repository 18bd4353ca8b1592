"""Bits across the seam, and what is refused on the way in."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from solollm_torch.session import TorchSession
from solollm_torch.state import TORCH_DTYPES, from_host, load_parameters, to_host

from solollm.architecture import ModelConfig, initial_parameters
from solollm.backend import Batch, DictSource, HostTensor
from solollm.errors import IntegrityError

MakeSession = Callable[..., TorchSession]


@pytest.mark.parametrize("tag", list(TORCH_DTYPES))
@pytest.mark.parametrize("shape", [(), (5,), (3, 4)])
def test_every_dtype_crosses_without_a_changed_bit(tag: str, shape: tuple[int, ...]) -> None:
    """bf16 has no NumPy type: a detour over float32 would lose NaN payloads and cost a copy."""
    count = int(np.prod(shape)) * torch.empty((), dtype=TORCH_DTYPES[tag]).element_size()
    raw = torch.from_numpy(np.random.default_rng(0).integers(0, 256, count, np.uint8))
    tensor = raw.view(TORCH_DTYPES[tag]).view(shape)
    host = to_host(tensor)
    assert (host.dtype, host.shape) == (tag, shape)
    assert host.data.tobytes() == raw.numpy().tobytes()
    back = from_host(host)
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    assert back.reshape(-1).view(torch.uint8).tolist() == raw.tolist()


def test_host_tensor_shares_memory() -> None:
    """Streaming a 7B must not hold each tensor twice."""
    tensor = torch.zeros(4, dtype=torch.bfloat16)
    host = to_host(tensor)
    tensor[1] = 1.0
    assert host.data[1] == 0x3F80
    from_host(host)[2] = 1.0
    assert tensor[2] == 1.0


def test_read_only_bits_are_taken_without_a_warning() -> None:
    """File readers hand out read-only memory, of which torch warns."""
    data = np.arange(3, dtype=np.float32)
    data.flags.writeable = False
    assert from_host(HostTensor.of(data)).tolist() == [0.0, 1.0, 2.0]


def test_a_row_slice_of_a_fused_matrix_is_itself() -> None:
    """Canonical names are views: the neighbouring rows must not come along."""
    fused = torch.arange(12.0).view(6, 2)
    assert to_host(fused[2:4]).data.tolist() == [[4.0, 5.0], [6.0, 7.0]]


def test_session_starts_at_the_cores_initial_weights(
    make_session: MakeSession, tiny_config: ModelConfig
) -> None:
    """Every backend must start a run at the same bits."""
    parameters = dict(make_session(seed=3).snapshot().parameters())
    expected = dict(initial_parameters(tiny_config, 3))
    assert list(parameters) == list(expected)
    assert all(np.array_equal(parameters[n].data, expected[n]) for n in expected)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_export_then_import_then_export_is_the_same_bits(
    make_session: MakeSession, make_batch: Callable[..., Batch], optimizer: str
) -> None:
    """The conversion between backends rests on it."""
    trained = make_session(name=optimizer)
    for _ in range(3):
        trained.train_step(make_batch(8, 64), lr=1e-2).result()
    snapshot, other = trained.snapshot(), make_session(name=optimizer, seed=9)
    other.import_parameters(DictSource.collect(snapshot.parameters()))
    other.import_optimizer(DictSource.collect(snapshot.optimizer()), snapshot.session_state)
    again = other.snapshot()
    assert again.session_state == snapshot.session_state
    for exported, original in (
        (again.parameters(), snapshot.parameters()),
        (again.optimizer(), snapshot.optimizer()),
    ):
        first, second = dict(exported), dict(original)
        assert list(first) == list(second)
        assert all(np.array_equal(first[n].data, second[n].data) for n in second)


def test_half_precision_weights_are_widened_exactly() -> None:
    """Imported checkpoints are mostly bf16; masters are fp32."""
    masters = {"w": torch.zeros(3)}
    load_parameters(masters, DictSource({"w": to_host(torch.tensor([1.5, -2.0, 3e38]).bfloat16())}))
    assert masters["w"].tolist() == torch.tensor([1.5, -2.0, 3e38]).bfloat16().float().tolist()


def test_wrong_parameters_are_named(make_session: MakeSession) -> None:
    """Missing, unexpected and misshapen tensors, each by name, and nothing taken of the former."""
    session = make_session()
    good = dict(session.snapshot().parameters())
    norm, head = "model.norm.weight", "lm_head.weight"
    renamed = {n: t for n, t in good.items() if n != norm} | {"model.norm.bias": good[norm]}
    with pytest.raises(IntegrityError, match=r"missing model.norm.weight; unexpected model.norm.b"):
        session.import_parameters(DictSource(renamed))
    misshapen = good | {norm: HostTensor.of(np.ones(7, np.float32))}
    with pytest.raises(IntegrityError, match=r"misshapen model.norm.weight: \[7\] instead of"):
        session.import_parameters(DictSource(misshapen))
    integers = good | {head: HostTensor.of(good[head].data.view(np.int32))}
    with pytest.raises(IntegrityError, match=r"lm_head.weight is I32"):
        session.import_parameters(DictSource(integers))


def test_wrong_optimizer_state_is_named(make_session: MakeSession) -> None:
    """Resuming AdamW with another model's moments would train on nonsense."""
    session = make_session()
    good = dict(session.snapshot().optimizer())
    missing = {n: t for n, t in good.items() if n != "exp_avg.model.norm.weight"}
    with pytest.raises(IntegrityError, match=r"missing exp_avg.model.norm.weight"):
        session.import_optimizer(DictSource(missing), {"updates": 1})
