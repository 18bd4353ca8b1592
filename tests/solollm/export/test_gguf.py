"""The .gguf file as llama.cpp's own package reads it, and the logits that transformers gets of it.

What llama.cpp itself makes of it: `test_llama_cpp.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from solollm.architecture import ModelConfig, parameter_table
from solollm.chat_template import TEMPLATE, render_request
from solollm.cli import command
from solollm.durable import DISK
from solollm.errors import ConfigError, StorageError
from solollm.export import export_model
from solollm.export.gguf_vocabulary import plain_template
from solollm.gguf_codec import quantize
from solollm.tensorfile import open_weights
from solollm.tokenizer import Tokenizer
from solollm.tokenizer_format import GPT2_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN

gguf = pytest.importorskip("gguf")
LogitsOf = Callable[[str, Path, np.ndarray], np.ndarray]
SaveTelling = Callable[[Path, ModelConfig], Path]
IDS = np.random.default_rng(3).integers(0, 320, (2, 60))
BPE = ["theta, untied", "llama3 scaling, tied", "llama3 scaling, untied", "qk norm, tied"]
every_variant = pytest.mark.parametrize("model_variant", BPE, indirect=True)


def read(folder: Path) -> Any:
    return gguf.GGUFReader(folder / f"{folder.name}.gguf")


def values(reader: Any) -> dict[str, Any]:
    """The metadata as Python values."""
    return {name: field.contents() for name, field in reader.fields.items()}


def tensors(reader: Any) -> dict[str, np.ndarray]:
    """Every tensor as float32."""
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


@pytest.fixture
def checkpoint(tmp_path: Path, model_variant: ModelConfig, save_telling: SaveTelling) -> Path:
    return save_telling(tmp_path, model_variant)


@pytest.mark.parametrize("model_variant", ["theta, untied"], indirect=True)
def test_transformers_computes_the_same_logits(
    checkpoint: Path, logits_of: LogitsOf, tmp_path: Path
) -> None:
    """Rows of query and key that were left in Hugging Face's order give a fluent other model. (Of
    such a file it reads neither the factors of llama3 scaling nor the head size of Qwen3.)"""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    export_model(checkpoint, tmp_path / "out", target="gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="out.gguf", dtype=torch.float32
    )
    with torch.no_grad():
        logits = model(torch.from_numpy(IDS), use_cache=False).logits.numpy()
    ours = logits_of("torch", checkpoint, IDS)
    np.testing.assert_allclose(logits, ours, rtol=0, atol=1e-5 * np.abs(ours).max())


@every_variant
def test_the_settings_are_the_models(
    model_variant: ModelConfig, checkpoint: Path, tmp_path: Path
) -> None:
    """llama.cpp fills in what is missing, without a word."""
    export_model(checkpoint, tmp_path / "out", target="gguf")
    found, model = values(read(tmp_path / "out")), model_variant
    kind = "qwen3" if model.qk_norm else "llama"
    assert found["general.architecture"] == kind
    assert found["general.name"] == "out"
    settings = {
        "block_count": 2, "context_length": 256, "embedding_length": 64, "vocab_size": 320,
        "feed_forward_length": 128, "attention.head_count": 4, "attention.head_count_kv": 2,
        "attention.key_length": model.head_dim, "attention.value_length": model.head_dim,
        "rope.dimension_count": model.head_dim, "rope.freq_base": np.float32(model.rope_theta),
        "attention.layer_norm_rms_epsilon": np.float32(2e-5),
    }  # fmt: skip
    assert {key: found[f"{kind}.{key}"] for key in settings} == settings


@every_variant
def test_every_tensor_is_there_once(
    model_variant: ModelConfig, checkpoint: Path, tmp_path: Path
) -> None:
    """A tied head twice, a norm in 16 bits (which llama.cpp's kernels do not take), a tensor
    under a name that it does not look for: it counts them."""
    export_model(checkpoint, tmp_path / "out", target="gguf", dtype="bfloat16")
    reader = read(tmp_path / "out")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    of_rope = int(model_variant.rope_scaling is not None)
    assert len(kinds) == len(parameter_table(model_variant)) + of_rope
    assert all((k == "F32") == ("norm" in n or "rope" in n) for n, k in kinds.items())
    assert ("output.weight" in kinds) == (not model_variant.tie_word_embeddings)
    known = gguf.TensorNameMap(gguf.MODEL_ARCH.LLAMA, 2)
    for spec in parameter_table(model_variant):
        if "q_norm" not in spec.name and "k_norm" not in spec.name:
            assert known.get_name(spec.name, try_suffixes=(".weight",)) in kinds


@pytest.mark.parametrize("model_variant", ["llama3 scaling, tied"], indirect=True)
def test_rotated_pairs_are_neighbours(
    model_variant: ModelConfig, checkpoint: Path, tmp_path: Path
) -> None:
    """The package's own example of the order: row 2 i of a head is i, row 2 i + 1 is i + D / 2."""
    export_model(checkpoint, tmp_path / "out", target="gguf")
    found, weights, dim = tensors(read(tmp_path / "out")), open_weights(checkpoint), 16
    for ours, theirs, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)):
        before = weights.read(f"model.layers.1.self_attn.{ours}.weight").float32()
        after = found[f"blk.1.{theirs}.weight"]
        for row in range(heads * dim):
            head, place = divmod(row, dim)
            source = head * dim + place // 2 + (place % 2) * dim // 2
            np.testing.assert_array_equal(after[row], before[source])
    value = weights.read("model.layers.1.self_attn.v_proj.weight").float32()
    np.testing.assert_array_equal(found["blk.1.attn_v.weight"], value)


@pytest.mark.parametrize("model_variant", ["llama3 scaling, tied"], indirect=True)
def test_factors_of_llama3_scaling_divide_its_frequencies(
    model_variant: ModelConfig, checkpoint: Path, tmp_path: Path
) -> None:
    """Left out, llama.cpp computes with the frequencies as they were before scaling."""
    torch = pytest.importorskip("torch")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.configuration_llama import LlamaConfig

    export_model(checkpoint, tmp_path / "out", target="gguf")
    config = LlamaConfig.from_pretrained(checkpoint)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    dim = model_variant.head_dim
    plain = model_variant.rope_theta ** (-np.arange(0, dim, 2) / dim)
    factors = tensors(read(tmp_path / "out"))["rope_freqs.weight"]
    np.testing.assert_allclose(plain / factors, scaled.numpy(), rtol=1e-6)
    assert factors.max() > 2


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_those_of_the_package(bits: int) -> None:
    """Ties and zeros round as in C, or each block is another one."""
    rng = np.random.default_rng(bits)
    rows = rng.standard_normal((300, 64), np.float32) * np.float32(0.02)
    rows[0], rows[1, :32], rows[2] = 0, 0, 1e-9
    rows[3], rows[4] = np.float32(0.5), -np.arange(64, dtype=np.float32)
    rows[5] = np.round(rows[5] * 1000) / 64  # ties of 8 bits
    rows[6, 3] = 127.0
    kind = getattr(gguf.GGMLQuantizationType, f"Q{bits}_0")
    np.testing.assert_array_equal(quantize(rows, bits=bits), gguf.quants.quantize(rows, kind))


@pytest.mark.parametrize("bits", [4, 8])
def test_denormals_are_zeros(bits: int) -> None:
    """1 / scale overflows for them; infinity times zero would be any code."""
    rows = np.full((2, 32), 1e-41, np.float32)
    rows[:, 3] = 0
    kind = getattr(gguf.GGMLQuantizationType, f"Q{bits}_0")
    assert not gguf.quants.dequantize(quantize(rows, bits=bits), kind).any()


@pytest.mark.parametrize("model_variant", ["theta, untied", "qk norm, tied"], indirect=True)
@pytest.mark.parametrize("bits", [4, 8])
def test_matrices_in_codes(
    bits: int, model_variant: ModelConfig, checkpoint: Path, tmp_path: Path
) -> None:
    """The head in 4 bits costs most of the quality; norms in codes are refused by llama.cpp."""
    report = export_model(checkpoint, tmp_path / "out", target="gguf", bits=bits)
    assert (report.plain_matrices, report.bits) == ((), bits)
    reader = read(tmp_path / "out")
    head = "token_embd" if model_variant.tie_word_embeddings else "output"
    for tensor in reader.tensors:
        kind = "F32" if "norm" in tensor.name else f"Q{bits}_0"
        assert tensor.tensor_type.name == ("Q8_0" if tensor.name == f"{head}.weight" else kind)
    assert values(reader)["general.file_type"] == {4: 2, 8: 7}[bits]
    up = open_weights(checkpoint).read("model.layers.0.mlp.up_proj.weight").float32()
    error = tensors(reader)["blk.0.ffn_up.weight"] - up
    assert 0 < np.abs(error).max() < {4: 0.13, 8: 0.008}[bits] * np.abs(up).max()


def test_rows_that_do_not_divide_stay_and_are_named(
    save_telling: SaveTelling, tmp_path: Path
) -> None:
    """A block of codes that ran on into the next row would be read as garbage."""
    model = ModelConfig(
        vocab_size=320, hidden_size=64, intermediate_size=80, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=64,
    )  # fmt: skip
    source = save_telling(tmp_path, model)
    words = ["export", str(source), "--to", "gguf", "--bits", "8", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(command, words, catch_exceptions=False)
    assert "1 matrices stay float32: their rows do not divide into groups of 32" in done.output
    kinds = {t.name: t.tensor_type.name for t in read(tmp_path / "out").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F32"
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"


@pytest.mark.parametrize("model_variant", ["qk norm, tied"], indirect=True)
def test_the_vocabulary(checkpoint: Path, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A special token that is a normal one is read out of text; a row without a token that has
    the text of another is given in its place."""
    export_model(checkpoint, tmp_path / "out", target="gguf")
    found = values(read(tmp_path / "out"))
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == len(set(tokens)) == 320
    content = json.loads(small_tokenizer.files()["tokenizer.json"])
    assert all(tokens[place] == token for token, place in content["model"]["vocab"].items())
    assert {tokens[i] for i, k in enumerate(kinds) if k == 3} == set(small_tokenizer.special_tokens)
    assert kinds.count(5) == 320 - small_tokenizer.vocab_size
    assert found["tokenizer.ggml.merges"] == [" ".join(m) for m in content["model"]["merges"]]
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "smollm")
    ends = {"bos": "bos", "eos": "eos", "padding": "pad", "eot": "end"}
    for theirs, ours in ends.items():
        assert found[f"tokenizer.ggml.{theirs}_token_id"] == getattr(small_tokenizer, f"{ours}_id")
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert "generation" not in found["tokenizer.chat_template"].replace("add_generation", "")


def changed(tokenizer: Tokenizer, pre_tokenizer: Any, **config: Any) -> dict[str, bytes]:
    """The tokenizer's files with another way of splitting."""
    files = tokenizer.files()
    content = json.loads(files["tokenizer.json"]) | {"pre_tokenizer": pre_tokenizer}
    content["model"]["ignore_merges"] = config.pop("ignore_merges", False)
    settings = json.loads(files["tokenizer_config.json"]) | config
    return files | {
        "tokenizer.json": json.dumps(content).encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }


def split(pattern: str, **fields: Any) -> dict[str, Any]:
    part = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    letters = BYTE_LEVEL | {"use_regex": False}
    return {"type": "Sequence", "pretokenizers": [part | fields, letters]}


BYTE_LEVEL = {
    "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True,
}  # fmt: skip
DIGITS = {"type": "Digits", "individual_digits": False}
OWN = {"type": "Sequence", "pretokenizers": [DIGITS | {"individual_digits": True}, BYTE_LEVEL]}


@pytest.mark.parametrize("model_variant", ["theta, untied"], indirect=True)
@pytest.mark.parametrize(
    ("pre_tokenizer", "name"),
    [
        (split(LLAMA3_PATTERN), "llama-bpe"),
        (split(QWEN2_PATTERN), "qwen2"),
        (BYTE_LEVEL, "gpt-2"),
        (BYTE_LEVEL | {"add_prefix_space": True}, None),
        (split(LLAMA3_PATTERN, behavior="Removed"), None),
        (split(LLAMA3_PATTERN, invert=True), None),
        (split(GPT2_PATTERN), None),
        ({"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL]}, None),
    ],
)
def test_ways_of_splitting(
    pre_tokenizer: Any, name: str | None, checkpoint: Path, small_tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Under the name of another way llama.cpp gives other ids, and nothing says so."""
    export_model(checkpoint, tmp_path / "plain", target="hf")
    for file, content in changed(small_tokenizer, pre_tokenizer, add_bos_token=False).items():
        (tmp_path / "plain" / file).write_bytes(content)
    if name is None:
        with pytest.raises(ConfigError, match=r"llama\.cpp has no name for"):
            export_model(tmp_path / "plain", tmp_path / "out", target="gguf")
        assert not (tmp_path / "out").exists()
        return
    export_model(tmp_path / "plain", tmp_path / "out", target="gguf")
    found = values(read(tmp_path / "out"))
    assert found["tokenizer.ggml.pre"] == name
    assert found["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.parametrize("model_variant", ["theta, untied"], indirect=True)
def test_words_without_merges_belong_to_llama_3(
    checkpoint: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """`ignore_merges` gives a word of the vocabulary its one id; under any name but Llama 3's
    llama.cpp merges it from letters."""
    for name, how in (("own", OWN), ("llama", split(LLAMA3_PATTERN))):
        export_model(checkpoint, tmp_path / name, target="hf")
        for file, content in changed(small_tokenizer, how, ignore_merges=True).items():
            (tmp_path / name / file).write_bytes(content)
    export_model(tmp_path / "llama", tmp_path / "out", target="gguf")
    with pytest.raises(ConfigError, match=r"llama\.cpp has no name for"):
        export_model(tmp_path / "own", tmp_path / "other", target="gguf")


def test_a_template_without_its_marks_renders_the_same() -> None:
    """llama.cpp and Ollama know no `generation`; the blanks that the marks trim must stay away."""
    spaced = "{{ bos_token }} {% generation %} a {%- endgeneration -%}  b"
    spaced += "{%- generation %} c{% endgeneration %}"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    variables = {"bos_token": "<s>", "messages": messages, "add_generation_prompt": True}
    for source in (TEMPLATE, spaced):
        marked = render_request({"source": source, "variables": variables})
        plain = render_request({"source": plain_template(source), "variables": variables})
        assert plain == re.sub("\ufdd0[23]", "", marked)
        assert plain != marked


@pytest.mark.parametrize("model_variant", ["qk norm, tied"], indirect=True)
def test_ollamas_recipe(checkpoint: Path, tmp_path: Path) -> None:
    """Without stops an answer never ends; a context beyond the model's is garbage after it."""
    export_model(checkpoint, tmp_path / "poet", target="gguf", bits=8)
    lines = (tmp_path / "poet" / "Modelfile").read_text().splitlines()
    assert "FROM ./poet.gguf" in lines
    assert "PARAMETER num_ctx 256" in lines
    assert {'PARAMETER stop "<|end|>"', 'PARAMETER stop "<|eos|>"'} <= set(lines)
    assert any(line.startswith('TEMPLATE """{{- range .Messages }}') for line in lines)
    card = (tmp_path / "poet" / "README.md").read_text()
    assert "llama-server -m poet.gguf" in card
    assert "8-bit codes in blocks of 32 (Q8_0); norms float32" in card


@pytest.mark.parametrize("model_variant", ["qk norm, tied"], indirect=True)
@pytest.mark.parametrize(
    ("folder", "stem"), [("my poet", "my-poet"), ("läuft (2)", "l-uft-2"), ("日本", "model")]
)
def test_the_files_name_is_one_word(
    folder: str, stem: str, checkpoint: Path, tmp_path: Path
) -> None:
    """`FROM ./my poet.gguf` and `ollama create my poet` are other commands."""
    export_model(checkpoint, tmp_path / folder, target="gguf")
    assert (tmp_path / folder / f"{stem}.gguf").is_file()
    assert f"FROM ./{stem}.gguf\n" in (tmp_path / folder / "Modelfile").read_text()
    assert f"ollama create {stem} -f" in (tmp_path / folder / "README.md").read_text()


@pytest.mark.parametrize("model_variant", ["qk norm, llama3 scaling, untied"], indirect=True)
def test_what_llama_cpp_does_not_compute_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """Its qwen3 does not load factors of a rope scaling."""
    with pytest.raises(ConfigError, match="no llama3 rope scaling"):
        export_model(checkpoint, tmp_path / "out", target="gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model_variant", ["theta, untied"], indirect=True)
def test_a_full_disk_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a file has a head that promises all of it."""
    real, budget = DISK.write, [200_000]

    def write(fd: int, data: Any) -> int:
        budget[0] -= len(data)
        if budget[0] < 0:
            raise OSError(28, "No space left on device")
        return real(fd, data)

    monkeypatch.setattr(type(DISK), "write", lambda self, fd, data: write(fd, data))
    with pytest.raises(StorageError, match=r"out\.gguf"):
        export_model(checkpoint, tmp_path / "out", target="gguf")
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]
