"""Is every file and function small enough to be read in one go?

    python3 tools/check_sizes.py

Limits: 400 lines a file (700 a test file), 60 lines a function, 3 levels of nesting (`with` opens
no level), 4 positional parameters (`self` apart; not of tests and commands, whose parameters come
by name). Where a limit and good sense part, the `def` line, or a file's first line, says
`# sizes: why`.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("solollm", "backends", "tests", "tools")
MAX_FILE_LINES = 400
MAX_TEST_LINES = 700
MAX_FUNCTION_LINES = 60
MAX_NESTING = 3
MAX_POSITIONAL = 4

_BLOCKS = (ast.If, ast.For, ast.While, ast.Try, ast.Match, ast.AsyncFor)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
Function = ast.FunctionDef | ast.AsyncFunctionDef
_EXCUSE = re.compile(r"#\s*sizes:\s*\S")


def check(path: str, source: str) -> Iterator[str]:
    """Problems of one file, each as `path:line: what`."""
    lines = source.splitlines()
    most = MAX_TEST_LINES if path.startswith("tests/") else MAX_FILE_LINES
    if len(lines) > most and not _EXCUSE.search(lines[0]):
        yield f"{path}:1: {len(lines)} lines; a file has at most {most}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _FUNCTIONS) and not _is_excused(node, lines):
            for problem in _judge(node, is_test=path.startswith("tests/")):
                yield f"{path}:{node.lineno}: `{node.name}` {problem}"


def _judge(function: Function, *, is_test: bool) -> Iterator[str]:
    length = (function.end_lineno or function.lineno) - function.lineno + 1
    if length > MAX_FUNCTION_LINES:
        yield f"has {length} lines; a function has at most {MAX_FUNCTION_LINES}"
    depth = max((_depth(statement) for statement in function.body), default=0)
    if depth > MAX_NESTING:
        yield f"nests {depth} deep; at most {MAX_NESTING}"
    names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
    if names[:1] in (["self"], ["cls"], ["ctx"]):  # ctx: autograd functions have no self
        names = names[1:]
    if len(names) > MAX_POSITIONAL and not is_test and not _is_command(function):
        yield f"takes {len(names)} positional parameters; at most {MAX_POSITIONAL}, then `*`"


def _depth(node: ast.AST) -> int:
    """Levels of blocks below a statement; `elif` is no deeper than its `if`, and functions defined
    inside are judged on their own."""
    if isinstance(node, (*_FUNCTIONS, ast.ClassDef, ast.Lambda)):
        return 0
    own = 1 if isinstance(node, _BLOCKS) else 0
    deepest = 0
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and node.orelse == [child] and isinstance(child, ast.If)
        deepest = max(deepest, _depth(child) - is_elif)
    return own + deepest


def _is_command(function: Function) -> bool:
    """Whether it is a click command, which gets its parameters by name."""
    called = [d.func for d in function.decorator_list if isinstance(d, ast.Call)]
    return any(isinstance(d, ast.Attribute) and d.attr == "command" for d in called)


def _is_excused(function: Function, lines: list[str]) -> bool:
    first = function.body[0].lineno if function.body else function.lineno
    signature = lines[function.lineno - 1 : max(first - 1, function.lineno)]
    return any(_EXCUSE.search(line) for line in signature)


def main() -> int:
    paths = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    problems = [
        problem
        for path in paths
        for problem in check(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    ]
    for problem in problems:
        print(problem)
    print(f"sizes: {len(paths)} files, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
