"""Try a public backbone: wrap it, measure its students, and say whether that is what its recipe expects.

    python -m tools.try_backbone rfnet /path/to/checkout/of/RFNet

NAME is a module of `tools/backbones`, or the path of a Python file with a recipe. The checkout is that of the
repository and commit which the recipe names; nothing is written into it. The exit code is 0 when everything is as
expected (for some models that is a refusal with the right reason), else 1.
"""

from __future__ import annotations

import argparse
import importlib
import runpy
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[1]
if __name__ == "__main__" and str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tools.backbones.measuring import measure  # noqa: E402
from tools.backbones.table import Row, record, table  # noqa: E402


def recipe(name: str) -> Any:
    """Return the recipe called ``name``, or the one in a file."""
    if name.endswith(".py"):
        return SimpleNamespace(**runpy.run_path(name, run_name=Path(name).stem))
    return importlib.import_module(f"tools.backbones.{name}")


def main(arguments: list[str] | None = None) -> int:
    """Run the trial that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="module of tools/backbones, or a file")
    parser.add_argument("checkout", type=Path, help="folder with the model's repository")
    parser.add_argument("--markdown", action="store_true", help="print the row as it stands in docs/backbones.md")
    parser.add_argument("--record", action="store_true", help="keep the row, and write it into docs/backbones.md")
    options = parser.parse_args(arguments)
    chosen = recipe(options.name)
    started = time.perf_counter()
    trial = chosen.build(options.checkout)
    measured = measure(trial)
    row = Row.of(chosen, trial, measured)
    print()
    print(table([row]) if options.markdown else row)
    if measured.error:
        print(measured.error)
    failures = measured.failures(trial)
    for failure in failures:
        print(f"NOT AS EXPECTED: {failure}")
    print(f"{'failed' if failures else 'as expected'} after {time.perf_counter() - started:.0f} s")
    if options.record and not failures:
        record(row)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
