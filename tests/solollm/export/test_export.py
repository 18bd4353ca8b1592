"""Exported folders, loaded by the programs they are for: the same logits, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from solollm.architecture import ModelConfig, parameter_table
from solollm.backend import HostTensor
from solollm.cli import command
from solollm.config import parse_config
from solollm.errors import ConfigError, IntegrityError
from solollm.export import export_model
from solollm.rounding import rounded
from solollm.runs import Run
from solollm.tensorfile import open_weights
from solollm.tokenizer import Tokenizer

LogitsOf = Callable[[str, Path, np.ndarray], np.ndarray]
SaveTelling = Callable[[Path, ModelConfig], Path]
IDS = np.random.default_rng(3).integers(0, 320, (2, 120))
SMALL = ModelConfig(
    vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, save_telling: SaveTelling) -> Path:
    return save_telling(tmp_path_factory.mktemp("one"), SMALL)


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_every_reader_computes_the_same_logits(
    model_variant: ModelConfig, save_telling: SaveTelling, logits_of: LogitsOf, tmp_path: Path
) -> None:
    """Traps 8.1 and 8.2 of mlx-lm: rope settings in one spelling only are read as theta 10000, and
    a `tie_word_embeddings` left out as true; both without a word."""
    source = save_telling(tmp_path, model_variant)
    report = export_model(source, tmp_path / "out", target="hf")
    assert report.dtype == "float32"
    ours = logits_of("torch", source, IDS)
    assert_close(logits_of("torch", tmp_path / "out", IDS), ours)
    assert_close(logits_of("transformers", tmp_path / "out", IDS), ours)
    assert_close(logits_of("mlx", tmp_path / "out", IDS), ours)


@pytest.mark.parametrize(
    "model_variant",
    ["theta, untied", "llama3 scaling, tied", "llama3 scaling, untied"],
    indirect=True,
)
def test_the_traps_are_there(
    model_variant: ModelConfig, save_telling: SaveTelling, logits_of: LogitsOf, tmp_path: Path
) -> None:
    """The test above could pass on a model that does not show the settings: without them mlx-lm's
    logits must be off by whole units. (Its qwen3 minds the new rope key, and wants the other.)"""
    source = save_telling(tmp_path, model_variant)
    ours = logits_of("torch", source, IDS)
    config = json.loads((source / "config.json").read_text())
    left_out = [("rope_theta", "rope_scaling")]
    if not model_variant.tie_word_embeddings:
        left_out.append(("tie_word_embeddings",))
    for keys in left_out:
        kept = {key: value for key, value in config.items() if key not in keys}
        (source / "config.json").write_text(json.dumps(kept))
        assert np.abs(logits_of("mlx", source, IDS) - ours).max() > 0.5 * np.abs(ours).max()


@pytest.mark.parametrize("model_variant", ["theta, untied", "qk norm, tied"], indirect=True)
@pytest.mark.parametrize(("bits", "dtype"), [(4, "float32"), (8, "bfloat16"), (4, "bfloat16")])
def test_quantised_logits_are_those_of_mx_quantize(
    bits: int, dtype: Any, model_variant: ModelConfig, save_telling: SaveTelling,
    logits_of: LogitsOf, tmp_path: Path,
) -> None:  # fmt: skip
    """Another order of rounding, a tensor under another name, or a config that mlx-lm reads as
    other bits would each be another model; the sequence here is mlx-lm's own."""
    mlx_lm, mx = pytest.importorskip("mlx_lm"), pytest.importorskip("mlx.core")
    source = save_telling(tmp_path, model_variant)
    report = export_model(source, tmp_path / "q", target="mlx", bits=bits, dtype=dtype)
    assert report.plain_matrices == ()
    reference, _ = mlx_lm.load(str(source))
    reference.set_dtype(getattr(mx, dtype))
    reference, config = mlx_lm.utils.quantize_model(reference, {}, group_size=64, bits=bits)
    expected = np.array(reference(mx.array(IDS)).astype(mx.float32))
    np.testing.assert_array_equal(logits_of("mlx", tmp_path / "q", IDS), expected)
    written = json.loads((tmp_path / "q" / "config.json").read_text())
    assert written["quantization"] == config["quantization"] == written["quantization_config"]


def test_matrices_that_do_not_divide_stay_and_are_named(
    save_telling: SaveTelling, logits_of: LogitsOf, tmp_path: Path
) -> None:
    """mlx-lm leaves them alone without a word; a 4-bit model that is half fp32 surprises."""
    source = save_telling(tmp_path, SMALL.model_copy(update={"intermediate_size": 96}))
    report = export_model(source, tmp_path / "q", target="mlx", bits=4)
    assert report.plain_matrices == ("model.layers.0.mlp.down_proj.weight",)
    assert np.isfinite(logits_of("mlx", tmp_path / "q", IDS[:, :32])).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights_are_the_rounded_masters(
    dtype: Any, checkpoint: Path, logits_of: LogitsOf, tmp_path: Path
) -> None:
    """A cast that truncates, or a config.json that names another dtype than the file holds."""
    tag: Any = {"bfloat16": "BF16", "float16": "F16"}[dtype]
    export_model(checkpoint, tmp_path / "out", target="hf", dtype=dtype)
    masters, exported = open_weights(checkpoint), open_weights(tmp_path / "out")
    for spec in parameter_table(SMALL):
        expected, actual = rounded("", masters.read(spec.name), tag), exported.read(spec.name)
        assert actual.dtype == tag
        np.testing.assert_array_equal(actual.data, expected.data)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == dtype
    ours = logits_of("torch", tmp_path / "out", IDS[:, :64])
    assert_close(logits_of("transformers", tmp_path / "out", IDS[:, :64]), ours)


def test_shards_hold_the_same_tensors(
    checkpoint: Path, logits_of: LogitsOf, tmp_path: Path
) -> None:
    """A tensor in the wrong shard, or an index that transformers and mlx-lm do not follow."""
    export_model(checkpoint, tmp_path / "out", target="hf", shard_bytes=60_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    ours = logits_of("torch", checkpoint, IDS[:, :64])
    for reader in ("transformers", "mlx"):
        assert_close(logits_of(reader, tmp_path / "out", IDS[:, :64]), ours)


def test_the_folder_holds_what_its_readers_want(
    checkpoint: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """An optimizer of twice the model's size, or a proof that belongs to other files."""
    export_model(checkpoint, tmp_path / "out", target="hf")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    tokenizer = set(small_tokenizer.files())
    assert names == tokenizer | {
        "config.json", "generation_config.json", "model.safetensors", "README.md",
    }  # fmt: skip
    assert Tokenizer.load(tmp_path / "out").files() == small_tokenizer.files()
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == small_tokenizer.token_ids


def test_an_export_can_be_exported_again(checkpoint: Path, tmp_path: Path) -> None:
    """A bf16 folder for publishing, then 4 bits from it; by default the dtype stays."""
    export_model(checkpoint, tmp_path / "bf16", target="hf", dtype="bfloat16")
    again = export_model(tmp_path / "bf16", tmp_path / "again", target="mlx")
    assert again.dtype == "bfloat16"
    first, second = open_weights(tmp_path / "bf16"), open_weights(tmp_path / "again")
    for name in first.names():
        np.testing.assert_array_equal(first.read(name).data, second.read(name).data)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"target": "hf", "bits": 4}, "--to mlx and --to gguf only"),
        ({"target": "mlx", "bits": 3}, "not 4 or 8"),
    ],
)
def test_settings_that_do_not_go_together(
    options: dict[str, Any], problem: str, checkpoint: Path, tmp_path: Path
) -> None:
    """transformers refuses MLX codes long after the export."""
    with pytest.raises(ConfigError, match=problem):
        export_model(checkpoint, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_nothing_is_ever_written_over(checkpoint: Path, tmp_path: Path) -> None:
    """`--out ~` must not replace a home folder; an empty folder may be there."""
    (tmp_path / "out").mkdir()
    export_model(checkpoint, tmp_path / "out")
    with pytest.raises(ConfigError, match="exists already"):
        export_model(checkpoint, tmp_path / "out")
    with pytest.raises(ConfigError, match="exists already"):
        export_model(checkpoint, checkpoint)


def test_a_weight_too_large_for_fp16_leaves_nothing_behind(
    save_telling: SaveTelling, tmp_path: Path
) -> None:
    """An infinity in the export; or half a folder that looks like a model."""
    source = save_telling(tmp_path, SMALL)
    export_model(source, tmp_path / "plain")
    weights = dict(_read_all(tmp_path / "plain"))
    weights["model.norm.weight"].data[3] = 70_000.0
    _replace_weights(tmp_path / "plain", weights)
    with pytest.raises(ConfigError, match=r"'model\.norm\.weight' does not fit float16"):
        export_model(tmp_path / "plain", tmp_path / "out", dtype="float16")
    assert {path.name for path in tmp_path.iterdir()} == {source.name, "plain"}


def test_a_damaged_checkpoint_is_refused_while_it_streams(checkpoint: Path, tmp_path: Path) -> None:
    """Each tensor is proven as it is read: one flipped bit must not leave the machine."""
    copy = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, copy)
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(IntegrityError, match="certified"):
        export_model(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_no_model_of_ours_says_what_to_do(
    checkpoint: Path, tmp_path: Path
) -> None:
    """MLX codes are no weights; a run without checkpoints has none."""
    export_model(checkpoint, tmp_path / "q", target="mlx", bits=4)
    with pytest.raises(IntegrityError, match="solollm import"):
        export_model(tmp_path / "q", tmp_path / "out")
    with pytest.raises(ConfigError, match="neither a run"):
        export_model(tmp_path, tmp_path / "out")


# --- the card and the command --------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, save_telling: SaveTelling) -> Path:
    """A run of 20 steps with a checkpoint at step 10 and evaluations around it."""
    config = parse_config(
        {"optimizer": {"name": "muon", "lr": 0.01}, "train": {"steps": 20}, "data": {"corpus": "c"}}
    )
    made = Run.create(tmp_path / "runs" / "tiny", config)
    save_telling(made.checkpoints, SMALL)
    for step, loss in ((5, 2.5), (10, 1.25), (15, 0.5)):
        made.append_metrics(
            {"kind": "eval", "step": step, "loss": loss, "bits_per_byte": loss / 2, "targets": 900}
        )
    made.record_lineage(0, {"backend": "mlx", "device": "apple gpu", "compute_dtype": "bfloat16"})
    made.record_lineage(
        4,
        {"backend": "torch", "device": "cpu", "compute_dtype": "float32",
         "versions": {"torch": "2.13.0"}},
    )  # fmt: skip
    made.record_lineage(10, {"backend": "later", "device": "cpu", "compute_dtype": "float32"})
    return made.path


def test_the_card_says_what_the_run_recorded(run: Path, tmp_path: Path) -> None:
    """A held-out loss of later weights; a figure nobody measured; a field left empty."""
    export_model(run, tmp_path / "my model", target="mlx", bits=4)
    text = (tmp_path / "my model" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: mlx\n")
    for fact in (
        "# my model", "trained from scratch with SoloLLM", "`ffffffffffffffff`", "10 of 20 planned",
        "**1.2500 nats per token** (0.6250 bits per byte) over 900 tokens, measured at step 10",
        "muon, wsd, peak learning rate 0.01", "| from step 5 on | torch on cpu, float32;"
        " torch 2.13.0 |", "| from step 1 on | mlx on apple gpu, bfloat16 |",
        "4-bit affine codes in groups of 64; scales and norms float32", "`LlamaForCausalLM`, 1 la",
        'load("my model")',
    ):  # fmt: skip
        assert fact in text, text
    for empty in ("None", "null", "[More", "|  |", "0.5000", "later"):
        assert empty not in text


def test_the_card_of_a_lone_checkpoint_claims_less(checkpoint: Path, tmp_path: Path) -> None:
    """Without its run a checkpoint knows no held-out loss and not how training began."""
    export_model(checkpoint, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "trained with SoloLLM" in text
    assert "None was recorded." in text
    assert "| trained on | toy on cpu, float32 |" in text
    assert "optimizer" not in text


def test_the_command(run: Path, tmp_path: Path) -> None:
    """The skin: names of options, the report in words and in JSON."""
    out = str(tmp_path / "out")
    words = ["export", str(run), "--to", "hf", "--dtype", "bfloat16", "--out", out]
    done = CliRunner().invoke(command, words, catch_exceptions=False)
    assert done.exit_code == 0
    assert "bfloat16" in done.output
    assert "written to" in done.output
    words = ["export", out, "--to", "mlx", "--bits", "8", "--out", out + "8", "--json"]
    report = json.loads(CliRunner().invoke(command, words, catch_exceptions=False).stdout)
    assert (report["bits"], report["dtype"], report["target"]) == (8, "bfloat16", "mlx")
    assert report["num_bytes"] == sum(p.stat().st_size for p in Path(out + "8").iterdir())


def _read_all(folder: Path) -> list[tuple[str, HostTensor]]:
    weights = open_weights(folder)
    return [(name, weights.read(name)) for name in weights.names()]


def _replace_weights(folder: Path, weights: dict[str, HostTensor]) -> None:
    from safetensors.numpy import save_file

    save_file({name: tensor.data for name, tensor in weights.items()}, folder / "model.safetensors")
