"""The part `qlora` of `gpu_check.py`: a 7B in NF4 with an adapter, beside transformers and peft."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from solollm.adapters import AdapterOptions
from solollm.architecture import ModelConfig, parameter_table
from solollm.backend import Batch, DType, HostTensor, Plan, SessionOptions
from solollm.config import OptimizerTable
from solollm.dial import preset
from solollm.rounding import rounded

RANK, LR, STEPS = 16, 2e-4, 6
VOCAB_SIZE = 32_000
_NOISE = 1 << 22


class NoiseSource:
    """A base of the right size and spread, cheap to make: one block of noise, repeated."""

    def __init__(self, model: ModelConfig, dtype: DType = "F32") -> None:
        self._shapes = {spec.name: spec.shape for spec in parameter_table(model)}
        noise = np.random.default_rng(0).standard_normal(_NOISE, np.float32) * 0.02
        self._noise = rounded("noise", HostTensor.of(noise), dtype)

    def names(self) -> Sequence[str]:
        return list(self._shapes)

    def read(self, name: str) -> HostTensor:
        shape = self._shapes[name]
        return HostTensor(self._noise.dtype, shape, np.resize(self._noise.data, shape))


def figures(device: Any, *, tiny: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Peak bytes on the card and tokens per second, ours and the peer's."""
    model = preset("15m" if tiny else "7b", VOCAB_SIZE)
    length = 256 if tiny else 2048
    yield "of the model", lambda: {
        "parameters": model.num_parameters(), "rows": 1, "tokens_per_row": length, "rank": RANK,
    }  # fmt: skip
    yield "ours", partial(_ours, device, model, length)
    yield "peer", partial(_peer, device, model, length)
    if device.type == "cuda":
        yield "paged", partial(_ours, device, model, length, paged=True)


def conclude(measured: dict[str, Any]) -> None:
    """Our speed over the peer's."""
    pair = [measured.get(name, {}).get("tokens_per_second") for name in ("ours", "peer")]
    if all(pair):
        measured["ours"]["speedup"] = pair[0] / pair[1]


def _ours(device: Any, model: ModelConfig, length: int, *, paged: bool = False) -> dict[str, float]:
    from solollm_torch.adapter_session import AdapterSession

    dtype = "bfloat16" if device.type == "cuda" else "float32"
    options = SessionOptions(
        OptimizerTable(name="adamw", weight_decay=0.0, state_bits=8 if paged else 32, paged=paged),
        adapter=AdapterOptions(rank=RANK, alpha=2.0 * RANK, base_bits=4),
    )
    session = AdapterSession(model, options, Plan(1, True, dtype, length, 1), device)
    session.import_base(NoiseSource(model))
    batches = [_row(step, length) for step in range(STEPS)]
    found = _timed(device, length, lambda step: session.train_step(batches[step], lr=LR).result())
    session.close()
    return found


def _peer(device: Any, model: ModelConfig, length: int) -> dict[str, float]:
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from solollm.model_folder import write_model_folder
    from solollm.strictfile import encode_json

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tag: DType = "BF16" if device.type == "cuda" else "F32"
    source = NoiseSource(model, tag)
    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        specs: Any = [(spec.name, tag, spec.shape) for spec in parameter_table(model)]
        config = {"config.json": encode_json(model.to_hf(torch_dtype=str(dtype)[6:]))}
        tensors: Any = ((name, source.read(name)) for name in source.names())
        write_model_folder(base, config, specs, tensors)
        whole = AutoModelForCausalLM.from_pretrained(
            base, quantization_config=quantised, attn_implementation="sdpa", dtype=dtype,
            device_map=device.type,
        )  # fmt: skip
    whole = prepare_model_for_kbit_training(
        whole,
        use_gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    tuned = get_peft_model(
        whole, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    )
    tuned.config.use_cache = False
    tuned.train()
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=device.type == "cuda")

    def step(number: int) -> None:
        ids = torch.from_numpy(_row(number, length).input_ids.astype(np.int64)).to(device)
        tuned(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return _timed(device, length, step)


def _timed(device: Any, length: int, step: Callable[[int], object]) -> dict[str, float]:
    import torch

    on_card = device.type == "cuda"
    if on_card:
        torch.cuda.reset_peak_memory_stats()
    step(0)
    if on_card:
        torch.cuda.synchronize()
    begun = time.monotonic()
    for number in range(1, STEPS):
        step(number)
    if on_card:
        torch.cuda.synchronize()
    seconds = time.monotonic() - begun
    peak = torch.cuda.max_memory_allocated() if on_card else 0
    return {"peak_bytes": float(peak), "tokens_per_second": (STEPS - 1) * length / seconds}


def _row(step: int, length: int) -> Batch:
    ids = np.random.default_rng(step).integers(0, VOCAB_SIZE, (1, length + 1)).astype(np.int32)
    return Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), float(length))
