"""Does every file import only what lies below it? Reads imports with `ast`, runs nothing.

    python3 tools/check_layers.py

The table below is the house from cellar to roof. A module imports modules of lower layers, and of
its own layer as long as no circle arises; a subpackage (`solollm.data`) is one layer as a whole.
Imports inside functions count. A backend imports from the core only what `BACKEND_MAY_IMPORT`
names. No core file imports a framework at its top, and none imports a backend at all: backends
are found by entry point.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

LAYERS = (
    "errors",
    "architecture adapters mlx_lm_layout config dial durable strictfile confined hardware devices"
    " state_bytes optim_codec affine_codec nf4_codec gguf_codec signals vitals macos linux_machine"
    " host personal",
    "tensorheader tensorfile gguf_file adapted backend rounding sampling engine_input"
    " tokenizer_format tokenizer fast_encoding tokenizer_training chat_template preference",
    "data schedule manifest certificate frozen_base bases checkpoint checkpoint_writer model_folder"
    " runlock runs run_log bundle archive planner registry drawing forecast calibration reality"
    " generation tokenizer_inspection watch faults dtype_choice following",
    "evaluation report held_out broken_steps continuation completion dialogue remote_dialogue",
    "workload trainer",
    "lifeline ranks pretraining rehearsal finetune planning environments horizon"
    " starting_weights run_streams run_paths",
    "export importing serving guard cargo packing far_side pushing testing resume_proof"
    " migration_proof fault_proof supervisor story quickstart_move quickstart_tuning quickstart"
    " doctor benchmark text_benchmark",
    "commands",
    "cli",
    "__main__",
)
BACKENDS = ("solollm_torch", "solollm_mlx")
BACKEND_MAY_IMPORT = frozenset(
    {
        "backend",
        "config",
        "architecture",
        "adapters",
        "adapted",
        "nf4_codec",
        "optim_codec",
        "state_bytes",
        "errors",
        "tensorfile",
        "sampling",
        "engine_input",
        "preference",
    }
)
FRAMEWORKS = frozenset({"torch", "mlx", "transformers", "datasets", "tokenizers", "pyarrow"})
_LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names.split()}


class Import(NamedTuple):
    """One imported module: its full dotted name, the line, and whether it runs on import."""

    module: str
    line: int
    is_top_level: bool


def imports_of(source: str, module: str, *, is_package: bool = False) -> Iterator[Import]:
    """Every import in a file, relative ones resolved against `module`'s dotted name.

    `from a.b import c` yields both `a.b` and `a.b.c`, because `c` may be a module.
    """
    tree = ast.parse(source)
    top_level = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        is_top = id(node) in top_level
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, is_top)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parents = parts if is_package else parts[:-1]
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            yield Import(base, node.lineno, is_top)
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, is_top)


def check(sources: Mapping[str, str]) -> list[str]:
    """Problems of a set of files, given as repository path -> text."""
    problems: list[str] = []
    graph: dict[str, set[str]] = {}
    for path, source in sorted(sources.items()):
        module = _module(path)
        for found in imports_of(source, module, is_package=path.endswith("__init__.py")):
            problem = _judge(module, found)
            if problem:
                problems.append(f"{path}:{found.line}: {problem}")
            if found.module.split(".")[0] == "solollm" and found.module != module:
                graph.setdefault(module, set()).add(found.module)
        if module.startswith("solollm.") and _room(module) not in _LEVEL:
            problems.append(f"{path}:1: `{_room(module)}` has no layer in tools/check_layers.py")
    modules = {_module(path) for path in sources}
    known = {m: {t for t in targets if t in modules} for m, targets in graph.items()}
    return sorted(set(problems)) + _circles(known)


def _module(path: str) -> str:
    parts = list(Path(path).with_suffix("").parts)
    if parts[0] == "backends":
        parts = parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _room(module: str) -> str:
    """The layer table's name for a core module: `solollm.data.build` lives in `data`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def _judge(importer: str, found: Import) -> str:
    """What is wrong with one import; empty if nothing."""
    package = found.module.split(".")[0]
    in_backend = importer.split(".")[0] in BACKENDS
    if package in BACKENDS:
        is_own = package == importer.split(".")[0]
        return "" if is_own else f"imports the backend {package}; backends are found by entry point"
    if package in FRAMEWORKS and found.is_top_level and not in_backend:
        return f"imports {package} at the top of a core file; import it where it is used"
    if package != "solollm" or found.module == "solollm":
        return ""
    room = _room(found.module)
    if in_backend:
        if room in BACKEND_MAY_IMPORT:
            return ""
        return f"a backend may not import solollm.{room}"
    if importer == "solollm" or room not in _LEVEL:
        return ""
    own = _room(importer)
    if own == room or _LEVEL.get(own, len(LAYERS)) >= _LEVEL[room]:
        return ""
    return f"{own} may not import {room}, which lies above it"


def _circles(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """Import circles, one line each."""
    problems: set[str] = set()
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        if module in trail:
            circle = trail[trail.index(module) :]
            first = circle.index(min(circle))
            problems.add("circle: " + " -> ".join((*circle[first:], *circle[:first], min(circle))))
            return
        if module in done:
            return
        for target in sorted(graph.get(module, ())):
            visit(target, (*trail, module))
        done.add(module)

    for module in sorted(graph):
        visit(module, ())
    return sorted(problems)


def read_sources() -> dict[str, str]:
    """The core's and the backends' files of this checkout."""
    paths = [*(ROOT / "solollm").rglob("*.py"), *(ROOT / "backends").rglob("*.py")]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def main() -> int:
    sources = read_sources()
    problems = check(sources)
    for problem in problems:
        print(problem)
    print(f"layers: {len(sources)} files, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
