"""Adapters on MLX: PEFT's logits and gradients, the quantised base, compiled and recomputed steps,
what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="these tests need mlx")
import mlx.core as mx
from solollm_mlx.adapter import read_base
from solollm_mlx.adapter_session import AdapterSession
from solollm_mlx.backend import MlxBackend
from solollm_mlx.model import logits

from solollm import affine_codec
from solollm.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    AdapterOptions,
    adapter_table,
    peft_config,
)
from solollm.architecture import ModelConfig
from solollm.backend import Batch, DictSource, HostTensor, Plan, SessionOptions
from solollm.config import OptimizerTable
from solollm.errors import BackendError, ConfigError, IntegrityError
from solollm.strictfile import encode_json
from solollm.tensorfile import FOR_TRANSFORMERS, WEIGHTS, write_tensors
from solollm.testing.bench import (
    QUANTISABLE,
    lively_parameters,
    require_same_state,
    state_of,
)

MakeBatch = Callable[..., Batch]


def session_of(
    model: ModelConfig,
    adapter: AdapterOptions,
    *,
    base: bool = True,
    compile: bool = False,
    checkpointing: bool = False,
    **table: Any,
) -> AdapterSession:
    options = SessionOptions(
        OptimizerTable.model_validate({"name": "adamw", **table}),
        adapter=adapter, backend_options={"compile": compile},
    )  # fmt: skip
    session = MlxBackend().train_session(model, options, Plan(4, checkpointing, "float32", 64, 8))
    assert isinstance(session, AdapterSession)
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
        peft = pytest.importorskip("peft", reason="this test needs peft")
        from transformers import AutoModelForCausalLM

        base, tuned = tmp_path / "base", tmp_path / "adapter"
        for folder in (base, tuned):
            folder.mkdir()
        (base / "config.json").write_bytes(encode_json(model.to_hf()))
        write(base / WEIGHTS, lively_parameters(model))
        (tuned / ADAPTER_CONFIG).write_bytes(encode_json(peft_config(adapter)))
        write(tuned / ADAPTER_WEIGHTS, factors)
        whole = AutoModelForCausalLM.from_pretrained(base, attn_implementation="sdpa")
        return peft.PeftModel.from_pretrained(whole, tuned, is_trainable=True)

    return load


# PEFT 0.21 asks transformers 5.2x for a property under its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize(
    ("rslora", "modules"), [(False, None), (True, ("q_proj", "v_proj", "up_proj"))]
)
def test_logits_and_gradients_are_pefts(
    in_peft: Callable[..., Any], make_batch: MakeBatch, tiny_config: ModelConfig,
    rslora: bool, modules: Sequence[Any] | None,
) -> None:  # fmt: skip
    """Guards: names or orientation that PEFT reads otherwise, a scale of another kind, a gradient
    that stops at a frozen matrix."""
    import torch

    model = tiny_config.model_copy(update={"qk_norm": True, "rope_theta": 5e5})
    fields = {"target_modules": tuple(modules)} if modules else {}
    adapter = AdapterOptions.model_validate({"rank": 4, "alpha": 6, "use_rslora": rslora, **fields})
    factors, batch = random_factors(model, adapter), make_batch(3, 20)
    session = session_of(model, adapter, clip_norm=0.0)
    session.import_parameters(DictSource(factors))
    theirs = in_peft(model, adapter, factors)
    expected = theirs(input_ids=torch.from_numpy(batch.input_ids.astype(np.int64))).logits
    whole = session._whole(session._weights, session._frozen)
    ours = logits(whole, mx.array(batch.input_ids), None, config=model, project=session._project)
    np.testing.assert_allclose(np.array(ours), expected.detach().numpy(), rtol=0, atol=1e-4)
    labels = torch.from_numpy(batch.labels.astype(np.int64))
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten()).backward()
    wanted = {
        name.replace(".default.weight", ".weight"): p.grad.numpy()
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    gradients = session.gradients(batch)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        limit = 1e-4 * float(np.abs(wanted[name]).max())
        np.testing.assert_allclose(
            np.array(gradient), wanted[name], rtol=0, atol=limit, err_msg=name
        )


def test_codes_are_those_of_the_core() -> None:
    """Guards: an export that decodes, and merges into, another base than was trained on."""
    model, tensors = QUANTISABLE, lively_parameters(QUANTISABLE)
    base = read_base(DictSource(tensors), model, mx.float32, bits=4)
    name = "model.layers.1.mlp.down_proj"
    expected = affine_codec.quantize(tensors[f"{name}.weight"].data, bits=4, group_size=64)
    for part, wanted in zip(("weight", "scales", "biases"), expected, strict=True):
        assert np.array_equal(np.array(base[f"{name}.{part}"]), wanted), part
    assert base["model.embed_tokens.weight"].dtype == mx.float32


def test_a_quantised_session_computes_with_its_codes(make_batch: MakeBatch) -> None:
    """Guards: a base decoded from other rows than it was coded from, a gradient that passes it by.
    The same loss and gradients come from a plain session over the decoded weights."""
    fields: dict[str, Any] = {"rank": 2, "target_modules": ("v_proj", "up_proj")}
    batch, tensors = make_batch(2, 24), lively_parameters(QUANTISABLE)
    batch.input_ids[:], batch.labels[batch.labels >= 96] = batch.input_ids % 90, 5
    coded = session_of(QUANTISABLE, AdapterOptions(base_bits=4, **fields))
    plain = session_of(QUANTISABLE, AdapterOptions(**fields), base=False)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            codes = affine_codec.quantize(tensor.data, bits=4, group_size=64)
            tensors[name] = HostTensor.of(affine_codec.dequantize(codes, bits=4))
    plain.import_base(DictSource(tensors))
    factors = random_factors(QUANTISABLE, AdapterOptions(**fields))
    for session in (coded, plain):
        session.import_parameters(DictSource(factors))
    np.testing.assert_allclose(
        coded.token_logprobs(batch), plain.token_logprobs(batch), rtol=0, atol=1e-5
    )
    expected = plain.gradients(batch)
    for name, gradient in coded.gradients(batch).items():
        limit = 1e-4 * float(mx.abs(expected[name]).max())
        np.testing.assert_allclose(
            np.array(gradient), np.array(expected[name]), rtol=0, atol=limit, err_msg=name
        )


def test_a_quantised_base_is_never_held_whole() -> None:
    """Guards: fp32 copies of the matrices made on the way in, or kept: a 7B would need 28 GB."""
    model = QUANTISABLE.model_copy(update={"num_hidden_layers": 8})
    tensors = lively_parameters(model)
    matrices = sum(t.data.nbytes for n, t in tensors.items() if "_proj" in n)
    others = sum(t.data.nbytes for n, t in tensors.items() if "_proj" not in n)
    largest = max(t.data.nbytes for t in tensors.values())
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    base = read_base(DictSource(tensors), model, mx.float32, bits=4)
    kept, peak = mx.get_active_memory() - held, mx.get_peak_memory() - held
    assert kept < 0.17 * matrices + 1.2 * others + 64 * len(base)  # 5 bits of 32
    assert peak < kept + 4 * largest


@pytest.mark.parametrize("bits", [None, 4], ids=["lora", "qlora"])
def test_compiled_recomputed_and_plain_steps_are_one(make_batch: MakeBatch, bits: Any) -> None:
    """Guards: fused kernels that round otherwise (a resume would depend on a setting); a block
    recomputed without its adapter, or with another layer's codes."""
    adapter = AdapterOptions(rank=4, base_bits=bits)
    sessions = [
        session_of(QUANTISABLE, adapter, compile=compiled, checkpointing=checkpointing)
        for compiled, checkpointing in ((False, False), (True, False), (False, True))
    ]
    batches = []
    for step in range(3):
        batch = make_batch(6, 24, seed=step, packed=True)
        batch.input_ids[:], batch.labels[batch.labels >= 96] = batch.input_ids % 90, 5
        batches.append(batch)
    plain, compiled, recomputed = (
        [session.train_step(batch, lr=1e-2).result() for batch in batches] for session in sessions
    )
    assert compiled == plain
    require_same_state(state_of(sessions[1]), state_of(sessions[0]), "compiled against eager")
    for one, other in zip(recomputed, plain, strict=True):
        np.testing.assert_allclose(one[:2], other[:2], rtol=1e-5)


def test_half_precision_keeps_factors_whole(make_batch: MakeBatch) -> None:
    """Guards the casts: the frozen base in bf16, factors and moments in fp32."""
    options = SessionOptions(OptimizerTable(name="adamw"), adapter=AdapterOptions(base_bits=4))
    session = MlxBackend().train_session(QUANTISABLE, options, Plan(4, False, "bfloat16", 64, 8))
    session.import_base(DictSource(lively_parameters(QUANTISABLE)))
    batch = make_batch(2, 16)
    batch.input_ids[:], batch.labels[batch.labels >= 96] = batch.input_ids % 90, 5
    exact = session_of(QUANTISABLE, AdapterOptions(base_bits=4))
    losses = [s.train_step(batch, lr=1e-3).result().loss for s in (exact, session)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-2)
    assert {t.dtype for t in state_of(session).parameters.values()} == {"F32"}
    assert session._frozen["model.layers.0.mlp.up_proj.scales"].dtype == mx.bfloat16


def test_what_cannot_be_is_refused(tiny_config: ModelConfig, make_batch: MakeBatch) -> None:
    """Guards: a step on a base that is not there; Muon on factors; a base of another model, or one
    of which nothing would be quantised."""
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
    narrow = tiny_config.model_copy(update={"intermediate_size": 96})
    with pytest.raises(ConfigError, match="multiple of 64"):
        session_of(narrow, AdapterOptions(rank=2, base_bits=4))
