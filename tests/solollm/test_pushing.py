"""A run pushed over a real ssh server on this machine: interrupted, proven, resumed."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from solollm import pushing
from solollm.checkpoint import open_checkpoint
from solollm.cli import main
from solollm.config import RunConfig
from solollm.errors import ConfigError, IntegrityError, SoloLLMError, Stopped
from solollm.horizon import updated
from solollm.pretraining import pretrain, resume
from solollm.pushing import Programs, Target, push
from solollm.registry import Selected
from solollm.resume_proof import tiny_config
from solollm.runs import Run
from solollm.testing.toy import ToyBackend
from solollm.testing.watching import StopAt
from solollm.tokenizer import Tokenizer

STEPS = 12
SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
# What the server runs for each connection: the command that was asked for. The input of the rsync
# into one folder may be cut after so many bytes, as a connection is.
GATE = """\
import json, os, select, subprocess, sys
place = os.path.dirname(os.path.abspath(__file__))
asked = os.environ["SSH_ORIGINAL_COMMAND"]
rules = json.load(open(place + "/rules.json"))
if asked.startswith("python3") and rules.get("python3"):
    asked = rules["python3"]
cut_in, limit = rules["cut"]
if not (asked.startswith("rsync") and cut_in and cut_in in asked):
    limit = None
child = subprocess.Popen(["/bin/sh", "-c", asked], stdin=subprocess.PIPE)
count = 0
while child.poll() is None:
    if not select.select([0], [], [], 0.01)[0]:
        continue
    piece = os.read(0, 8192 if limit is None else min(8192, limit - count))
    count += len(piece)
    try:
        child.stdin.write(piece)
        child.stdin.flush()
    except BrokenPipeError:
        break
    if not piece or count == limit:
        break
if asked.startswith("rsync"):
    open(place + "/received.txt", "a").write(str(count) + "\\n")
try:
    child.stdin.close()
except BrokenPipeError:
    pass
code = child.wait()
sys.exit(255 if count == limit else code)
"""


@dataclass
class Server:
    """A real sshd on a loopback port, with keys of its own."""

    place: Path
    port: int
    key: Path

    @property
    def ssh(self) -> tuple[str, ...]:
        return self.ssh_with(self.key)

    def ssh_with(self, key: Path, hosts: str = "known_hosts") -> tuple[str, ...]:
        return (
            "ssh", "-F", "/dev/null", "-p", str(self.port), "-i", str(key),
            "-o", "IdentitiesOnly=yes", "-o", f"UserKnownHostsFile={self.place / hosts}",
            "-o", "StrictHostKeyChecking=yes",
        )  # fmt: skip

    @property
    def programs(self) -> Programs:
        return Programs(ssh=self.ssh)

    def target(self, folder: Path) -> str:
        return f"{getpass.getuser()}@127.0.0.1:{folder}"

    def rule(self, **rules: Any) -> None:
        (self.place / "rules.json").write_text(json.dumps({"cut": ["", 0], **rules}))
        (self.place / "received.txt").write_text("")

    @property
    def received(self) -> list[int]:
        """Bytes that reached each rsync."""
        return [int(line) for line in (self.place / "received.txt").read_text().split()]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Skips, with the reason, where there is no sshd or rsync, or none that starts."""
    missing = [n for n, p in (("sshd", SSHD), ("rsync", shutil.which("rsync"))) if p is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (apt-get install openssh-server rsync)")
    place = tmp_path_factory.mktemp("server")
    for name in ("host", "key", "stranger"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", place / name], check=True
        )
    (place / "gate.py").write_text(GATE)
    gate = f'command="{sys.executable} -ISE {place}/gate.py" '
    (place / "authorized").write_text(gate + (place / "key.pub").read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    public = " ".join((place / "host.pub").read_text().split()[:2])
    (place / "known_hosts").write_text(f"[127.0.0.1]:{port} {public}\n")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it; where systemd runs, it makes it
    options = {
        "Port": port, "ListenAddress": "127.0.0.1", "HostKey": place / "host", "PidFile": "none",
        "AuthorizedKeysFile": place / "authorized", "StrictModes": "no", "UsePAM": "no",
        "PasswordAuthentication": "no", "PermitRootLogin": "yes",
        "KexAlgorithms": "curve25519-sha256",  # the default takes more of the processor
        "SetEnv": "SHLVL=5",  # or bash reads the user's .bashrc, which may do anything
    }  # fmt: skip
    (place / "sshd_config").write_text("".join(f"{k} {v}\n" for k, v in options.items()))
    assert SSHD is not None
    with (place / "log").open("wb") as log:
        process = subprocess.Popen([SSHD, "-D", "-e", "-f", place / "sshd_config"], stderr=log)
    try:
        if not _answers(port, process):
            pytest.skip(f"sshd does not start here: {(place / 'log').read_text()[-300:]}")
        made = Server(place, port, place / "key")
        made.rule()
        yield made
    finally:
        process.terminate()
        process.wait()


def _answers(port: int, process: subprocess.Popen[bytes]) -> bool:
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return True
        if process.poll() is not None:
            return False
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def toy() -> Iterator[None]:
    """Runs train on the toy backend."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "solollm.pretraining.select_backend", lambda name: Selected(ToyBackend(), "a test")
        )
        yield


@pytest.fixture(scope="module")
def config(toy: None, small_corpus: Path, small_tokenizer: Tokenizer) -> RunConfig:
    made = tiny_config(small_corpus, small_tokenizer.padded_vocab_size, STEPS)
    return updated(made, "optimizer", name="adamw")


@pytest.fixture(scope="module")
def stopped(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after a few steps. Not to be written to."""
    path = tmp_path_factory.mktemp("stopped") / "first"
    with pytest.raises(Stopped):
        pretrain(config, path, sinks=[StopAt(4)])
    return path


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    """A copy of it, which finds the same corpus."""
    here = tmp_path / "here" / "first"
    shutil.copytree(stopped, here)
    corpus = (stopped / Run.open(stopped).config.data.corpus).resolve()
    text = (here / "run.toml").read_text()
    old, new = os.path.relpath(corpus, stopped.resolve()), os.path.relpath(corpus, here.resolve())
    (here / "run.toml").write_text(text.replace(f'"{old}"', f'"{new}"'))
    return here


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def equal_runs(here: Path, there: Path) -> bool:
    """Whether checkpoints and logs are equal to the byte."""
    ours, theirs = digests(here), digests(there)
    for name in ("run.toml", "report.html", "lock"):
        ours.pop(name, None), theirs.pop(name, None)
    return ours == theirs


def test_a_push_interrupted_twice_ends_equal_and_resumes_there(
    server: Server, run: Path, config: RunConfig, small_corpus: Path, tmp_path: Path
) -> None:
    """Guards the whole way: the connection breaks in the middle of the corpus and in the middle of
    a checkpoint; nothing has a name until all of it is proven, what came is not sent again, and
    the run that goes on there ends like one that stayed."""
    there = tmp_path / "there"
    size = sum(path.stat().st_size for path in (run / "checkpoints").rglob("*") if path.is_file())
    for cut in (["/corpora/", 4000], ["/checkpoints/", size // 2]):
        server.rule(cut=cut)
        with pytest.raises(Stopped, match="broke off") as stopped:
            push(run, server.target(there), programs=server.programs)
        assert stopped.value.exit_code == 75
        assert not (there / "runs").exists()
        assert not (there / "corpora").exists()
        assert cut[1] in server.received
    sizes = {path.name: path.stat().st_size for path in (run / "checkpoints").rglob("*.*")}
    staged = [path for path in (there / ".push-first" / "runs").rglob("*") if path.is_file()]
    (partial,) = [path.stat().st_size for path in staged if path.stat().st_size < sizes[path.name]]
    assert partial > 1000
    server.rule()
    pushed = push(run, server.target(there), programs=server.programs)
    assert 0 < pushed.sent_files < pushed.num_files
    assert sum(server.received) < pushed.sent_bytes - 0.8 * partial, "the begun file was sent anew"
    assert not (there / ".push-first").exists()
    assert equal_runs(run, there / "runs" / "first")
    corpus = digests(small_corpus)
    assert digests(there / "corpora" / small_corpus.name) == corpus

    watcher = StopAt()
    result = resume(Path(pushed.run), sinks=[watcher])
    assert watcher.of_kind("continuation_proven")[0]["result"] == "equal to the bit"
    pretrain(config, tmp_path / "stayed")
    stayed = open_checkpoint(tmp_path / "stayed" / "checkpoints" / f"step-{STEPS:08d}")
    assert open_checkpoint(result.checkpoint).certificate.digest == stayed.certificate.digest


def test_a_second_push_sends_only_what_is_new(
    server: Server, run: Path, small_corpus: Path, tmp_path: Path
) -> None:
    """Guards the delta: after more training the corpus stays where it is, the new checkpoint goes,
    and the run there is the newer one, whole."""
    there = tmp_path / "there"
    server.rule()
    push(run, server.target(there), programs=server.programs)
    again = push(run, server.target(there), programs=server.programs)
    assert again.sent_files == 0
    inode = (there / "corpora" / small_corpus.name / "index.json").stat().st_ino
    resume(run)
    names: list[str] = []
    push(run, server.target(there), programs=server.programs,
         on_send=lambda name, size: names.append(name))  # fmt: skip
    assert names == ["runs/first/checkpoints", "runs/first"]
    assert (there / "corpora" / small_corpus.name / "index.json").stat().st_ino == inode
    summary = Run.open(there / "runs" / "first")
    assert [row["step"] for row in summary.read_metrics() if row["kind"] == "train"][-1] == STEPS
    assert digests(there / "runs/first/checkpoints" / f"step-{STEPS:08d}") == digests(
        run / "checkpoints" / f"step-{STEPS:08d}"
    )


def test_what_must_not_be_overwritten_is_not(
    server: Server, run: Path, config: RunConfig, other_corpus: Path, small_corpus: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Guards the other machine's work: a run that went further there, one being trained there,
    another run of that name, another corpus of that name."""
    there, target = tmp_path / "there", server.target(tmp_path / "there")
    server.rule()
    push(run, target, programs=server.programs)
    moved = there / "runs" / "first"
    with Run.open(moved).lock(), pytest.raises(ConfigError, match="is being trained there"):
        push(run, target, programs=server.programs)
    resume(moved)
    before = digests(moved)
    with pytest.raises(ConfigError, match=f"is at step {STEPS}, ahead of step"):
        push(run, target, programs=server.programs)
    lineage = json.loads((moved / "lineage.json").read_text())
    lineage[0]["time"] = "2020-01-01T00:00:00+00:00"
    (moved / "lineage.json").write_text(json.dumps(lineage))
    with pytest.raises(ConfigError, match="is another run"):
        push(run, target, programs=server.programs)
    (moved / "lineage.json").write_text("")
    shutil.rmtree(there / "corpora" / small_corpus.name)
    shutil.copytree(other_corpus, there / "corpora" / small_corpus.name)
    with pytest.raises(ConfigError, match="is another corpus"):
        push(run, target, programs=server.programs)
    after = digests(moved)
    assert {**after, "lineage.json": ""} == {**before, "lineage.json": ""}


def test_bytes_that_arrive_wrong_get_no_name(
    server: Server, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the proof on the other side: an rsync that says all went well is not believed, and the
    next push mends it."""
    there = tmp_path / "there"
    server.rule()
    real = pushing._FarSide.send

    def send(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        path = next((there / ".push-first").rglob("model.safetensors"))
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(pushing._FarSide, "send", send)
    with pytest.raises(IntegrityError, match=r"model\.safetensors") as refused:
        push(run, server.target(there), programs=server.programs)
    assert refused.value.exit_code == 3
    assert not (there / "runs").exists()
    monkeypatch.undo()
    assert push(run, server.target(there), programs=server.programs).sent_files == 1
    assert equal_runs(run, there / "runs" / "first")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.ssh_with(s.place / "stranger"), "refuses this key"),
        (lambda s: s.ssh_with(s.key, hosts="nobody"), "host key of .* is unknown or has changed"),
        (lambda s: tuple("1" if w == str(s.port) else w for w in s.ssh), "cannot be reached"),
        (lambda s: ("no-such-ssh",), "`no-such-ssh` is not installed on this machine"),
    ],
    ids=["refused key", "unknown host", "nobody listens", "no ssh"],
)
def test_an_unreachable_machine_is_said(
    server: Server,
    run: Path,
    tmp_path: Path,
    change: Callable[[Server], tuple[str, ...]],
    said: str,
) -> None:
    """Guards the first five minutes with ssh: what is wrong, and what to do."""
    server.rule()
    with pytest.raises(SoloLLMError, match=said) as raised:
        push(run, server.target(tmp_path / "there"), programs=Programs(ssh=change(server)))
    assert raised.value.fix
    assert raised.value.exit_code == 1


def test_missing_programs_are_said(server: Server, run: Path, tmp_path: Path) -> None:
    """Guards a machine without rsync or Python, here or there."""
    target = server.target(tmp_path / "there")
    with pytest.raises(SoloLLMError, match="`no-rsync` is not installed on this machine"):
        push(run, target, programs=Programs(ssh=server.ssh, rsync=("no-rsync",)))
    server.rule(python3="no-python3-here -")
    with pytest.raises(SoloLLMError, match="has no `python3`"):
        push(run, target, programs=server.programs)
    empty = tmp_path / "empty"
    empty.mkdir()
    server.rule(python3=f"PATH={empty} {sys.executable} -")
    with pytest.raises(SoloLLMError, match="`rsync` is not installed on"):
        push(run, target, programs=server.programs)
    server.rule()


@pytest.mark.parametrize(
    "text",
    ["host", ":folder", "host:", "a b:folder", "-oProxyCommand=x:folder", "host:a b",
     "host:$(reboot)", "host:`id`", "host:a;b", "host:a'b", "host:-x"],
)  # fmt: skip
def test_targets_that_a_shell_would_read_otherwise_are_refused(text: str) -> None:
    """Guards the other machine's shell, and ours."""
    with pytest.raises(ConfigError, match="is no place to push to"):
        Target.parse(text)
    assert Target.parse("ada@studio.local:~/models") == ("ada@studio.local", "~/models")


def test_the_command(
    server: Server, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards the skin: exit codes 0 and 75, what is printed, help."""
    import shlex

    target, ssh = server.target(tmp_path / "there"), shlex.join(server.ssh)
    server.rule(cut=["/checkpoints/", 9000])
    assert main(["runs", "push", str(run), target, "--ssh", ssh, "--json"]) == 75
    server.rule()
    capsys.readouterr()
    assert main(["runs", "push", str(run), target, "--ssh", ssh, "--without-corpus"]) == 0
    printed = capsys.readouterr().out
    assert f"solollm resume {tmp_path / 'there' / 'runs' / 'first'}" in printed
    assert not (tmp_path / "there" / "corpora").exists()
    assert main(["runs", "push", "--help"]) == 0
    assert "Examples" in capsys.readouterr().out
