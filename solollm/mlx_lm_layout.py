"""An adapter in mlx-lm's layout, beside PEFT's: names, orientation, scale.

mlx-lm keeps `<module>.lora_a` [in, r] and `.lora_b` [r, out], the transposed factors, in one file,
and in `adapter_config.json` the scale itself where PEFT has an alpha. What an adapter is stands in
`adapters`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from solollm.adapters import PEFT_PREFIX, TARGET_MODULES, AdapterOptions
from solollm.errors import ConfigError

MLX_LM_WEIGHTS = "adapters.safetensors"
_MODULE = re.compile(
    r"model\.layers\.(0|[1-9][0-9]{0,3})\.(self_attn|mlp)\.(" + "|".join(TARGET_MODULES) + r")"
    r"\.lora_([ab])"
)


def mlx_lm_config(options: AdapterOptions, num_layers: int) -> dict[str, Any]:
    """`adapter_config.json` as `mlx_lm` reads it."""
    homes = {name: "self_attn" if name[0] in "qkvo" else "mlp" for name in options.target_modules}
    return {
        "fine_tune_type": "lora",
        "num_layers": num_layers,
        "lora_parameters": {
            "rank": options.rank,
            "scale": options.scale,
            "dropout": 0.0,
            "keys": [f"{home}.{name}" for name, home in homes.items()],
        },
    }


def is_mlx_lm(config: Mapping[str, Any]) -> bool:
    """Whether an `adapter_config.json` is mlx-lm's; PEFT's always has a `peft_type`."""
    return "lora_parameters" in config and "peft_type" not in config


def read_mlx_lm_config(config: Mapping[str, Any], names: Sequence[str]) -> AdapterOptions:
    """The options of an mlx-lm adapter with tensors of these names, which alone say what is adapted
    (`keys` may be left out).

    Raises:
        ConfigError: another kind than plain LoRA, values out of range, a tensor of no projection.
    """
    kind, table = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    if kind != "lora" or not isinstance(table, Mapping):
        raise ConfigError(
            f"adapter_config.json describes an adapter of the kind {kind!r:.40}",
            why="an adapter here is plain LoRA",
            fix="fuse it into its base with `mlx_lm fuse` and import the result",
        )
    rank, scale = table.get("rank"), table.get("scale")
    modules = sorted({peft_name(name).split(".")[-3] for name in names})
    try:
        return AdapterOptions.model_validate(
            {"rank": rank, "alpha": float(scale) * int(rank), "target_modules": modules}  # type: ignore[arg-type]
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            "adapter_config.json describes no adapter that is computed here", why=str(error)
        ) from error


def peft_name(name: str) -> str:
    """PEFT's name of one of mlx-lm's tensors. Raises ConfigError for one of no projection."""
    found = _MODULE.fullmatch(name)
    if found is None:
        raise ConfigError(
            f"{name!r:.80} is no factor of an adapter that is computed here",
            why=f"adapted are the layers' {', '.join(TARGET_MODULES)}",
            fix="fuse it into its base with `mlx_lm fuse` and import the result",
        )
    return f"{PEFT_PREFIX}{name[:-1]}{found[4].upper()}.weight"


def mlx_lm_name(name: str) -> str:
    """The other way: mlx-lm's name of one of PEFT's tensors."""
    stem = name.removeprefix(PEFT_PREFIX).removesuffix(".weight")  # ...lora_A
    return stem[:-1] + stem[-1].lower()


def transposed(factor: np.ndarray) -> np.ndarray:
    """A factor in the other program's orientation, contiguous."""
    return np.ascontiguousarray(factor.T)
