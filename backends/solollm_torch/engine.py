"""An engine of PyTorch: weights ready to generate, from a checkpoint or of a live session.

How requests run is in `decoding`, the forward pass in `inference`, the memory in `kv_cache`,
what prompts share in `prefix`, the choice of a token in `solollm.sampling`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from solollm.adapted import (
    AdapterFolder,
    HeldSource,
    MergedSource,
    common_codec,
    open_adapters,
)
from solollm.architecture import ModelConfig, parameter_table
from solollm.backend import Engine, EngineOptions, HostTensor, TensorSource
from solollm.engine_input import complete_options, read_model_config
from solollm.errors import IntegrityError
from solollm.tensorfile import open_weights
from solollm_torch.decoding import TorchDecoder
from solollm_torch.inference import InferenceModel
from solollm_torch.live_adapters import LiveAdapters
from solollm_torch.model import Decoder

_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip
_OPTIONS = ("pack", "prefill_tokens", "prefix_slots")


class TorchEngine(Engine):
    """An engine over a decoder module, without a copy where the dtype is the module's own.

    `options.backend_options`: `pack` (bool, default off: copy the matrices into a layout that
    generates faster on a CPU), `prefill_tokens` (int: prompt tokens read per step) and
    `prefix_slots` (int, default 0: room in the cache for this many more sequences than run at once,
    so that beginnings shared by later prompts are kept longer).
    """

    def __init__(self, decoder: Decoder, options: EngineOptions, *, release: bool = False) -> None:
        """`release`: the decoder is this engine's alone, and its blocks may be given up.

        Raises:
            ConfigError: an option that the model cannot serve.
        """
        self.model = decoder.config
        self.options = complete_options(options, decoder.config, known=_OPTIONS)
        self.device = decoder.embed_tokens.device
        dtype = _DTYPES.get(self.options.compute_dtype, decoder.compute_dtype)
        given, default_tokens = self.options.backend_options, prefill_tokens(self.device)
        self.prefill_tokens = max(1, int(given.get("prefill_tokens", default_tokens)))
        self.prefix_slots = max(0, int(given.get("prefix_slots", 0)))
        can_pack = (
            self.device.type == "cpu"
            and dtype == torch.float32
            and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        )
        with torch.inference_mode():
            self.inference = InferenceModel(
                decoder,
                dtype=dtype,
                max_seq_len=self.options.max_seq_len,
                pack=can_pack and bool(given.get("pack", False)),
                release=release,
            )

    @classmethod
    def load(
        cls, checkpoint: Path, options: EngineOptions, device: torch.device | str = "cpu"
    ) -> TorchEngine:
        """The engine of a checkpoint directory (`config.json` and safetensors weights).

        `compute_dtype` "auto" is float32 on a CPU, else bfloat16 where the device has it. `pack` is
        on unless switched off. An adapter that is the only one and the default is merged into the
        weights; any others stay beside them, so that each request may have its own.

        Raises:
            ConfigError: no checkpoint there, or a model or adapter that is not computed here.
            IntegrityError: weights that are damaged, missing, unexpected or misshapen.
        """
        device = torch.device(device)
        config = read_model_config(checkpoint)
        dtype = _DTYPES.get(options.compute_dtype) or _preferred_dtype(device)
        adapters = open_adapters(options, config)
        is_live = set(adapters) != {options.adapter} - {None}
        decoder = Decoder(config, device=device, dtype=dtype)
        weights = open_weights(checkpoint)
        try:
            _fill(decoder, _adapted(weights, adapters, config, is_live=is_live), checkpoint)
        finally:
            weights.close()
        options = replace(options, backend_options={"pack": True, **options.backend_options})
        engine = cls(decoder, options, release=True)
        if is_live:
            like = engine.inference.norm
            engine.inference.adapters = LiveAdapters(adapters, options.adapter, config, like)
        return engine

    def open(self) -> TorchDecoder:
        return TorchDecoder(
            self.inference,
            self.options,
            prefill_tokens=self.prefill_tokens,
            prefix_slots=self.prefix_slots,
        )


def prefill_tokens(device: torch.device) -> int:
    """Prompt tokens that are read per step, where nobody says otherwise."""
    return 512 if device.type == "cpu" else 2048


def _adapted(
    source: TensorSource,
    adapters: Mapping[str, AdapterFolder],
    model: ModelConfig,
    *,
    is_live: bool,
) -> TensorSource:
    """The base's tensors as its adapters were trained over them, with the only one merged in."""
    codec = common_codec(adapters.values())
    if is_live or not adapters:
        return HeldSource(source, codec)
    (only,) = adapters.values()
    return MergedSource(source, only, model)


def _preferred_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.float32


def _fill(decoder: Decoder, source: TensorSource, checkpoint: Path) -> None:
    expected = {spec.name: spec.shape for spec in parameter_table(decoder.config)}
    present = set(source.names())
    if decoder.config.tie_word_embeddings:
        present.discard("lm_head.weight")  # some exporters write the tied head a second time
    if present != set(expected):
        missing, unexpected = sorted(set(expected) - present), sorted(present - set(expected))
        raise IntegrityError(
            f"the weights of {checkpoint} do not fit its config.json",
            why=f"missing: {missing[:5] or 'none'}, unexpected: {unexpected[:5] or 'none'}",
            fix="export or download the checkpoint again",
        )
    decoder.load((name, _read(source, name, shape)) for name, shape in expected.items())


def _read(source: TensorSource, name: str, shape: tuple[int, ...]) -> Tensor:
    host: HostTensor = source.read(name)
    if host.shape != shape:
        raise IntegrityError(
            f"tensor {name} has shape {list(host.shape)}",
            why=f"config.json makes it {list(shape)}",
            fix="use the config.json that belongs to these weights",
        )
    tensor = torch.from_numpy(host.data)
    return tensor.view(torch.bfloat16) if host.dtype == "BF16" else tensor
