"""From a checkpoint to a folder that transformers, mlx-lm, vLLM and others load.

One layout serves them all; for mlx-lm the matrices may be quantised besides. Weights go through one
at a time: read and proven, rounded, quantised, written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from solollm.affine_codec import quantize
from solollm.architecture import ModelConfig, parameter_table
from solollm.backend import ComputeDType, DType, HostTensor, TensorSource
from solollm.bases import is_adapter
from solollm.completion import find_checkpoint
from solollm.errors import ConfigError, SoloLLMError
from solollm.export.adapter import export_mlx_lm_adapter
from solollm.export.card import CardFacts, Training, model_card, read_training
from solollm.export.gguf import GgufLayout, write_gguf_folder
from solollm.export.source import Source, open_source
from solollm.model_folder import (
    CONFIG,
    GENERATION,
    SHARD_BYTES,
    require_free,
    write_model_folder,
)
from solollm.rounding import DTYPE_NAMES, DTYPE_TAGS, common_dtype, rounded
from solollm.strictfile import encode_json
from solollm.tensorheader import Spec

Target = Literal["hf", "mlx", "gguf"]
QUANTIZED_BITS = (4, 8)
GROUP_SIZE = 64


@dataclass(frozen=True)
class ExportReport:
    """What was written. `source`: the folder it was made from; `plain_matrices`: those that stay in
    `dtype` although `bits` was asked for, because their rows do not divide into groups."""

    out: Path
    source: Path
    target: Target
    dtype: ComputeDType
    bits: int | None
    num_parameters: int
    num_bytes: int
    plain_matrices: tuple[str, ...]
    notes: tuple[str, ...]


def export_model(
    source: Path,
    out: Path,
    *,
    target: Target = "hf",
    dtype: ComputeDType | None = None,
    bits: int | None = None,
    merge: bool = False,
    base: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> ExportReport:
    """Write a run's newest checkpoint, a checkpoint or a model folder as the model folder `out`.

    An adapter's checkpoint without `merge` becomes mlx-lm's adapter with target "mlx"; for "hf" it
    is in PEFT's layout as it stands.

    Args:
        target: "hf" for transformers, vLLM and others; "mlx" for mlx-lm; "gguf" for llama.cpp and
            Ollama (`solollm.export.gguf`).
        dtype: of the weights; default: what they are stored in. Rounded to nearest, ties to even.
        bits: 4 or 8. "mlx": matrices as affine codes in groups of 64, with the bits of
            `mx.quantize`; `dtype` is then that of norms and scales. "gguf": as Q4_0 (the head as
            Q8_0) or Q8_0, in blocks of 32; norms stay float32.
        merge: an adapter's checkpoint as the whole model that it makes of its base, which was
            decoded from its codes first if it was quantised; `base`: the base's folder, if it is
            not where the run says.

    Raises:
        ConfigError: settings that do not go together, `out` is taken, no model at `source`, a
            weight that does not fit `dtype`, a tokenizer that llama.cpp cannot have.
        IntegrityError: damaged files; nothing is written.
        StorageError: the disk is full or failing; nothing is left at `out`.
    """
    _check_bits(target, bits)
    require_free(out)
    if target == "mlx" and not merge:
        folder, notes = find_checkpoint(source)
        if is_adapter(folder):
            return _adapter_report(folder, out, notes, dtype=dtype, bits=bits)
    with open_source(source, merge=merge, base=base) as opened:
        tag = DTYPE_TAGS[dtype] if dtype else common_dtype(opened.dtypes)
        layout: Layout | GgufLayout = Layout.of(opened.model, tag, bits)
        if target == "gguf":
            layout = GgufLayout(opened.model, tag, bits)
        card, notes = _card(opened, out.resolve().name, target, layout.words())
        if isinstance(layout, GgufLayout):
            num_bytes = write_gguf_folder(opened, out, layout, {"README.md": card})
        else:
            num_bytes = _write_hf(opened, out, layout, card, shard_bytes=shard_bytes)
        return ExportReport(
            out=out,
            source=opened.path,
            target=target,
            dtype=DTYPE_NAMES[tag],
            bits=bits,
            num_parameters=opened.model.num_parameters(),
            num_bytes=num_bytes,
            plain_matrices=layout.plain_matrices(),
            notes=(*opened.notes, *notes),
        )


def _write_hf(opened: Source, out: Path, layout: Layout, card: bytes, *, shard_bytes: int) -> int:
    """Write the folder that transformers, vLLM and mlx-lm load; gives its size."""
    config = opened.model.to_hf(torch_dtype=DTYPE_NAMES[layout.dtype], **opened.token_ids)
    files = {
        CONFIG: encode_json(config | layout.config()),
        GENERATION: encode_json(dict(opened.generation)),
        **opened.tokenizer.files(),
        "README.md": card,
    }
    tensors = layout.tensors(opened.tensors)
    return write_model_folder(out, files, layout.specs(), tensors, shard_bytes=shard_bytes)


def _adapter_report(
    folder: Path, out: Path, notes: tuple[str, ...], *, dtype: ComputeDType | None, bits: int | None
) -> ExportReport:
    """Write an adapter's checkpoint as mlx-lm's adapter."""
    if bits is not None or dtype not in (None, "float32"):
        raise ConfigError(
            f"{folder} holds an adapter, whose factors stay float32",
            why="--bits and --dtype are for whole models",
            fix="leave them out, or give --merge for the model that it makes of its base",
        )
    num_parameters, num_bytes = export_mlx_lm_adapter(folder, out)
    note = "an adapter for mlx-lm (--adapter-path); its base is not in it"
    return ExportReport(
        out=out, source=folder, target="mlx", dtype="float32", bits=None,
        num_parameters=num_parameters, num_bytes=num_bytes, plain_matrices=(),
        notes=(*notes, note),
    )  # fmt: skip


class Layout(NamedTuple):
    """The tensors of an export: the model's own, matrices in codes where `bits` says so."""

    shapes: Mapping[str, tuple[int, ...]]
    dtype: DType
    bits: int | None

    @classmethod
    def of(cls, model: ModelConfig, dtype: DType, bits: int | None) -> Layout:
        return cls({spec.name: spec.shape for spec in parameter_table(model)}, dtype, bits)

    def config(self) -> dict[str, Any]:
        """What `config.json` says of the codes; mlx-lm writes both keys, and so do we."""
        if self.bits is None:
            return {}
        settings = {"group_size": GROUP_SIZE, "bits": self.bits, "mode": "affine"}
        return {"quantization": settings, "quantization_config": settings}

    def specs(self) -> list[Spec]:
        """Name, dtype and shape of every tensor of the files, in order."""
        return [spec for name in self.shapes for spec in self._specs_of(name)]

    def tensors(self, source: TensorSource) -> Iterator[tuple[str, HostTensor]]:
        """The tensors that `specs` promises."""
        for name in self.shapes:
            tensor = rounded(name, source.read(name), self.dtype)
            if self._is_quantized(name):
                yield from self._codes(name, tensor)
            else:
                yield name, tensor

    def words(self) -> str:
        """What weights are stored as, for the model card."""
        dtype = DTYPE_NAMES[self.dtype]
        if self.bits is None:
            return dtype
        return f"{self.bits}-bit affine codes in groups of {GROUP_SIZE}; scales and norms {dtype}"

    def plain_matrices(self) -> tuple[str, ...]:
        """The matrices that are no codes although codes were asked for."""
        if self.bits is None:
            return ()
        matrices = [name for name, shape in self.shapes.items() if len(shape) == 2]
        return tuple(name for name in matrices if not self._is_quantized(name))

    def _is_quantized(self, name: str) -> bool:
        shape = self.shapes[name]
        return self.bits is not None and len(shape) == 2 and shape[1] % GROUP_SIZE == 0

    def _specs_of(self, name: str) -> list[Spec]:
        shape = self.shapes[name]
        if self.bits is None or not self._is_quantized(name):
            return [(name, self.dtype, shape)]
        rows, columns = shape
        groups = (rows, columns // GROUP_SIZE)
        codes, scales, biases = _part_names(name)
        return [
            (codes, "U32", (rows, columns * self.bits // 32)),
            (scales, self.dtype, groups),
            (biases, self.dtype, groups),
        ]

    def _codes(self, name: str, tensor: HostTensor) -> Iterator[tuple[str, HostTensor]]:
        assert self.bits is not None
        matrix = quantize(tensor.float32(), bits=self.bits, group_size=GROUP_SIZE)
        codes, scales, biases = _part_names(name)
        yield codes, HostTensor("U32", matrix.codes.shape, matrix.codes)
        yield scales, rounded(scales, HostTensor.of(matrix.scales), self.dtype)
        yield biases, rounded(biases, HostTensor.of(matrix.biases), self.dtype)


def _part_names(name: str) -> tuple[str, str, str]:
    prefix = name.removesuffix("weight")
    return name, f"{prefix}scales", f"{prefix}biases"


def _check_bits(target: Target, bits: int | None) -> None:
    if bits is None:
        return
    if target == "hf":
        raise ConfigError(
            f"--bits {bits} goes with --to mlx and --to gguf only",
            why="codes are theirs; transformers refuses such a folder",
            fix="leave --bits out, or export --to mlx or gguf",
        )
    if bits not in QUANTIZED_BITS:
        raise ConfigError(f"--bits {bits} is not 4 or 8", fix="choose 4 or 8")


def _card(source: Source, name: str, target: Target, weights: str) -> tuple[bytes, tuple[str, ...]]:
    """README.md, and what has to be said of it."""
    training, notes = _training(source)
    facts = CardFacts(
        name=name,
        model=source.model,
        target=target,
        weights=weights,
        training=training,
        origin=source.origin,
        checkpoint=source.path.name,
    )
    return model_card(facts).encode(), notes


def _training(source: Source) -> tuple[Training | None, tuple[str, ...]]:
    """The record for the card, and what has to be said of it: a run's damaged log must not keep its
    intact weights from being exported."""
    notes: tuple[str, ...] = ()
    if (source.path / "README.md").is_file():
        notes = (f"{source.path / 'README.md'} stays behind: the export has a card of its own",)
    try:
        return read_training(source.run, source.state), notes
    except SoloLLMError as error:
        note = f"README.md knows of the checkpoint alone, the run's own record is damaged: {error}"
        return read_training(None, source.state), (*notes, note)
