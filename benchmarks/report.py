"""Tables of docs/performance.md from the results.

python -m benchmarks.report            # rewrite what stands between the markers
python -m benchmarks.report --plot     # draw docs/images/cost.png too
python -m benchmarks.report --check    # exit status 1 if the page does not say what the results say
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import tables
from benchmarks.results import FOLDER, Row, read
from examples.markdown import marked_blocks, with_block

__all__ = ["PAGE", "PICTURE", "blocks", "filled", "main"]

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
PICTURE = PAGE.parent / "images" / "cost.png"

_TABLES = {
    "losses": tables.losses,
    "step": tables.step,
    "memory": tables.memory,
    "public_step": tables.step,
    "public_memory": tables.memory,
    "public_profile": tables.profile,
    "losses_cuda": tables.losses,
    "step_cuda": tables.step,
    "memory_cuda": tables.memory,
}
"""By name of the file: ``public_`` are networks of other people, which are not part of the repository."""


def blocks(folder: Path = FOLDER, picture: Path = PICTURE) -> dict[str, str]:
    """Return the text that belongs between each pair of markers."""
    found = {}
    for name, table in _TABLES.items():
        rows = read(folder / f"{name}.csv")
        nothing = f"Not yet measured{' on a GPU' if name.endswith('_cuda') else ''}."
        found[name.replace("_", " ")] = f"{_facts(rows)}\n\n{table(rows)}" if rows else nothing
    drawn = f"![Cost against voxels, modalities and missing rate](images/{picture.name})"
    return {**found, "plots": drawn if picture.exists() else "Not yet drawn."}


def _facts(rows: Sequence[Row]) -> str:
    row = rows[0]
    threads = "" if row["device"] == "cuda" else f", {row['threads']} threads"
    return f"{row['processor']}{threads}, torch {row['torch']}, Python {row['python']}, {row['system']}."


def filled(page: str, texts: dict[str, str]) -> str:
    """Return a page with the text of every block put between its markers.

    Raises:
        ValueError: a block has no markers, or markers no block.
    """
    marked = marked_blocks(page)
    if sorted(marked) != sorted(texts):
        raise ValueError(f"the page has markers for {marked}, the results give {list(texts)}")
    for name, text in texts.items():
        page = with_block(page, name, text)
    return page


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and write or check the page; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--plot", action="store_true", help="draw the picture first (matplotlib)")
    parser.add_argument("--check", action="store_true", help="change nothing, only compare")
    options = parser.parse_args(arguments)
    if options.plot and not options.check:
        from benchmarks.plots import draw

        draw(FOLDER, PICTURE)
    page = PAGE.read_text(encoding="utf-8")
    result = filled(page, blocks())
    if options.check and result != page:
        print("docs/performance.md is not what the results give; run python -m benchmarks.report", file=sys.stderr)
        return 1
    if not options.check:
        PAGE.write_text(result, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
