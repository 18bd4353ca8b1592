"""Foreign model folders made ours: the same logits, the same ids; and what is refused, and why."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from solollm.architecture import ModelConfig, parameter_table
from solollm.cli import command
from solollm.errors import ConfigError, IntegrityError, SoloLLMError
from solollm.export import export_model
from solollm.importing import import_model
from solollm.tensorfile import open_weights
from solollm.tokenizer import Tokenizer

LogitsOf = Callable[[str, Path, np.ndarray], np.ndarray]
SaveTelling = Callable[[Path, ModelConfig], Path]
IDS = np.random.default_rng(5).integers(0, 320, (2, 100))
SMALL = ModelConfig(
    vocab_size=320, hidden_size=128, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=128,
    rope_theta=500_000.0,
)  # fmt: skip


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def as_transformers_saves(checkpoint: Path, out: Path, dtype: str = "float32") -> Path:
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    kind = transformers.AutoModelForCausalLM
    model = kind.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
    model.save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(checkpoint).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, save_telling: SaveTelling) -> Path:
    """A folder of SMALL as another program would have it; tests that change it copy it."""
    folder = tmp_path_factory.mktemp("foreign")
    export_model(save_telling(folder, SMALL), folder / "plain")
    (folder / "plain" / "README.md").unlink()
    return folder / "plain"


@pytest.fixture
def foreign(plain: Path, tmp_path: Path) -> Path:
    """A copy of `plain` to spoil."""
    shutil.copytree(plain, tmp_path / "foreign")
    return tmp_path / "foreign"


def edit(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; `...` removes one."""
    table = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in table.items() if v is not ...}))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the tensors of `model.safetensors`."""
    from safetensors.numpy import load_file, save_file

    tensors: dict[str, Any] = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# --- the same model ------------------------------------------------------------------------------


def test_what_transformers_saved_is_the_same_model_everywhere(
    model_variant: ModelConfig, save_telling: SaveTelling, logits_of: LogitsOf, tmp_path: Path
) -> None:
    """transformers 5 writes the rope settings under its new key alone, from which mlx-lm's llama
    computes another model; imported, every program agrees with what transformers computed."""
    folder = as_transformers_saves(save_telling(tmp_path, model_variant), tmp_path / "theirs")
    config = json.loads((folder / "config.json").read_text())
    assert "rope_theta" not in config  # else this test would prove nothing
    expected = logits_of("transformers", folder, IDS)
    report = import_model(folder, tmp_path / "ours")
    assert report.model == model_variant
    for reader in ("torch", "transformers", "mlx"):
        assert_close(logits_of(reader, tmp_path / "ours", IDS), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights_stay_as_they_are(
    dtype: Any, save_telling: SaveTelling, tmp_path: Path
) -> None:
    """Twice the disk for nothing; or a bit of the publisher's weights changed."""
    folder = as_transformers_saves(save_telling(tmp_path, SMALL), tmp_path / "theirs", dtype)
    assert import_model(folder, tmp_path / "ours").dtype == dtype
    theirs, ours = open_weights(folder), open_weights(tmp_path / "ours")
    wide = import_model(folder, tmp_path / "wide", dtype="float32")
    for spec in parameter_table(SMALL):
        np.testing.assert_array_equal(ours.read(spec.name).data, theirs.read(spec.name).data)
        widened = open_weights(tmp_path / "wide").read(spec.name)
        np.testing.assert_array_equal(widened.data, theirs.read(spec.name).float32())
    assert wide.dtype == "float32"
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == dtype


def mlx_converted(folder: Path, out: Path, **options: Any) -> Path:
    mlx_lm = pytest.importorskip("mlx_lm")
    with contextlib.redirect_stdout(io.StringIO()):
        mlx_lm.convert(str(folder), str(out), **options)
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 64), (4, 64), (5, 64), (8, 128)])
def test_mlx_codes_become_the_values_they_stand_for(
    bits: int, group_size: int, dtype: str, plain: Path, tmp_path: Path
) -> None:
    """Another bit order, or scales rounded on the way, is another model."""
    mx = pytest.importorskip("mlx.core")
    folder = mlx_converted(
        plain, tmp_path / "mlx", quantize=True, q_bits=bits, q_group_size=group_size, dtype=dtype
    )
    import_model(folder, tmp_path / "ours")
    raw, ours = mx.load(str(folder / "model.safetensors")), open_weights(tmp_path / "ours")
    num_codes = 0
    for spec in parameter_table(SMALL):
        value, prefix = raw[spec.name], spec.name.removesuffix("weight")
        if value.dtype == mx.uint32:
            scales, biases = (raw[prefix + k].astype(mx.float32) for k in ("scales", "biases"))
            value = mx.dequantize(value, scales, biases, group_size=group_size, bits=bits)
            num_codes += 1
        expected = np.array(value.astype(mx.float32))
        np.testing.assert_array_equal(ours.read(spec.name).data, expected, err_msg=spec.name)
    assert num_codes >= 12


def test_mixed_bits_and_a_tied_head(
    save_telling: SaveTelling, logits_of: LogitsOf, tmp_path: Path
) -> None:
    """mlx-lm's recipes give some layers more bits than config.json says at its top, and leave some
    alone; with a tied head the embedding's codes are the head too."""
    mlx_lm, mx = pytest.importorskip("mlx_lm"), pytest.importorskip("mlx.core")
    model = SMALL.model_copy(update={"tie_word_embeddings": True, "qk_norm": True})
    export_model(save_telling(tmp_path, model), tmp_path / "plain")

    def recipe(path: str, _: Any) -> Any:
        if "o_proj" in path:
            return False
        return {"bits": 6, "group_size": 32} if "embed" in path or "layers.0" in path else True

    folder = mlx_converted(
        tmp_path / "plain", tmp_path / "mlx", quantize=True, q_bits=4, quant_predicate=recipe
    )
    report = import_model(folder, tmp_path / "ours")
    assert report.origin.weights == "affine codes (13 matrices)"
    assert "13 quantised matrices" in report.notes[0]
    reference, _ = mlx_lm.load(str(folder))
    expected = np.array(mlx_lm.utils.dequantize_model(reference)(mx.array(IDS)))
    for reader in ("torch", "mlx"):
        assert_close(logits_of(reader, tmp_path / "ours", IDS), expected)


def test_an_export_comes_back_bit_for_bit(plain: Path, tmp_path: Path) -> None:
    """Round trip, through shards: fp32 loses nothing; nor do codes that are made again of what
    they stood for."""
    export_model(plain, tmp_path / "shards", shard_bytes=50_000)
    import_model(tmp_path / "shards", tmp_path / "back", shard_bytes=90_000)
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 1
    first, second = open_weights(plain), open_weights(tmp_path / "back")
    assert set(first.names()) == set(second.names())
    for name in first.names():
        np.testing.assert_array_equal(first.read(name).data, second.read(name).data)


def test_one_tensor_is_in_memory_at_a_time(save_telling: SaveTelling, tmp_path: Path) -> None:
    """A model that fills half the memory must still go out and in: 21 MB here, through 8."""
    model = SMALL.model_copy(
        update={"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 12}
    )
    checkpoint = save_telling(tmp_path, model)
    assert model.num_parameters() * 4 > 21e6
    tracemalloc.start()
    export_model(checkpoint, tmp_path / "q", target="mlx", bits=4)
    import_model(tmp_path / "q", tmp_path / "back", dtype="bfloat16")
    export_model(checkpoint, tmp_path / "half", dtype="float16")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6, f"{peak / 1e6:.1f} MB"


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_that_does_not_say_whether_the_head_is_tied(
    tied: bool, save_telling: SaveTelling, logits_of: LogitsOf, tmp_path: Path
) -> None:
    """transformers takes false, mlx-lm true; the head in the file, or its absence, decides."""
    model = SMALL.model_copy(update={"tie_word_embeddings": tied})
    checkpoint = save_telling(tmp_path, model)
    export_model(checkpoint, tmp_path / "plain")
    edit(tmp_path / "plain" / "config.json", tie_word_embeddings=...)
    assert import_model(tmp_path / "plain", tmp_path / "ours").model.tie_word_embeddings is tied
    expected = logits_of("torch", checkpoint, IDS)
    assert_close(logits_of("mlx", tmp_path / "ours", IDS), expected)


def test_tensors_that_are_no_parameters_are_left_out(foreign: Path, tmp_path: Path) -> None:
    """Old files hold the rotary frequencies; tied ones a copy of the embedding as their head."""

    def add(tensors: dict[str, Any]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(16, np.float32)

    rewrite(foreign, add)
    edit(foreign / "config.json", tie_word_embeddings=True)
    report = import_model(foreign, tmp_path / "ours")
    assert set(open_weights(tmp_path / "ours").names()) == {
        spec.name for spec in parameter_table(report.model)
    }
    assert "lm_head.weight" in report.notes[0]
    assert "inv_freq" in report.notes[0]


# --- what is refused -----------------------------------------------------------------------------

SPOILT: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"model_type": "mixtral"}, "mixtral"),
    "biases": ({"attention_bias": True}, "attention_bias"),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
    "interleaved rotary": ({"rope_traditional": True}, "rope_traditional"),
    "part of the head rotates": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "sliding windows": ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_at"),
    "GPTQ": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
    "fp8": ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
    "mxfp4": ({"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}}, "mxfp4"),
    "mxfp4 in a layer": (
        {"quantization": {"bits": 4, "group_size": 64, "lm_head": {"mode": "nvfp4"}}}, "nvfp4",
    ),
    "no eps": ({"rms_norm_eps": ...}, "rms_norm_eps"),
    "no heads": ({"num_attention_heads": ...}, "num_attention_heads"),
    "no type": ({"model_type": ...}, "model_type"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "num_key_value_heads"),
    "a shape that is none": ({"hidden_size": "wide"}, "hidden_size"),
    "other shapes": ({"intermediate_size": 65}, "mlp.gate_proj"),
    "more layers": ({"num_hidden_layers": 3}, "layers.2"),
    "fewer layers": ({"num_hidden_layers": 1}, "layers.1"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_a_model_that_would_be_computed_wrongly_is_refused(
    name: str, foreign: Path, tmp_path: Path
) -> None:
    """Each of these would load, somehow, and answer nonsense."""
    changes, problem = SPOILT[name]
    edit(foreign / "config.json", **({"rope_parameters": ...} | changes))
    with pytest.raises((ConfigError, IntegrityError), match=problem):
        import_model(foreign, tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign"]


def test_qwen3_must_say_its_head_dim(save_telling: SaveTelling, tmp_path: Path) -> None:
    """Left out it is 128 to transformers, and the quotient here."""
    model = SMALL.model_copy(update={"qk_norm": True, "head_dim": 64})
    export_model(save_telling(tmp_path, model), tmp_path / "plain")
    edit(tmp_path / "plain" / "config.json", head_dim=...)
    with pytest.raises(IntegrityError, match="head_dim: is not said"):
        import_model(tmp_path / "plain", tmp_path / "ours")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_a_pickle_is_refused_with_the_reason(name: str, foreign: Path, tmp_path: Path) -> None:
    """Reading a pickle runs what its maker wrote."""
    (foreign / "model.safetensors").rename(foreign / name)
    with pytest.raises(ConfigError, match=f"{name} is no safetensors file but a pickle"):
        import_model(foreign, tmp_path / "ours")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    """The usual mistakes: an empty folder, a typing error, a revision of a folder."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="it holds nothing"):
        import_model(tmp_path / "empty", tmp_path / "ours")
    with pytest.raises(ConfigError, match="is no folder"):
        import_model(tmp_path / "missing", tmp_path / "ours")
    with pytest.raises(ConfigError, match="--revision"):
        import_model(tmp_path / "empty", tmp_path / "ours", revision="main")
    with pytest.raises(ConfigError, match="exists already"):
        import_model(tmp_path / "missing", tmp_path)


def test_weights_that_are_none_are_refused(foreign: Path, tmp_path: Path) -> None:
    """A NaN trains to NaN; integers are no weights; a bias nobody computes changes the model."""
    spoilt: list[tuple[str, Any, str]] = [
        ("model.norm.weight", np.full(128, np.nan, np.float32), "holds NaN"),
        ("model.norm.weight", np.ones(128, np.int32), "no dtype of weights"),
        ("model.layers.0.self_attn.q_proj.bias", np.ones(64, np.float32), "not one of this model"),
    ]
    for tensor, value, problem in spoilt:
        original = (foreign / "model.safetensors").read_bytes()
        rewrite(foreign, lambda tensors, t=tensor, v=value: tensors.__setitem__(t, v))  # type: ignore[misc]
        with pytest.raises(IntegrityError, match=problem):
            import_model(foreign, tmp_path / "ours")
        (foreign / "model.safetensors").write_bytes(original)
    assert not (tmp_path / "ours").exists()


Q_PROJ = "model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    ("parts", "value", "problem"),
    [
        ("weight", np.zeros((64, 17), np.uint32), "no affine codes"),
        ("weight", np.zeros((64, 28), np.uint32), "no affine codes"),  # 7 bits
        ("weight", np.zeros((64, 16), np.int32), "no affine codes"),
        ("scales", np.zeros((64, 4), np.float32), "no affine codes"),  # groups of 32, biases of 64
        ("scales biases", np.zeros((64, 3), np.float32), "no affine codes"),
        ("scales biases", np.zeros((64, 128), np.float32), "no affine codes"),
        ("scales biases", np.zeros((64, 0), np.float32), "no affine codes"),
        ("scales biases", np.zeros(2, np.float32), "no affine codes"),
        ("biases", np.zeros((64, 1), np.float32), "no affine codes"),
        ("biases", None, "is missing"),
        ("scales", np.full((64, 2), np.inf, np.float32), "holds NaN or infinity"),
        ("scales", np.full((64, 2), 3e38, np.float32), "stand for no numbers"),
    ],
)
def test_codes_that_do_not_fit_are_refused(
    parts: str, value: Any, problem: str, plain: Path, tmp_path: Path
) -> None:
    """Shapes come from the file: a wrong one must not become a wrong group size."""
    export_model(plain, tmp_path / "q", target="mlx", bits=4)

    def spoil(tensors: dict[str, Any]) -> None:
        tensors[Q_PROJ + "weight"][:] = 0xFFFFFFFF
        for part in parts.split():
            tensors.pop(Q_PROJ + part)
            if value is not None:
                tensors[Q_PROJ + part] = value

    rewrite(tmp_path / "q", spoil)
    with (
        pytest.raises(IntegrityError, match=problem),
        np.errstate(over="ignore", invalid="ignore"),
    ):
        import_model(tmp_path / "q", tmp_path / "ours")


# --- where the files come from -------------------------------------------------------------------


def cached(plain: Path, home: Path) -> Path:
    """`plain` as huggingface_hub keeps it: blobs, and links to them in a snapshot."""
    cache = home / "models--some--model"
    snapshot = cache / "snapshots" / ("5" * 40)
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, path in enumerate(sorted(plain.iterdir())):
        shutil.copy(path, cache / "blobs" / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def test_a_cache_snapshot_is_read_through_its_links(plain: Path, tmp_path: Path) -> None:
    """Every file of a downloaded model is a link, and links are refused elsewhere."""
    snapshot = cached(plain, tmp_path)
    report = import_model(snapshot, tmp_path / "ours")
    assert report.origin == ("some/model", "5" * 40, "float32")
    assert json.loads((tmp_path / "ours" / "origin.json").read_text()) == report.origin._asdict()
    assert not any(path.is_symlink() for path in (tmp_path / "ours").iterdir())
    export_model(tmp_path / "ours", tmp_path / "again")
    card = (tmp_path / "again" / "README.md").read_text()
    assert f"| imported from | `some/model`, revision `{'5' * 40}` |" in card
    assert "converted with SoloLLM" in card


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_link_that_leads_elsewhere_is_refused(file: str, plain: Path, tmp_path: Path) -> None:
    """A model folder must not read /etc/passwd, nor a blob be a link itself."""
    snapshot = cached(plain, tmp_path)
    secret = tmp_path / "secret"
    shutil.copy(plain / file, secret)
    (snapshot / file).unlink()
    for target in (secret, Path("../../../secret"), Path("../../blobs/../../secret")):
        (snapshot / file).symlink_to(target)
        with pytest.raises(IntegrityError, match="leads out of its download"):
            import_model(snapshot, tmp_path / "ours")
        (snapshot / file).unlink()
    (snapshot.parent.parent / "blobs" / "evil").symlink_to(secret)
    (snapshot / file).symlink_to("../../blobs/evil")
    with pytest.raises(IntegrityError, match="is a symbolic link"):
        import_model(snapshot, tmp_path / "ours")


def test_links_of_a_plain_folder_are_refused(foreign: Path, plain: Path, tmp_path: Path) -> None:
    """Only a cache has a reason for them."""
    (foreign / "model.safetensors").unlink()
    (foreign / "model.safetensors").symlink_to(plain / "model.safetensors")
    with pytest.raises(IntegrityError, match="is a link"):
        import_model(foreign, tmp_path / "ours")


def test_a_hub_id_goes_through_snapshot_download(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The revision must arrive, and no file that can hold code be asked for."""
    import huggingface_hub

    asked: dict[str, Any] = {}

    def fake(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(cached(plain, tmp_path / "hub"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    report = import_model("some/model", tmp_path / "ours", revision="v1")
    assert (asked["repo_id"], asked["revision"]) == ("some/model", "v1")
    assert all(p.endswith((".safetensors", ".json", ".jinja")) for p in asked["allow_patterns"])
    assert report.origin.name == "some/model"


def test_failures_of_the_hub_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback of an HTTP library; 'not found' for a model that only wants a token."""
    import huggingface_hub
    from huggingface_hub import errors

    def failing(error: Exception) -> Callable[..., str]:
        def fail(*_: Any, **__: Any) -> str:
            raise error

        return fail

    class Response:
        headers: dict[str, str] = {}  # noqa: RUF012
        request = None
        status_code = 404

    cases: list[tuple[Exception, type[SoloLLMError], str]] = [
        (errors.RepositoryNotFoundError("404", response=Response()), ConfigError, "HF_TOKEN"),
        (errors.GatedRepoError("403", response=Response()), ConfigError, "is gated"),
        (errors.RevisionNotFoundError("404", response=Response()), ConfigError, "no revision 'v'"),
        (errors.LocalEntryNotFoundError("nothing cached"), SoloLLMError, "HF_HUB_OFFLINE"),
        (ConnectionError("no route"), SoloLLMError, "check the network"),
    ]  # type: ignore[arg-type]
    for error, kind, problem in cases:
        monkeypatch.setattr(huggingface_hub, "snapshot_download", failing(error))
        with pytest.raises(kind, match=problem):
            import_model("some/model", tmp_path / "ours", revision="v")


# --- the tokenizer -------------------------------------------------------------------------------


def test_files_that_hold_code_stay_behind(foreign: Path, tmp_path: Path) -> None:
    """`auto_map` makes transformers run the folder's own Python when asked to trust it."""
    (foreign / "modeling_evil.py").write_text("raise SystemExit")
    edit(foreign / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Model"})
    edit(foreign / "tokenizer_config.json", auto_map={"AutoTokenizer": "modeling_evil.Tokens"})
    import_model(foreign, tmp_path / "ours")
    assert {path.suffix for path in (tmp_path / "ours").iterdir()} <= {
        ".json", ".safetensors", ".jinja",
    }  # fmt: skip
    for path in (tmp_path / "ours").glob("*.json"):
        assert "evil" not in path.read_text()


def test_a_hostile_tokenizer_is_refused(foreign: Path, tmp_path: Path) -> None:
    """Import goes through the same check as every load."""
    edit(foreign / "tokenizer.json", normalizer={"type": "Precompiled", "precompiled_charsmap": ""})
    with pytest.raises(IntegrityError, match="normalizer"):
        import_model(foreign, tmp_path / "ours")
    (foreign / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.model"):
        import_model(foreign, tmp_path / "ours")


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(foreign: Path, tmp_path: Path) -> None:
    """Some texts would index past the embedding, on a GPU into anything."""

    def cut(tensors: dict[str, Any]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:250].copy()

    rewrite(foreign, cut)
    edit(foreign / "config.json", vocab_size=250)
    with pytest.raises(ConfigError, match=r"has \d+ ids, its model rows for 250"):
        import_model(foreign, tmp_path / "ours")


def test_what_older_folders_keep_elsewhere_is_brought_together(
    foreign: Path, tmp_path: Path
) -> None:
    """The end of a text named in special_tokens_map.json, or only as an id in config.json; several
    chat templates in a list."""
    templates = [
        {"name": "tool_use", "template": "T"},
        {"name": "default", "template": "{{ bos_token }}{{ messages[0]['content'] }}"},
    ]
    (foreign / "chat_template.jinja").unlink(missing_ok=True)
    edit(foreign / "tokenizer_config.json", eos_token=..., pad_token=..., chat_template=templates)
    import_model(foreign, tmp_path / "by-id")
    assert Tokenizer.load(tmp_path / "by-id").eos_id == 1
    tokens_map = {"eos_token": {"content": "<|end|>"}, "pad_token": "<|pad|>"}
    (foreign / "special_tokens_map.json").write_text(json.dumps(tokens_map))
    import_model(foreign, tmp_path / "by-map")
    tokenizer = Tokenizer.load(tmp_path / "by-map")
    assert tokenizer.eos_id == tokenizer.special_tokens["<|end|>"]
    assert tokenizer.pad_id == 2
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert ids == [tokenizer.bos_id, *tokenizer.encode("hi")]


def test_several_ends_of_generation_are_kept(foreign: Path, tmp_path: Path) -> None:
    """Chat models end at the end of a turn as well; without it they talk on for both sides."""
    edit(foreign / "generation_config.json", eos_token_id=[1, 6, 9999], temperature=0.6, evil={})
    edit(foreign / "config.json", eos_token_id=[1, 6], bos_token_id=99_999, pad_token_id=5)
    import_model(foreign, tmp_path / "ours")
    generation = json.loads((tmp_path / "ours" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [1, 6]
    assert generation["temperature"] == 0.6
    assert "evil" not in generation
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, 1, 5)


# --- the command ---------------------------------------------------------------------------------


def test_the_command(plain: Path, tmp_path: Path) -> None:
    """The skin: it is called `import` though no module can be; the report in words and in JSON."""
    out = tmp_path / "ours"
    words = ["import", str(plain), "--out", str(out), "--dtype", "bfloat16"]
    done = CliRunner().invoke(command, words, catch_exceptions=False)
    assert done.exit_code == 0
    assert f"--init-from {out}" in done.output
    words = ["import", str(plain), "--out", str(tmp_path / "two"), "--json"]
    report = json.loads(CliRunner().invoke(command, words, catch_exceptions=False).stdout)
    assert report["model"]["rope_theta"] == 500_000.0
    assert report["num_parameters"] == SMALL.num_parameters()
    assert report["origin"]["name"] == "plain"
