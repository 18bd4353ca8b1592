"""From files to samples: laid out, marked, split, and refused by file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from solollm.config import FinetuneTable
from solollm.errors import ConfigError, DataError, IntegrityError
from solollm.finetune.check import examine
from solollm.finetune.dataset import Reading, read_conversations, sample_set
from solollm.finetune.rendering import render
from solollm.finetune.samples import read_samples
from solollm.tokenizer import CHAT_TEMPLATE, Tokenizer

CHATML = (
    "{% for m in messages %}<|user|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant\n{% endif %}"
)
TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "why <|end|>?"},
    {"role": "assistant", "content": "so."},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "that is <|assistant|> all"},
]
GOOD = json.dumps({"question": "why?", "answer": "so."})


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    return Tokenizer({**tokenizer.files(), CHAT_TEMPLATE: template.encode()})


def read(tokenizer: Tokenizer, *paths: Path, **fields: Any) -> Reading:
    table = FinetuneTable(data=tuple(str(p) for p in paths), **fields)
    return read_conversations(table, tokenizer)


@pytest.mark.parametrize("template", ["", CHATML])
def test_only_what_the_assistant_says_is_learnt(small_tokenizer: Tokenizer, template: str) -> None:
    """Guards: a loss on the user's words or on the header before an answer; an end of turn that is
    not learnt; a marker typed by a user taken for the template's own. The second template does not
    say what the assistant produces: that is found out, with the same result."""
    tokenizer = with_template(small_tokenizer, template) if template else small_tokenizer
    ids, produced = render(tokenizer, TURNS)
    borders = np.flatnonzero(np.diff(np.concatenate(([False], produced, [False])).astype(int)))
    spans = [
        tokenizer.decode(ids[a:b].tolist(), skip_special=False) for a, b in borders.reshape(-1, 2)
    ]
    assert spans == ["so.<|end|>", "that is <|assistant|> all<|end|>"]
    asked = tokenizer.apply_chat_template(TURNS[:2])
    assert ids[: len(asked)].tolist() == asked
    assert np.flatnonzero(produced)[0] == len(asked)


def test_a_template_that_rewrites_the_past_is_refused(small_tokenizer: Tokenizer) -> None:
    """Guards: training on another text before the answer than a chat will show."""
    rewriting = CHATML.replace("{% for", "{{ messages | length }}{% for")
    with pytest.raises(ConfigError, match="otherwise once it is answered"):
        render(with_template(small_tokenizer, rewriting), TURNS)


def test_bad_rows_are_named_by_file_and_line(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Guards: a run that starts on data it cannot finish, or a message that names no place."""
    path, table = tmp_path / "rows.jsonl", tmp_path / "rows.parquet"
    bad = ['{"question": "x"', "[1]", '{"question": "x", "answer": ""}', '{"text": "plain"}',
           '{"question": "a", "answer": "' + "b" * 1_000_000 + '"}', "[" * 100_000,
           '{"question": "x", "answer": "a", "answer": "b"}']  # fmt: skip
    path.write_text("\n".join([GOOD, *bad, "", GOOD]), encoding="utf-8")
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": "a", "completion": "b"}, {"prompt": None, "completion": "c"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    reading = read(small_tokenizer, path, table)
    places = [problem.place for problem in reading.problems]
    assert places == [*(f"rows.jsonl:{n}" for n in range(2, 9)), "rows.parquet row 2"]
    for reason in (
        "is no JSON: Expecting ',' delimiter, at character 17",
        "is a list",
        "is empty",
        "no known shape",
        "the key 'answer' stands twice",
        "1,000,000 characters",
    ):
        assert any(reason in problem.reason for problem in reading.problems), reason
    assert len(reading.laid) == 3
    with pytest.raises(DataError, match=r"rows\.jsonl:2"):
        sample_set(reading, FinetuneTable(), 64)
    assert "8 rows" in examine(reading, FinetuneTable(), tmp_path, seq_len=64).faults[0]


def test_long_samples_need_a_word(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Guards: answers cut in silence; more than 1% dropped without being asked."""
    path = tmp_path / "rows.jsonl"
    long = {"question": "why?", "answer": "number value " * 60}
    path.write_text("\n".join([GOOD] * 40 + [json.dumps(long)]), encoding="utf-8")
    reading = read(small_tokenizer, path, held_out_fraction=0.0)
    with pytest.raises(DataError, match=r"rows\.jsonl:41"):
        sample_set(reading, FinetuneTable(), 32)
    assert (
        "longer than 32 tokens" in examine(reading, FinetuneTable(), tmp_path, seq_len=32).faults[0]
    )
    counts = {"drop": 40, "cut_start": 41, "cut_end": 41}
    for rule, count in counts.items():
        samples = sample_set(reading, FinetuneTable(over_length=rule), 32)  # type: ignore[arg-type]
        assert samples.train.num_samples == count
        assert samples.train.num_positions.max() <= 32
    ends = sample_set(reading, FinetuneTable(over_length="cut_start"), 32).train.sample(40)
    assert ends.ids[-1] == small_tokenizer.end_id


def test_samples_come_back_and_prove_themselves(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Guards: a mask shifted by a token on disk; another run's samples."""
    path = tmp_path / "rows.jsonl"
    rows = [json.dumps({"question": f"why {n}?", "answer": f"so {n}."}) for n in range(50)]
    path.write_text("\n".join(rows), encoding="utf-8")
    samples = sample_set(read(small_tokenizer, path, held_out_fraction=0.2), FinetuneTable(), 64)
    samples.save(tmp_path / "data")
    loaded = read_samples(tmp_path / "data")
    assert loaded.index == samples.index
    assert 0 < loaded.held_out.num_samples < 25
    for name in ("tokens", "produced", "starts"):
        assert np.array_equal(getattr(loaded.train, name), getattr(samples.train, name))
    assert loaded.index.splits["train"].text_bytes == sum(
        len(small_tokenizer.decode(s.ids[s.produced].tolist()).encode())
        for s in map(loaded.train.sample, range(loaded.train.num_samples))
    )
    file = tmp_path / "data" / "train.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"train\.safetensors"):
        read_samples(tmp_path / "data")


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        (CHATML.replace("<|end|>", "<|pad|>"), "ends no generation"),
        (
            "{% for m in messages %}<|user|>{% generation %}{{ m.content }}{% endgeneration %}"
            "<|end|>{% endfor %}",
            "carries no loss",
        ),
    ],
)
def test_an_end_of_turn_that_is_not_learnt_is_a_fault(
    small_tokenizer: Tokenizer, tmp_path: Path, template: str, fault: str
) -> None:
    """Guards: a model that never stops, found out after a night."""
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD, encoding="utf-8")
    reading = read(with_template(small_tokenizer, template), path)
    findings = examine(reading, FinetuneTable(), tmp_path, seq_len=64)
    assert any(fault in one for one in findings.faults), findings.faults
    with pytest.raises(DataError, match=fault):
        findings.require_sound()


def test_files_that_disagree_on_eos_are_a_fault(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Guards: a generation config that ends on another id than the tokenizer's."""
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD, encoding="utf-8")
    reading = read(small_tokenizer, path)
    for value, sound in ((small_tokenizer.eos_id, True), ([7, small_tokenizer.end_id], True),
                         (77, False), ([77, 78], False)):  # fmt: skip
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        findings = examine(reading, FinetuneTable(), tmp_path, seq_len=64)
        assert (not findings.faults) is sound, findings.faults


@pytest.mark.parametrize(("learnt", "method", "warned"), [
    (False, "lora", True), (False, "qlora", True), (False, "full", False), (True, "lora", False),
])  # fmt: skip
def test_an_adapter_over_a_base_that_never_saw_the_end_of_turn_is_warned_of(
    small_tokenizer: Tokenizer, tmp_path: Path, learnt: bool, method: str, warned: bool
) -> None:
    """Guards: a base from plain text, tuned with LoRA, that answers on and on: the embedding of
    the end of turn points where all unseen tokens point, and stays frozen."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([GOOD] * 40), encoding="utf-8")
    table = np.random.default_rng(0).normal(size=(small_tokenizer.padded_vocab_size, 16))
    if not learnt:
        table[small_tokenizer.end_id] = 2 * table[small_tokenizer.pad_id]
    weights = {"model.embed_tokens.weight": table.astype(np.float32)}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    reading = read(small_tokenizer, path)
    tuning = FinetuneTable.model_validate({"method": method})
    findings = examine(reading, tuning, tmp_path, seq_len=64)
    assert not findings.faults
    assert [("never learnt the end of turn" in line) for line in findings.warnings] == [
        True
    ] * warned


def test_questions_that_no_answer_can_be_right_to_are_named(
    small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Guards: GRPO on rows whose answers hold no number: groups that teach nothing, in silence."""
    path = tmp_path / "rows.jsonl"
    letter = json.dumps({"question": "which?\nA. this\nB. that", "answer": "A"})
    number = json.dumps({"question": "2 + 3?", "answer": "2 + 3 = 5\n#### 5"})
    table = FinetuneTable(objective="grpo")
    for lines, has_warning, has_fault in (
        ([number] * 3, False, False), ([number, letter], True, False), ([letter], False, True),
    ):  # fmt: skip
        path.write_text("\n".join(lines), encoding="utf-8")
        reading = read(small_tokenizer, path, objective="grpo")
        found = examine(reading, table, tmp_path, seq_len=64)
        assert any("never rewarded" in line for line in found.warnings) is has_warning
        assert any("never rewarded" in line for line in found.faults) is has_fault
