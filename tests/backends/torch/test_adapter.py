"""Adapters on torch: PEFT's logits and gradients, the quantised base, what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from solollm_torch import quant
from solollm_torch.adapter import STORED, adapted_decoder
from solollm_torch.adapter_session import AdapterSession
from solollm_torch.kernels import load
from solollm_torch.quant import Nf4Matrix

from solollm import nf4_codec
from solollm.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    AdapterOptions,
    adapter_table,
    peft_config,
)
from solollm.architecture import ModelConfig, parameter_table
from solollm.backend import Batch, DictSource, HostTensor, Plan, SessionOptions
from solollm.config import OptimizerTable
from solollm.errors import BackendError, ConfigError, IntegrityError
from solollm.strictfile import encode_json
from solollm.tensorfile import FOR_TRANSFORMERS, WEIGHTS, write_tensors
from solollm.testing.bench import lively_parameters

CPU = torch.device("cpu")


def session_of(
    model: ModelConfig, adapter: AdapterOptions, *, base: bool = True, **table: Any
) -> AdapterSession:
    optimizer = OptimizerTable.model_validate({"name": "adamw", **table})
    plan = Plan(8, False, "float32", 64, 8)
    session = AdapterSession(model, SessionOptions(optimizer, adapter=adapter), plan, CPU)
    if base:
        session.import_base(DictSource(lively_parameters(model)))
    return session


def random_factors(model: ModelConfig, adapter: AdapterOptions) -> dict[str, HostTensor]:
    noise = np.random.default_rng(3)
    return {
        spec.name: HostTensor.of(
            (noise.standard_normal(spec.shape) * 0.5 * spec.shape[1] ** -0.5).astype(np.float32)
        )
        for spec in adapter_table(model, adapter)
    }


def write(path: Path, tensors: dict[str, HostTensor]) -> None:
    specs = [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    write_tensors(path, specs, tensors.items(), FOR_TRANSFORMERS)


@pytest.fixture
def in_peft(tmp_path: Path) -> Callable[..., Any]:
    """in_peft(model, adapter, factors): PEFT's model of the lively base with our adapter."""

    def load(model: ModelConfig, adapter: AdapterOptions, factors: dict[str, HostTensor]) -> Any:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base, tuned = tmp_path / "base", tmp_path / "adapter"
        for folder in (base, tuned):
            folder.mkdir()
        (base / "config.json").write_bytes(encode_json(model.to_hf()))
        write(base / WEIGHTS, lively_parameters(model))
        (tuned / ADAPTER_CONFIG).write_bytes(encode_json(peft_config(adapter)))
        write(tuned / ADAPTER_WEIGHTS, factors)
        whole = AutoModelForCausalLM.from_pretrained(base, attn_implementation="sdpa")
        return PeftModel.from_pretrained(whole, tuned, is_trainable=True)

    return load


# PEFT 0.21 asks transformers 5.2x for a property under its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(
    ("rslora", "modules"), [(False, None), (True, ("q_proj", "v_proj", "up_proj"))]
)
def test_logits_and_gradients_are_pefts(
    in_peft: Callable[..., Any], make_batch: Callable[..., Batch], tiny_config: ModelConfig,
    qk_norm: bool, rslora: bool, modules: Sequence[Any] | None,
) -> None:  # fmt: skip
    """Guards: names or orientation that PEFT reads otherwise; a gradient of the wrong part of a
    fused matrix, or of a factor that only some modules have."""
    model = tiny_config.model_copy(update={"qk_norm": qk_norm, "rope_theta": 5e5})
    fields = {"target_modules": tuple(modules)} if modules else {}
    adapter = AdapterOptions.model_validate({"rank": 4, "alpha": 6, "use_rslora": rslora, **fields})
    factors, batch = random_factors(model, adapter), make_batch(3, 20, model.vocab_size)
    session = session_of(model, adapter, clip_norm=0.0)
    session.import_parameters(DictSource(factors))
    ids = torch.from_numpy(batch.input_ids.astype(np.int64))
    theirs = in_peft(model, adapter, factors)
    logits = theirs(input_ids=ids).logits
    with torch.no_grad():
        ours = session._decoder.logits(ids)
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-4)
    labels = torch.from_numpy(batch.labels.astype(np.int64))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    expected = {
        name.replace(".default.weight", ".weight"): p.grad
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    gradients = session.gradients(batch)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        limit = 1e-4 * float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=limit, msg=name)


@pytest.mark.parametrize("shape", [(96, 64), (48, 20), (33, 5), (512, 256)])
def test_codes_are_bitsandbytes_own(shape: tuple[int, int]) -> None:
    """Guards: our look-up of two weights per byte, in PyTorch and compiled, block borders, odd
    sizes; values that an export in NumPy does not merge into. Magnitudes may go to the level beside
    bitsandbytes' choice."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    matrix = Nf4Matrix(shape, CPU, torch.float32)
    matrix.encode(weight)
    out = torch.empty(shape)
    matrix.decode_into(out)
    assert np.array_equal(out.numpy(), nf4_codec.decoded(weight.numpy()))
    if (kernels := load()[0]) is not None:
        compiled = torch.empty(shape)
        matrix.decode_into(compiled, kernels)
        assert torch.equal(compiled, out)
    assert torch.equal(out, dequantize_4bit(matrix._codes, matrix._state))
    theirs = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", compress_statistics=True))
    assert float(((out - theirs).abs() > 1e-6).float().mean()) < 0.01
    assert float((out - theirs).abs().max()) < 0.05 * float(weight.abs().max())
    assert float((out - weight).square().mean()) < 0.012 * float(weight.square().mean())
    assert matrix.num_bytes < 0.6 * weight.numel() + 1100 / 256 * 4


def test_a_quantised_base_is_never_held_whole(tiny_config: ModelConfig, live_bytes: Any) -> None:
    """Guards: fp32 copies of the matrices made on the way in, or kept: a 7B would need 28 GB."""
    model = tiny_config.model_copy(update={"num_hidden_layers": 6})
    tensors = lively_parameters(model)
    matrices = sum(t.data.nbytes for n, t in tensors.items() if "_proj" in n)
    largest = max(t.data.nbytes for n, t in tensors.items() if "_proj" in n)
    with live_bytes() as watch:
        decoder, adapter = adapted_decoder(
            model, AdapterOptions(rank=1, base_bits=4), CPU, torch.float32
        )
        adapter.import_base(DictSource(tensors))
    others = sum(t.data.nbytes for n, t in tensors.items() if "_proj" not in n)
    assert watch.live < 0.2 * matrices + 1.1 * others + 200_000
    assert watch.peak < watch.live + 4 * largest
    names = {name.rpartition(".")[2] for name, p in decoder.named_parameters() if p.is_meta}
    assert names == set(STORED)


def test_a_quantised_session_computes_with_its_codes(
    tiny_config: ModelConfig, make_batch: Callable[..., Batch]
) -> None:
    """Guards: a base decoded from other rows than it was coded from. The same loss comes from a
    plain session over the decoded weights."""
    fields: dict[str, Any] = {"rank": 2, "target_modules": ("v_proj", "up_proj")}
    adapter, batch = AdapterOptions(base_bits=4, **fields), make_batch(2, 24)
    session, tensors = session_of(tiny_config, adapter), lively_parameters(tiny_config)
    decoded = {}
    for spec in parameter_table(tiny_config):
        tensor = torch.from_numpy(tensors[spec.name].data)
        if "_proj" in spec.name:
            matrix = Nf4Matrix(spec.shape, CPU, torch.float32)
            matrix.encode(tensor)
            tensor = torch.empty(spec.shape)
            matrix.decode_into(tensor)
        decoded[spec.name] = HostTensor.of(tensor.numpy())
    plain = session_of(tiny_config, AdapterOptions(**fields), base=False)
    plain.import_base(DictSource(decoded))
    np.testing.assert_allclose(
        session.token_logprobs(batch), plain.token_logprobs(batch), rtol=0, atol=1e-5
    )
    assert session.probe_step(batch).grad_norm == pytest.approx(
        plain.probe_step(batch).grad_norm, rel=1e-4
    )


def test_checkpointing_changes_no_gradient(
    tiny_config: ModelConfig, make_batch: Callable[..., Batch]
) -> None:
    """Guards: a block recomputed with its adapter off, or accumulated twice."""
    found = []
    for checkpointing in (False, True):
        options = SessionOptions(OptimizerTable(name="adamw"), adapter=AdapterOptions(rank=2))
        plan = Plan(8, checkpointing, "float32", 64, 8)
        session = AdapterSession(tiny_config, options, plan, CPU)
        session.import_base(DictSource(lively_parameters(tiny_config)))
        found.append(session.gradients(make_batch(2, 24)))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_what_cannot_be_is_refused(
    tiny_config: ModelConfig, make_batch: Callable[..., Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a step on uninitialised weights; Muon on factors; a base of another model."""
    session = session_of(tiny_config, AdapterOptions(rank=2), base=False)
    for call in (session.probe_step, session.eval_step):
        with pytest.raises(BackendError, match="no base yet"):
            call(make_batch(2, 24))
    tensors = lively_parameters(tiny_config)
    del tensors["model.norm.weight"]
    with pytest.raises(IntegrityError, match=r"missing model\.norm\.weight"):
        session.import_base(DictSource(tensors))
    with pytest.raises(BackendError, match="not trained with muon"):
        session_of(tiny_config, AdapterOptions(rank=2), name="muon")
    with pytest.raises(ConfigError, match="lagged"):
        session_of(tiny_config, AdapterOptions(rank=2), clip="lagged")
    monkeypatch.setattr(quant, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match="bitsandbytes"):
        session_of(tiny_config, AdapterOptions(rank=2, base_bits=4))
