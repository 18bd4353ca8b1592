"""From nothing but Python to a small language model of your own, offline after the installation.

    python3 tools/quickstart.py [--with-mlx] [options of `solollm quickstart`]

Makes `.venv-solollm` in this folder (nothing is installed anywhere else), says what it downloads,
and runs `solollm quickstart` in it. Run it again at any time: what is installed stays. On Linux MLX
runs on the processor and serves to see a run move between frameworks: `--with-mlx` installs it too.
"""

from __future__ import annotations

import os
import sys

from environment import ROOT, SetupError, ensure_environment, say

FOLDER = ROOT / ".venv-solollm"
DISK = 0.4e9  # bytes of SoloLLM's own dependencies, measured


def main() -> int:
    words = sys.argv[1:]
    torch_index = ""
    if "--torch-index" in words:
        place = words.index("--torch-index")
        torch_index = "".join(words[place + 1 : place + 2])
        del words[place : place + 2]
    requirements = []
    if "--with-mlx" in words:
        words.remove("--with-mlx")
        requirements = [f"solollm[mlx] @ file://{ROOT}"]
    try:
        python = ensure_environment(FOLDER, requirements, extra_disk=DISK, torch_index=torch_index)
    except SetupError as error:
        say(f"\nquickstart: cannot set up\n{error}")
        return 1
    except KeyboardInterrupt:
        say("\nquickstart: stopped; run it again to go on")
        return 130
    say(f"Installed. For later: source {FOLDER.name}/bin/activate, then `solollm --help`.\n")
    os.execv(python, [str(python), "-m", "solollm", "quickstart", *words])


if __name__ == "__main__":
    sys.exit(main())
