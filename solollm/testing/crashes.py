"""What a power cut may leave: every state that a log of disk operations allows.

The model is the pessimist's reading of POSIX, directory by directory. Data of a file that was not
flushed may be there, gone, cut or zero. Names that were created, removed or renamed in a directory
that was not flushed may each have reached the disk or not, in any order; a rename is one step.
Flushing a file does not flush its name. (The idea is ALICE's, Pillai et al., OSDI 2014.)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import NamedTuple

from solollm.testing.disks import Event

Tree = frozenset[tuple[str, bytes | None]]  # relative path -> content, None for a directory


@dataclass(eq=False)
class _File:
    """Bytes that are on the medium, and those a reader sees."""

    durable: bytes = b""
    volatile: bytes = b""


@dataclass(eq=False)
class _Folder:
    """Names on the medium, and the changes since the last flush, each one atomic step."""

    durable: dict[str, _Node] = field(default_factory=dict)
    pending: list[dict[str, _Node | None]] = field(default_factory=list)

    def entries(self, changes: Sequence[Mapping[str, _Node | None]]) -> dict[str, _Node]:
        names: dict[str, _Node | None] = dict(self.durable)
        for change in changes:
            names.update(change)
        return {name: node for name, node in names.items() if node is not None}

    def now(self) -> dict[str, _Node]:
        return self.entries(self.pending)


_Node = _File | _Folder
_Changes = list[dict[str, _Node | None]]


class Choice(NamedTuple):
    """One way the cut may fall: which pending names and which unflushed data survive."""

    names: Callable[[_Changes], _Changes]
    data: Callable[[_File], bytes]


class CrashModel:
    """A disk replayed from a log; `root` holds the paths and counts as flushed at the start."""

    def __init__(self, root: Path) -> None:
        self._root_path = root
        self._root = _load(root)

    def apply(self, event: Event) -> None:
        """Do one event."""
        if event.kind == "mark":
            return
        if event.kind == "sync":
            self._sync(event.path)
            return
        if event.kind == "write":
            file = self._find(event.path)
            assert isinstance(file, _File)
            file.volatile += event.data
            return
        named = event.target if event.kind == "link" else event.path
        parent = self._find(named.parent)
        assert isinstance(parent, _Folder)
        change: dict[str, _Node | None] = {named.name: None}
        if event.kind == "link":
            change = {named.name: self._find(event.path)}
        elif event.kind == "create":
            change = {event.path.name: _File()}
        elif event.kind == "mkdir":
            change = {event.path.name: _Folder()}
        elif event.kind == "rename":
            assert event.target.parent == event.path.parent, "renames stay in one directory"
            change[event.target.name] = self._find(event.path)
        parent.pending.append(change)

    def state(self, choice: Choice) -> Tree:
        """The tree that one fall of the cut leaves."""
        found: list[tuple[str, bytes | None]] = []
        stack: list[tuple[str, _Node]] = [("", self._root)]
        while stack:
            path, node = stack.pop()
            if isinstance(node, _File):
                found.append((path, choice.data(node)))
                continue
            found.append((path, None))
            names = node.entries(choice.names(node.pending))
            stack += [(f"{path}/{name}" if path else name, child) for name, child in names.items()]
        return frozenset(found)

    def _sync(self, path: Path) -> None:
        node = self._find(path)
        if isinstance(node, _File):
            node.durable = node.volatile
        else:
            node.durable, node.pending = node.now(), []

    def _find(self, path: Path) -> _Node:
        node: _Node = self._root
        for name in path.relative_to(self._root_path).parts:
            assert isinstance(node, _Folder)
            node = node.now()[name]
        return node


def choices(num_random: int, seed: int) -> Iterator[Choice]:
    """The extreme ways a cut can fall, then random mixtures of them."""
    names: list[Callable[[_Changes], _Changes]] = [
        lambda pending: [], lambda pending: pending, lambda pending: pending[:1],
        lambda pending: pending[-1:], lambda pending: pending[:-1], lambda pending: pending[1:],
    ]  # fmt: skip
    data: list[Callable[[_File], bytes]] = [
        lambda file: file.durable, lambda file: file.volatile,
        lambda file: file.volatile[: (len(file.durable) + len(file.volatile)) // 2],
        lambda file: file.durable + bytes(len(file.volatile) - len(file.durable)),
    ]  # fmt: skip
    for pair in product(names, data):
        yield Choice(*pair)
    draw = random.Random(seed)
    for _ in range(num_random):
        yield Choice(
            lambda pending: [change for change in pending if draw.random() < 0.5],
            lambda file: draw.choice(data)(file),
        )


def write_tree(tree: Tree, folder: Path) -> None:
    """Put a state on a real disk, into an existing empty folder."""
    for path, content in sorted(tree, key=lambda item: item[0]):
        if content is not None:
            (folder / path).write_bytes(content)
        elif path:
            (folder / path).mkdir()


def _load(folder: Path) -> _Folder:
    durable: dict[str, _Node] = {}
    for path in folder.iterdir():
        content = b"" if path.is_dir() else path.read_bytes()
        durable[path.name] = _load(path) if path.is_dir() else _File(content, content)
    return _Folder(durable)
