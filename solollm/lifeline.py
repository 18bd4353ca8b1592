"""What tells the processes of one run that one of them has ended, or hangs.

Inside a framework's collective no Python runs, and some wait there for ever for a rank that is gone
or stands still. So each rank holds a TCP link to the rank after it and one to the rank before it,
the same neighbours as in a ring of machines, and a thread beside the training says on both that it
lives. A link that closes without a word of leave, or on which nothing comes, is a lost rank; so is
this one, where its own training does not get from one exchange to the next. Whoever notices ends
too; that closes its links, and so the news goes round.

Who the ranks are and what is written down of a loss: `solollm.ranks`.
"""

from __future__ import annotations

import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import NamedTuple

from solollm.errors import BackendError, RankLost

BEAT_SECONDS = 1.0
_ALIVE, _LEAVING, _REFUSING = b".", b"q", b"x"
_CLOSED = b"!"  # not said: what stands for the end of a link
_TOKEN_BYTES = 16
_PARTING_SECONDS = 2.0


class Patience(NamedTuple):
    """How long a rank may say nothing, and how long training may take between two exchanges."""

    silent_seconds: float
    stalled_seconds: float

    @property
    def grace_seconds(self) -> float:
        """How long a thread that trains may take to end by itself once a rank is lost."""
        return min(2.0, self.silent_seconds)


class _Loss(NamedTuple):
    why: str
    hangs: bool = False  # or it has ended
    refuses: bool = False  # it has ended before training, for a reason that others may share


class Lifeline:
    """Watches `links` until `leave`, `refuse` or `drop`; then they are closed.

    Once a rank is lost, `note` is called on a thread of this with what has happened and whether a
    rank hangs; and `end`, which should end the process, where the training has not ended by itself
    soon after.
    """

    def __init__(
        self, links: Sequence[socket.socket], patience: Patience, *,
        note: Callable[[RankLost, bool], None], end: Callable[[RankLost], None],
    ) -> None:  # fmt: skip
        self._quiet_seconds = dict.fromkeys(links, 0.0)
        self._patience, self._note, self._end_process = patience, note, end
        self._stalled_seconds = 0.0
        self._over = threading.Event()
        for link in links:
            link.setblocking(False)
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
        self._thread.start()

    def progress(self) -> None:
        """The training has got as far as another exchange."""
        self._stalled_seconds = 0.0

    def leave(self) -> None:
        """End in order: the neighbours go on without this rank."""
        self._end(_LEAVING)

    def refuse(self) -> None:
        """End before training, with an error that has a reason: the neighbours may find it too."""
        self._end(_REFUSING)

    def drop(self) -> None:
        """End for an error: the neighbours have lost this rank."""
        self._end(b"")

    def _end(self, word: bytes) -> None:
        self._over.set()
        self._thread.join()
        if word:
            _part(list(self._quiet_seconds), word)
        for link in self._quiet_seconds:
            link.close()

    def _watch(self) -> None:
        beat = min(BEAT_SECONDS, self._patience.silent_seconds / 4)
        left: set[socket.socket] = set()
        while not self._over.is_set():
            loss = self._look(beat, left)
            if loss is not None:
                self._answer(loss)
                return

    def _look(self, beat: float, left: set[socket.socket]) -> _Loss | None:
        """Speak and listen for one beat. Time is counted in beats, so that this process's own
        sleep is nobody's silence."""
        present = [link for link in self._quiet_seconds if link not in left]
        for link in present:
            _say(link, _ALIVE)
        heard = _hear(present, beat, self._over)
        for link in present:
            word = heard.get(link, b"")
            if _LEAVING in word:
                left.add(link)
            elif _REFUSING in word:
                return _Loss("it has ended with an error of its own", refuses=True)
            elif word.endswith(_CLOSED):
                return _Loss("its connection was closed")
            self._quiet_seconds[link] = 0.0 if word else self._quiet_seconds[link] + beat
            if self._quiet_seconds[link] > self._patience.silent_seconds:
                seconds = self._quiet_seconds[link]
                return _Loss(f"it has said nothing for {seconds:.0f} seconds", hangs=True)
        self._stalled_seconds += beat
        if self._stalled_seconds > self._patience.stalled_seconds:
            return _Loss(f"no step has ended for {self._stalled_seconds:.0f} seconds", hangs=True)
        return None

    def _answer(self, loss: _Loss) -> None:
        error = RankLost(loss.why)
        if not loss.refuses:  # a launcher may end this process next: write down before all else
            self._note(error, loss.hangs)
        if self._over.wait(self._patience.grace_seconds):
            return
        if loss.refuses:
            self._note(error, loss.hangs)
        self._end_process(error)


def _say(link: socket.socket, word: bytes) -> None:
    with suppress(OSError):  # gone, or has not read for days: what is heard from it decides
        link.send(word)


def _part(links: Sequence[socket.socket], word: bytes) -> None:
    """Say a last word, and read on until the neighbours have gone too: closing with something
    unread would take the word back."""
    for link in links:
        _say(link, word)
        with suppress(OSError):
            link.shutdown(socket.SHUT_WR)
    open_links, end = list(links), time.monotonic() + _PARTING_SECONDS
    while open_links and (remaining := end - time.monotonic()) > 0:
        for link in select.select(open_links, [], [], remaining)[0]:
            if _receive(link) == b"":
                open_links.remove(link)


def _hear(
    links: Sequence[socket.socket], seconds: float, over: threading.Event
) -> dict[socket.socket, bytes]:
    """What comes on each link within so long; as soon as one is closed, no longer than that."""
    heard: dict[socket.socket, bytes] = {}
    end = time.monotonic() + seconds
    while (remaining := end - time.monotonic()) > 0 and not over.is_set():
        if not links:
            over.wait(remaining)
        for link in select.select(links, [], [], min(remaining, 0.2))[0] if links else []:
            heard[link] = heard.get(link, b"") + (_receive(link) or _CLOSED)
            if heard[link].endswith(_CLOSED):
                return heard
    return heard


def _receive(link: socket.socket) -> bytes:
    """What has come; empty where the link was closed."""
    try:
        return link.recv(4096)
    except OSError:  # reset: the process has died with something unread
        return b""


def connect(
    rank: int, host: str, gather: Callable[[str], Sequence[str]], *, seconds: float
) -> list[socket.socket]:
    """Links to the ranks after and before this one. `host`: where they reach this machine;
    `gather`: what each rank says, in order of ranks. Collective.

    Raises:
        BackendError: they do not reach each other within so long.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    token = secrets.token_hex(_TOKEN_BYTES // 2)  # a stranger that connects is not a rank
    try:
        with socket.create_server((host, 0), family=family) as server:
            port = server.getsockname()[1]
            everyone = [text.split() for text in gather(f"{host} {port} {token}")]
            after_host, after_port, after_token = everyone[(rank + 1) % len(everyone)]
            with ExitStack() as opened:
                address = (after_host, int(after_port))
                after = opened.enter_context(socket.create_connection(address, timeout=seconds))
                after.sendall(after_token.encode())
                before = _accept(server, token.encode(), seconds)
                opened.pop_all()
            return [after, before]
    except OSError as error:
        raise BackendError(
            "the processes of this run do not reach each other to watch over one another",
            why=f"as {host}: {error.strerror or error}",
            fix="check the addresses that the launcher was given, and what a firewall lets through",
        ) from error


def _accept(server: socket.socket, token: bytes, seconds: float) -> socket.socket:
    """The first who connects and knows the token. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while (remaining := end - time.monotonic()) > 0:
        server.settimeout(remaining)
        link, _ = server.accept()
        link.settimeout(remaining)
        if _read_token(link) == token:
            return link
        link.close()
    raise TimeoutError("nobody with the right word has connected")


def _read_token(link: socket.socket) -> bytes:
    word = b""
    with suppress(OSError):
        while len(word) < _TOKEN_BYTES and (more := link.recv(_TOKEN_BYTES - len(word))):
            word += more
    return word
