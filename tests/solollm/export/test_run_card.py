"""`solollm runs card`: every figure is the run's own, and nothing private is in it."""

from __future__ import annotations

import json
import shutil
import socket
from getpass import getuser
from pathlib import Path
from typing import Any

import pytest

from solollm.checkpoint import open_checkpoint
from solollm.cli import main
from solollm.completion import find_checkpoint
from solollm.data.build import build_corpus
from solollm.data.decontamination import Decontaminated
from solollm.data.report import read_report
from solollm.errors import IntegrityError, SoloLLMError
from solollm.export import export_model
from solollm.export.record import _corpus_rows, _sample_rows, held_out_figure, sample_section, table
from solollm.export.run_card import run_card
from solollm.finetune.samples import SamplesIndex
from solollm.runs import Run
from solollm.tokenizer import Tokenizer

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from files with telling names, two of them equal."""
    folder = tmp_path_factory.mktemp("notes-of-ada")
    for number in range(12):
        words = " ".join(f"{chr(97 + number)}word{place * number % 97}" for place in range(300))
        (folder / f"secret-plan-{number}.txt").write_text(words)
    (folder / "secret-plan-copy.txt").write_text((folder / "secret-plan-3.txt").read_text())
    out = folder.parent / "corpora" / "small"
    build_corpus([str(folder)], out, vocab_size=512, validation_fraction=0.2)
    return out


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps, evaluated."""
    path = tmp_path_factory.mktemp("card") / "poet"
    words = [
        "pretrain", "--corpus", str(corpus), "--run", str(path), "--depth", "1",
        "--set", "train.steps=2", "--set", "data.seq_len=32",
    ]  # fmt: skip
    assert main(words) == 0
    assert main(["eval", str(path), "--max-bytes", "2000"]) == 0
    return path


def test_every_figure_is_the_runs_own(run: Path, corpus: Path) -> None:
    """Guards the card against figures that nothing on the disk gives."""
    text = run_card(run)
    checkpoint = open_checkpoint(find_checkpoint(run)[0])
    report, state = read_report(corpus), checkpoint.state
    train, held_out = report.splits["train"], report.splits["validation"]
    rows = [row for row in Run.open(run).read_metrics() if row["kind"] == "eval"]
    (stored,) = (run / "evaluations").glob("*.json")
    (score,) = json.loads(stored.read_text())["texts"]
    checkpoint.close()
    for fact in (
        f"# {run.name}\n", f"of {checkpoint.model.num_parameters():,} parameters",
        f"`{checkpoint.certificate.digest}`", f"| batches | fingerprint `{state.data.fingerprint}`",
        f"| corpus | fingerprint `{report.fingerprint}` |",
        f"| tokens trained on | {state.tokens_seen:,} |", "| steps | 2 of 2 planned |",
        f"| trained on | {train.documents:,} documents, {train.tokens:,} tokens,",
        f"| held out | {held_out.documents:,} documents, {held_out.tokens:,} tokens,",
        f"| passes over it | {state.tokens_seen / train.tokens:.2f} |",
        "| left out | of 13 items: 1 equal to another |",
        f"**{rows[-1]['loss']:.4f} nats per token**", f"{score['bits_per_byte']:.4f} bits per byte",
    ):  # fmt: skip
        assert fact in text, text


def test_nothing_private_is_in_it(run: Path, corpus: Path) -> None:
    """Guards who publishes a card: it names no folder, file, machine or person."""
    text = run_card(run, licence="apache-2.0", languages=("en",))
    sources = ["secret-plan", "notes-of-ada"]
    for private in (str(run.parent), str(corpus), socket.gethostname(), *sources):
        assert private not in text, private
    assert f"/{getuser()}/" not in text
    assert 'license: "apache-2.0"\nlanguage:\n- "en"\n' in text
    assert "No licence is stated" not in text


def test_a_mixture_is_trained_on_and_told(corpus: Path, tmp_path: Path) -> None:
    """Guards `solollm data mix` from corpora to a run and its card, which names none of them."""
    texts = tmp_path / "other-plan.jsonl"
    lines = (f'{{"text": "another text, number {n}, {"word " * n}"}}\n' for n in range(50))
    texts.write_text("".join(lines))
    other, mixed, run = tmp_path / "other-plan", tmp_path / "mixed", tmp_path / "run"
    build_corpus([texts], other, tokenizer=Tokenizer.load(corpus / "tokenizer"))
    assert main(["data", "mix", f"{corpus}=0.4", f"{other}=0.6", "--out", str(mixed)]) == 0
    assert main(["pretrain", "--corpus", str(mixed), "--run", str(run), "--depth", "1",
                 "--set", "train.steps=2", "--set", "data.seq_len=32"]) == 0  # fmt: skip
    text, report = run_card(run), read_report(mixed)
    shares = [
        f"{part.tokens / report.splits['train'].tokens:.1%} from a corpus passed {part.passes:.2f}"
        for part in report.parts
    ]
    assert f"| mixed | {shares[0]} times; {shares[1]} times |" in text
    assert "other-plan" not in text


def test_without_its_corpus_a_run_says_so(run: Path, tmp_path: Path) -> None:
    """Guards a run that was moved, and one whose corpus was built anew: no figures of another."""
    text = run_card(shutil.copytree(run, tmp_path / "moved" / "runs" / "poet"))
    assert "not at hand any more" in text
    assert "passes over it" not in text


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the skin: printed or written, never over a file, and one clear error for no run."""
    capsys.readouterr()
    assert main(["runs", "card", str(run)]) == 0
    assert capsys.readouterr().out == run_card(run)
    out = tmp_path / "README.md"
    assert main(["runs", "card", str(run), "--out", str(out), "--name", "My\nmodel | x"]) == 0
    assert "# My model | x\n" in out.read_text()
    assert main(["runs", "card", str(run), "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["runs", "card", str(tmp_path)]) == 2
    assert "is no run" in capsys.readouterr().err


def test_a_damaged_checkpoint_has_no_card(copied: Path) -> None:
    """Guards against a card of files that are not what was trained."""
    (weights,) = copied.glob("checkpoints/*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(SoloLLMError):
        run_card(copied)


def test_what_a_model_wrote_stays_in_its_fence() -> None:
    """Guards the page: text of a model may be Markdown, and cells may hold bars."""
    rows: list[dict[str, Any]] = [
        {"kind": "sample", "step": 3, "prompt": "a", "text": "````\n# no head\x1b[2J"},
        {"kind": "sample", "step": 9, "prompt": "", "text": "later"},
    ]
    section = sample_section(rows, 5)
    assert section == "Written at step 3, unedited:\n\n`````text\na````\n# no head[2J\n`````\n"
    assert sample_section(rows, 2) == ""
    assert table(("a", "b"), [("x|y", "two\nlines")]).endswith("| x\\|y | two lines |\n")


@pytest.mark.parametrize(
    ("objective", "row", "told"),
    [
        ("grpo", {"loss": 0.75, "reward": 0.25, "targets": 8}, "over 8 prompts held out of"
         " training: **0.2500**, measured at step 6"),
        ("dpo", {"loss": 0.7, "accuracy": 0.5, "targets": 4, "bits_per_byte": None}, "DPO's loss"
         " over 4 pairs held out of training: **0.7000**; 50% of them preferred the right"),
        ("sft", {"loss": 1.5, "bits_per_byte": 2.0, "targets": 1}, "Loss on samples held out of"
         " training: **1.5000 nats per token** (2.0000 bits per byte) over 1 token,"),
        ("grpo", {"loss": 0.75}, "None was recorded."),
        ("", {"loss": "1.5"}, "None was recorded."),
    ],
)  # fmt: skip
def test_a_held_out_figure_has_the_unit_of_its_objective(
    objective: str, row: dict[str, Any], told: str
) -> None:
    """Guards against 1 - reward, and the loss of a pair, published as nats per token."""
    assert told in held_out_figure({"kind": "eval", "step": 6, **row}, objective)


def test_pairs_are_counted_as_pairs() -> None:
    """Guards the count of preferences, of which each is two samples."""
    split = {"samples": 160, "group": 2, "text_bytes": 9, "digest": "d"}
    index = SamplesIndex.model_validate({"tokenizer_digest": "t", "splits": {"train": split}})
    assert _sample_rows(index) == [("trained on", "80 pairs")]


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copied"))


@pytest.mark.parametrize(
    "document",
    [
        {"texts": 5}, {"texts": [{}]}, {"texts": [{"name": 1}]}, {"benchmarks": [1]},
        {"benchmarks": {"scores": [{}]}}, {"passages": [{}]}, {"contamination": [{}]},
        {"contamination": 3}, {"model": 3},
    ],
)  # fmt: skip
def test_an_evaluation_of_another_layout_is_passed_over(copied: Path, document: Any) -> None:
    """Guards against a traceback for a file that something else has written."""
    before = run_card(copied)
    (step,) = (path.name for path in (copied / "checkpoints").iterdir())
    (copied / "evaluations" / f"{step}-zzz.json").write_text(json.dumps(document))
    assert run_card(copied) == before


def test_an_evaluation_of_other_weights_is_passed_over(copied: Path) -> None:
    """Guards a figure of a checkpoint that was written anew under the same name."""
    before = run_card(copied)
    (stored,) = (copied / "evaluations").glob("*.json")
    document = json.loads(stored.read_text())
    assert "bits per byte" in before.split("## Evaluation")[1].split("by |")[1]
    document["model"]["manifest_sha256"] = "0" * 64
    stored.write_text(json.dumps(document))
    assert "measured on" not in run_card(copied)


def test_names_of_measured_texts_stay_here(copied: Path) -> None:
    """Guards who measured a model on a client's file, and what is told of the items asked."""
    (stored,) = (copied / "evaluations").glob("*.json")
    document = json.loads(stored.read_text())
    document["texts"].append({**document["texts"][0], "name": "clients/miller.txt"})
    document["texts"].append({**document["texts"][0], "name": "other.txt"})
    document["contamination"] = [
        {"benchmark": "mmlu", "corpus": "secret", "looked_for": 5, "not_looked_for": 0,
         "too_short": 2},
        {"benchmark": "arc", "corpus": "", "looked_for": 0, "not_looked_for": 0, "too_short": 0},
    ]  # fmt: skip
    stored.write_text(json.dumps(document))
    text = run_card(copied)
    for row in ("| held-out documents |", "| text 1 |", "| text 2 |"):
        assert row in text
    assert (
        "- mmlu: the corpus was built without texts that hold one of these 5 items (2 are" in text
    )
    for private in ("miller", "other.txt", "secret", "arc:"):
        assert private not in text


def test_what_was_looked_for(run: Path, corpus: Path) -> None:
    """Guards a row that few corpora have."""
    checkpoint = open_checkpoint(find_checkpoint(run)[0])
    looked = Decontaminated(source="gsm8k/test.jsonl", items=1319, too_short=0, found=2, texts=1)
    report = read_report(corpus).model_copy(update={"decontaminated": (looked,)})
    told = dict(_corpus_rows(report, checkpoint.state, is_all=True))  # type: ignore[arg-type]
    checkpoint.close()
    assert told["looked for"] == "1,319 items of gsm8k/test.jsonl: 1 text that held one left out"


def test_rows_without_a_step_are_passed_over(copied: Path) -> None:
    """Guards against a traceback for a row that a crash, or another program, has left."""
    before = run_card(copied)
    with (copied / "metrics.jsonl").open("a") as log:
        log.write('{"kind":"sample","step":"x"}\n{"kind":"sample","step":null,"text":"a"}\n')
    assert run_card(copied) == before


@pytest.mark.parametrize("entry", [{}, {"environment": "x"}, {"environment": {"versions": [1]}}])
def test_a_damaged_record_is_one_error_and_the_weights_still_leave(
    copied: Path, tmp_path: Path, entry: dict[str, Any]
) -> None:
    """Guards against "None was recorded" of a run whose record cannot be read."""
    (copied / "lineage.json").write_text(json.dumps([{"first_step": 0, **entry}]))
    with pytest.raises(IntegrityError, match="is no list of environments"):
        run_card(copied)
    report = export_model(copied, tmp_path / "out")
    assert "the run's own record is damaged" in report.notes[-1]
    again = export_model(tmp_path / "out", tmp_path / "again")
    assert "README.md stays behind" in again.notes[-1]


def test_a_damaged_checkpoint_that_was_passed_over_is_told(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against the card of an earlier checkpoint in the place of the newest, in silence."""
    capsys.readouterr()
    (step,) = (copied / "checkpoints").iterdir()
    newest = shutil.copytree(step, copied / "checkpoints" / "step-00000009")
    (newest / "model.safetensors").write_bytes(b"torn")
    assert main(["runs", "card", str(copied)]) == 0
    shown = capsys.readouterr()
    assert "| steps | 2 of 2 planned |" in shown.out
    assert "skipped step-00000009" in shown.err
