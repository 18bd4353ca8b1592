"""From an adapter's checkpoint to a folder that `mlx_lm generate --adapter-path` loads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from solollm.adapted import AdapterFolder
from solollm.adapters import ADAPTER_CONFIG
from solollm.backend import HostTensor
from solollm.checkpoint import open_checkpoint
from solollm.mlx_lm_layout import MLX_LM_WEIGHTS, mlx_lm_config, mlx_lm_name, transposed
from solollm.model_folder import write_folder
from solollm.strictfile import encode_json


def export_mlx_lm_adapter(checkpoint: Path, out: Path) -> tuple[int, int]:
    """Write the adapter alone, float32, into the new folder `out`; gives the number of its
    parameters and of the bytes written. Raises as `export_model`."""
    with closing(open_checkpoint(checkpoint)) as opened:
        model = opened.model
    adapter = AdapterFolder(checkpoint, model)

    def tensors() -> Iterator[tuple[str, HostTensor]]:
        for name, factor in adapter.factors.items():
            yield mlx_lm_name(name), HostTensor.of(transposed(factor))

    specs = [(name, tensor.dtype, tensor.shape) for name, tensor in tensors()]
    config = mlx_lm_config(adapter.options, model.num_hidden_layers)
    files = {ADAPTER_CONFIG: encode_json(config)}
    num_bytes = write_folder(out, files, {MLX_LM_WEIGHTS: specs}, tensors())
    return sum(factor.size for factor in adapter.factors.values()), num_bytes
