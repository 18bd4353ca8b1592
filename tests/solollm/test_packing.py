"""A packed run: every byte proven before anything runs, nothing outside its folder or lost."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from solollm import durable
from solollm.archive import ArchiveReader, FileRecord, _header
from solollm.bundle import Bundle
from solollm.checkpoint import open_checkpoint
from solollm.cli import main
from solollm.config import RunConfig, parse_config
from solollm.errors import ConfigError, IntegrityError, RunLocked, StorageError
from solollm.horizon import updated
from solollm.packing import pack, unpack
from solollm.pretraining import pretrain, resume
from solollm.registry import Selected
from solollm.resume_proof import tiny_config
from solollm.runs import Run
from solollm.strictfile import encode_json
from solollm.testing.disks import FailingDisk
from solollm.testing.toy import ToyBackend
from solollm.testing.watching import StopAt
from solollm.tokenizer import Tokenizer

Change = Callable[[dict[str, Any]], None]
STEPS, CUT = 12, 8
NEWEST = "runs/first/checkpoints/step-00000012"


@pytest.fixture(scope="module")
def toy() -> Any:
    """Runs train on the toy backend."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "solollm.pretraining.select_backend", lambda name: Selected(ToyBackend(), "a test")
        )
        yield


@pytest.fixture(scope="module")
def run(
    toy: None, small_corpus: Path, small_tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    """A finished run whose best checkpoint is the last, with one of step 8 beside it. Its corpus
    lies elsewhere. Not to be written to, but for its certificates."""
    path = tmp_path_factory.mktemp("here") / "first"
    config = tiny_config(small_corpus, small_tokenizer.padded_vocab_size, STEPS)
    pretrain(updated(config, "optimizer", name="adamw"), path)
    return path


@pytest.fixture(scope="module")
def archive(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, packed."""
    path = tmp_path_factory.mktemp("packed") / "first.solo"
    pack(run, path)
    return path


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_moved_run_ends_like_one_that_stayed(
    run: Path, toy: None, small_corpus: Path, tmp_path: Path
) -> None:
    """Guards the move as a whole: cut in the middle, unpacked elsewhere, the same bits at the end,
    the same losses on the way, its corpus found without being told where."""
    packed = pack(run, tmp_path / "cut.solo", step=CUT)
    assert packed.step == CUT
    moved = unpack(tmp_path / "cut.solo", tmp_path / "there")
    assert moved.run == tmp_path / "there" / "runs" / "first"
    assert moved.missing == ()
    assert Run.open(moved.run).config.data.corpus == f"../../corpora/{small_corpus.name}"
    watcher = StopAt()
    result = resume(moved.run, sinks=[watcher])
    assert result.start_step == CUT
    assert watcher.of_kind("continuation_proven")[0]["result"] == "equal to the bit"
    straight = open_checkpoint(run / "checkpoints" / "step-00000012")
    assert open_checkpoint(result.checkpoint).certificate.digest == straight.certificate.digest
    assert trained(moved.run) == trained(run)


def trained(run: Path) -> list[tuple[int, float]]:
    rows = Run.open(run).read_metrics()
    return [(row["step"], row["loss"]) for row in rows if row["kind"] == "train"]


def test_unpacked_files_are_the_packed_ones(
    run: Path, archive: Path, small_corpus: Path, tmp_path: Path
) -> None:
    """Guards a byte that changes on the way, a file that stays behind, and a path of this machine
    in any of them."""
    unpack(archive, tmp_path / "there")
    there, here = files(tmp_path / "there" / "runs" / "first"), files(run)
    for name in ("run.toml", "report.html", "lock"):
        there.pop(name, None), here.pop(name, None)
    here = {name: digest for name, digest in here.items() if "step-00000008" not in name}
    assert there == here
    assert files(tmp_path / "there" / "corpora" / small_corpus.name) == files(small_corpus)
    content = archive.read_bytes()
    for place in (run, small_corpus):
        assert str(place.parent).encode() not in content


def test_any_tar_program_reads_it(archive: Path, tmp_path: Path) -> None:
    """Guards the headers: `tar` unpacks the archive to the same files."""
    subprocess.run(["tar", "-xf", archive, "-C", tmp_path], check=True)
    bundle = json.loads((tmp_path / "bundle.json").read_bytes())
    (tmp_path / "bundle.json").unlink()
    assert files(tmp_path) == {n: file["sha256"] for n, file in bundle["files"].items()}
    with tarfile.open(archive) as opened:
        assert all(member.isfile() and member.mode == 0o644 for member in opened)


def test_packing_promises_and_does_so_once(run: Path, archive: Path, tmp_path: Path) -> None:
    """Guards `pack` of a run that ended by itself, whose certificate says nothing yet."""
    certificate = open_checkpoint(run / "checkpoints" / "step-00000012").certificate
    assert certificate.continuation is not None
    assert certificate.continuation.environment is None
    pack(run, tmp_path / "again.solo")
    assert (tmp_path / "again.solo").read_bytes() == archive.read_bytes()


def test_without_its_corpus(
    run: Path, toy: None, small_corpus: Path, archive: Path, tmp_path: Path
) -> None:
    """Guards the small archive: it says what is missing, and takes the corpus that is there."""
    packed = pack(run, tmp_path / "small.solo", with_corpus=False, step=CUT)
    assert packed.corpora == ()
    assert packed.archive_bytes < archive.stat().st_size
    moved = unpack(tmp_path / "small.solo", tmp_path / "there")
    assert moved.missing == (tmp_path / "there" / "corpora" / small_corpus.name,)
    assert resume(moved.run, corpus=small_corpus).start_step == CUT
    shutil.copytree(small_corpus, tmp_path / "second" / "corpora" / small_corpus.name)
    again = unpack(tmp_path / "small.solo", tmp_path / "second")
    assert again.missing == ()
    assert resume(again.run).start_step == CUT


def test_a_corpus_that_is_there_is_used_and_another_is_refused(
    archive: Path, small_corpus: Path, other_corpus: Path, tmp_path: Path
) -> None:
    """Guards what a project folder holds already."""
    place = tmp_path / "corpora" / small_corpus.name
    shutil.copytree(small_corpus, place)
    before = {path: path.stat().st_ino for path in place.rglob("*")}
    unpack(archive, tmp_path)
    assert {path: path.stat().st_ino for path in place.rglob("*")} == before
    with pytest.raises(ConfigError, match="exists"):
        unpack(archive, tmp_path)
    shutil.rmtree(place)
    shutil.rmtree(tmp_path / "runs")
    shutil.copytree(other_corpus, place)
    with pytest.raises(ConfigError, match="is another corpus"):
        unpack(archive, tmp_path)
    assert not (tmp_path / "runs").exists()


def test_a_flipped_bit_anywhere_is_refused_before_anything_is_there(
    archive: Path, tmp_path: Path
) -> None:
    """Guards every byte: of the list, of headers, of contents, of padding, of the end."""
    content = archive.read_bytes()
    chance = random.Random(5)
    with ArchiveReader(archive) as reader:
        spots = [512 + chance.randrange(3000), 5, 130, len(content) - 3]
        at = reader._at
        for name, record in reader.bundle.files.items():
            spots += [at + 90, at + 130, at + 156, at + 157]  # name, size, type, link
            at += 512
            spots += [at + chance.randrange(record.bytes)] if record.bytes else []
            padded = -(-record.bytes // 512) * 512
            spots += [at + padded - 1] if padded > record.bytes else []
            at += padded
            assert name
    for spot in spots:
        damaged = bytearray(content)
        damaged[spot] ^= 1 << chance.randrange(8)
        path = tmp_path / "damaged.solo"
        path.write_bytes(damaged)
        with pytest.raises(IntegrityError):
            unpack(path, tmp_path / "there")
        left = [p for p in (tmp_path / "there").rglob("*") if p.is_file()]
        assert left == [], spot


@pytest.mark.parametrize(
    ("member", "named"),
    [
        (f"{NEWEST}/model.safetensors", "tensor 'model.layers.1.mlp.up_proj.weight'"),
        (f"{NEWEST}/optimizer.safetensors", "tensor 'exp_avg_sq.model.norm.weight'"),
        (f"{NEWEST}/trainer_state.json", "trainer_state.json"),
        ("runs/first/metrics.jsonl", "metrics.jsonl"),
        ("corpora/small/train/tokens-00000.bin", "corpora/small/train/tokens-00000.bin"),
    ],
)
def test_the_damaged_file_and_tensor_are_named(
    archive: Path, tmp_path: Path, member: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards the error message: one byte changed ends with 3 and says where."""
    with tarfile.open(archive) as opened:
        entry = opened.getmember(member)
    spot = entry.offset_data + entry.size // 2
    if "tensor" in named:
        spot = entry.offset_data + tensor_offset(archive, entry, named.split("'")[1])
    damaged = bytearray(archive.read_bytes())
    damaged[spot] ^= 4
    (tmp_path / "damaged.solo").write_bytes(damaged)
    assert main(["runs", "unpack", str(tmp_path / "damaged.solo"), str(tmp_path / "there")]) == 3
    printed = capsys.readouterr().err
    assert member in printed
    assert named in printed
    assert not (tmp_path / "there" / "runs" / "first").exists()


def tensor_offset(archive: Path, entry: tarfile.TarInfo, name: str) -> int:
    """Where in the member a byte of that tensor is."""
    content = archive.read_bytes()[entry.offset_data :]
    length = int.from_bytes(content[:8], "little")
    return 8 + length + int(json.loads(content[8 : 8 + length])[name]["data_offsets"][0])


@pytest.mark.parametrize("cut", [1, 600, 5000, -1, -1024])
def test_a_cut_or_longer_archive_is_refused(archive: Path, tmp_path: Path, cut: int) -> None:
    """Guards a copy that broke off, and bytes behind the end."""
    path = tmp_path / "cut.solo"
    path.write_bytes(archive.read_bytes()[:cut])
    with pytest.raises(IntegrityError):
        unpack(path, tmp_path / "there")
    path.write_bytes(archive.read_bytes() + bytes(512))
    with pytest.raises(IntegrityError):
        unpack(path, tmp_path / "there")
    assert not (tmp_path / "there" / "runs").exists()


def forged(tmp_path: Path, change: Change) -> Path:
    """An archive whose list, digest and headers fit each other, and that holds what it must not."""
    content = {"runs/x/run.toml": b"", "runs/x/plan.json": b"{}"}
    record = {n: FileRecord(bytes=len(c), sha256=hashlib.sha256(c).hexdigest())
              for n, c in content.items()}  # fmt: skip
    needs: dict[str, Any] = {"corpora": {"c": "0"}, "models": {"m": "0" * 64}}
    table = Bundle(run="x", step=1, files=record, **needs).model_dump(mode="json")
    change(table)
    table["digest"] = hashlib.sha256(encode_json({**table, "digest": ""})).hexdigest()
    listing = encode_json(table)
    body = b""
    for name, entry in table["files"].items():
        data = content.get(name, b"x" * min(9, int(entry["bytes"])))
        body += _header(name, len(data)) + data + bytes(-len(data) % 512)
    path = tmp_path / "forged.solo"
    head = _header("bundle.json", len(listing)) + listing + bytes(-len(listing) % 512)
    path.write_bytes(head + body + bytes(1024))
    return path


ONE = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
HOSTILE = {
    "up": "runs/x/../../escaped",
    "absolute": "/tmp/escaped",
    "drive": "runs/x/C:/escaped",
    "backslash": "runs/x/..\\escaped",
    "elsewhere": "other/x/file",
    "another run": "runs/y/file",
    "another corpus": "corpora/d/index.json",
    "another model": "models/n/config.json",
    "hidden": "runs/x/.ssh/authorized_keys",
    "dot": "runs/x/./file",
    "empty": "runs/x//file",
    "too deep": "runs/x/a/b/c/d",
    "the folder itself": "runs/x",
    "a file twice": "runs/x/PLAN.json",
    "below a file": "runs/x/plan.json/inner",
    "control character": "runs/x/a\nb",
}


@pytest.mark.parametrize("path", HOSTILE.values(), ids=HOSTILE.keys())
def test_paths_that_lead_out_are_refused(tmp_path: Path, path: str) -> None:
    """Guards the rest of the disk against an archive that somebody else made."""
    assert not forged_error(tmp_path, lambda table: None)
    error = forged_error(tmp_path, lambda table: table["files"].update({path: ONE}))
    assert "is refused" in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["forged.solo", "there"]


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.update(run="../x"),
        lambda table: table.update(run=".hidden"),
        lambda table: table.update(run="x" * 81),
        lambda table: table.update(corpora={"../c": "0"}),
        lambda table: table.update(models={"../m": "0" * 64}),
        lambda table: table.update(models={"m": "0"}),
        lambda table: table.update(format_version=2),
        lambda table: table.update(format="tar"),
        lambda table: table.update(extra=1),
        lambda table: table["files"].pop("runs/x/run.toml"),
        lambda table: table["files"]["runs/x/plan.json"].update(sha256="0" * 64),
        lambda table: table["files"]["runs/x/plan.json"].update(bytes=3),
        lambda table: table["files"]["runs/x/plan.json"].update(bytes=-2),
        lambda table: table["files"]["runs/x/plan.json"].update(bytes=2**60),
    ],
    ids=["run leads out", "hidden run", "long run", "corpus leads out",
         "model leads out", "no content", "newer", "other format",
         "unknown key", "no run.toml", "wrong digest", "wrong size", "negative", "huge"],
)  # fmt: skip
def test_lists_that_lie_are_refused(tmp_path: Path, change: Change) -> None:
    """Guards against a list whose own digest is right and whose content is not."""
    assert "is refused" in forged_error(tmp_path, change)


def forged_error(tmp_path: Path, change: Change) -> str:
    shutil.rmtree(tmp_path / "there", ignore_errors=True)
    (tmp_path / "there").mkdir()
    try:
        unpack(forged(tmp_path, change), tmp_path / "there")
    except IntegrityError as error:
        assert not list((tmp_path / "there").glob("*/*")), "something is left"
        return str(error)
    return ""


def test_a_list_changed_by_one_letter_everywhere_is_refused(archive: Path, tmp_path: Path) -> None:
    """Guards what no file's digest covers, such as the run's name: the list seals itself."""
    renamed = archive.read_bytes().replace(b'"run": "first"', b'"run": "fjrst"')
    renamed = renamed.replace(b'"runs/first/', b'"runs/fjrst/')
    (tmp_path / "renamed.solo").write_bytes(renamed)
    with pytest.raises(IntegrityError, match="its own digest differs"):
        unpack(tmp_path / "renamed.solo", tmp_path / "there")


def test_starting_weights_stay_behind(
    run: Path, toy: None, small_corpus: Path, tmp_path: Path
) -> None:
    """Guards a run made by --init-from: it goes on where the weights it began with are not, and
    the archive does not name their place."""
    base = tmp_path / "a place of mine" / "base"
    shutil.copytree(run / "checkpoints" / "step-00000012", base)
    config = parse_config(
        {
            "data": {"corpus": str(small_corpus), "seq_len": 64},
            "optimizer": {"name": "adamw"},
            "train": {"steps": 4, "batch_size": 6, "init_from": str(base)},
            "checkpoint": {"every_steps": 2},
        }
    )
    pretrain(config, tmp_path / "tuned")
    shutil.rmtree(base)
    pack(tmp_path / "tuned", tmp_path / "tuned.solo", step=2)
    assert b"a place of mine" not in (tmp_path / "tuned.solo").read_bytes()
    assert resume(unpack(tmp_path / "tuned.solo", tmp_path / "there").run).step == 4
    shutil.rmtree(tmp_path / "tuned" / "checkpoints" / "step-00000004")
    assert resume(tmp_path / "tuned").step == 4


def test_a_corpus_other_than_the_promised_is_refused(
    run: Path, other_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards a bundle whose corpus is whole and not the run's."""
    real = Bundle.__init__

    def lying(self: Bundle, **fields: Any) -> None:
        real(self, **{**fields, "corpora": dict.fromkeys(fields.get("corpora", {}), "f" * 32)})

    monkeypatch.setattr(Bundle, "__init__", lying)
    pack(run, tmp_path / "lying.solo")
    monkeypatch.undo()
    with pytest.raises(IntegrityError, match="has fingerprint"):
        unpack(tmp_path / "lying.solo", tmp_path / "there")
    assert not [p for p in (tmp_path / "there").rglob("*") if p.is_file()]


def test_damage_before_packing_is_found_by_it(
    toy: None, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards a good list of bad files: a damaged newest checkpoint is passed over as a resume does,
    a damaged corpus ends with 3, and no archive is left."""
    copy = tmp_path / "first"
    shutil.copytree(run, copy)
    corpus = tmp_path / "corpus"
    shutil.copytree(Path(Run.open(run).config.data.corpus.join([f"{run}/", ""])).resolve(), corpus)
    text = (copy / "run.toml").read_text()
    old = Run.open(run).config.data.corpus
    (copy / "run.toml").write_text(text.replace(old, "../corpus"))
    damage(copy / "checkpoints" / "step-00000012" / "model.safetensors")
    assert pack(copy, tmp_path / "older.solo").step == CUT
    with pytest.raises(IntegrityError):
        pack(copy, tmp_path / "newest.solo", step=STEPS)
    damage(corpus / "train" / "tokens-00000.bin")
    capsys.readouterr()
    assert main(["runs", "pack", str(copy), str(tmp_path / "damaged.solo")]) == 3
    assert "tokens-00000.bin is damaged" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("*.solo")] == ["older.solo"]


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_everyday_mistakes(run: Path, archive: Path, tmp_path: Path) -> None:
    """Guards against overwritten archives and half-made decisions."""
    with pytest.raises(ConfigError, match="exists"):
        pack(run, archive)
    with pytest.raises(ConfigError, match="no checkpoint of step 3"):
        pack(run, tmp_path / "x.solo", step=3)
    with Run.open(run).lock(), pytest.raises(RunLocked):
        pack(run, tmp_path / "x.solo")
    (tmp_path / "text.solo").write_text("no archive at all\n" * 100)
    with pytest.raises(IntegrityError, match="not the start of a packed run"):
        unpack(tmp_path / "text.solo", tmp_path / "there")
    with pytest.raises(ConfigError, match="does not exist"):  # misspelt, not damaged
        unpack(tmp_path / "absent.solo", tmp_path / "there")
    shutil.copytree(run, tmp_path / "läuft")
    with pytest.raises(ConfigError, match="cannot travel under this name"):
        pack(tmp_path / "läuft", tmp_path / "x.solo")
    assert [path.name for path in tmp_path.glob("*.solo")] == ["text.solo"]


def test_a_full_disk_leaves_nothing(
    run: Path, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards a half-unpacked run and a half-written archive that look whole."""
    for number in (3, 9, 30, 60):
        monkeypatch.setattr(durable, "DISK", FailingDisk(number, 28, lasting=True))
        with pytest.raises(StorageError):
            unpack(archive, tmp_path / "there")
        monkeypatch.undo()
        assert not [p for p in (tmp_path / "there").rglob("*") if p.is_file()]
    monkeypatch.setattr(durable, "DISK", FailingDisk(6, 28, lasting=True))
    with pytest.raises(StorageError):
        pack(run, tmp_path / "full.solo")
    monkeypatch.undo()
    assert not list(tmp_path.glob("*.solo*"))


def test_names_and_sizes_at_the_edge() -> None:
    """Guards long paths and files of 8 GiB and more: Python's own reader agrees with the header."""
    for path in ("runs/" + "r" * 80 + "/checkpoints/step-00001000/model-00001-of-00002.safetensors",
                 "runs/x/run.toml"):  # fmt: skip
        for size in (0, 8**11 - 1, 8**11, 2**50):
            found = tarfile.TarInfo.frombuf(_header(path, size), "utf-8", "strict")
            assert (found.name, found.size, found.isfile()) == (path, size, True)


def test_both_corpora_travel(
    toy: None, small_corpus: Path, other_corpus: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Guards the decay corpus, and two corpora of one name in different folders."""
    twin = tmp_path / "elsewhere" / small_corpus.name
    shutil.copytree(other_corpus, twin)
    config: RunConfig = tiny_config(small_corpus, small_tokenizer.padded_vocab_size, 8)
    config = updated(updated(config, "optimizer", name="adamw"), "data", decay_corpus=str(twin))
    pretrain(config, tmp_path / "run")
    packed = pack(tmp_path / "run", tmp_path / "both.solo")
    assert packed.corpora == (small_corpus.name, f"{small_corpus.name}-decay")
    moved = unpack(tmp_path / "both.solo", tmp_path / "there")
    data = Run.open(moved.run).config.data
    assert (moved.run / data.corpus / "index.json").exists()
    assert files(moved.run / data.decay_corpus) == files(twin)


def test_commands_say_what_to_do_next(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards the skins: what is printed, and the JSON of both."""
    assert main(["runs", "pack", str(run), str(tmp_path / "a.solo")]) == 0
    assert "solollm runs unpack a.solo FOLDER" in capsys.readouterr().out
    assert main(["runs", "unpack", str(tmp_path / "a.solo"), str(tmp_path / "t")]) == 0
    assert f"solollm resume {tmp_path / 't' / 'runs' / 'first'}" in capsys.readouterr().out
    assert main(["runs", "pack", str(run), str(tmp_path / "b.solo"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == STEPS
    for name in ("pack", "unpack"):
        assert main(["runs", name, "--help"]) == 0
        assert "Example" in capsys.readouterr().out
