"""Tables and pictures of one or several experiments, put into a page that is written by hand around them.

    python -m examples.experiment report --results examples/results/* --out docs
    python -m examples.experiment report --results runs/mine
    python -m examples.experiment report --results examples/results/sts --table summary

The page ``results.md`` in ``--out`` has markers ``<!-- begin: STUDY TABLE -->`` and ``<!-- end: STUDY TABLE -->``,
where STUDY is the name of a folder of results; what stands between them is replaced. ``STUDY TABLE STRATEGY`` compares
this strategy with the others. A study that the page does not show at all is put at its end, with everything, and a page
that does not exist is begun.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from examples.data import Cohort
from examples.experiment.comparison import Comparison
from examples.experiment.plots import PLOTS, overlays
from examples.experiment.runner import load
from examples.experiment.store import Store
from examples.experiment.tables import TABLES
from examples.markdown import marked_blocks, with_block
from passion_plugin.errors import ConfigError, raise_problems, suggest

__all__ = ["CAPTIONS", "main", "report"]

CAPTIONS = {
    "gain": "Gain on every modality alone against its missing rate",
    "heatmap": "Dice by subset of modalities and strategy",
    "preference": "Relative preference and beta by epoch, by modality and missing rate",
    "overlays": "The patients that gain least and most",
}
"""Pictures by name."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line; returns how many blocks of the page were written."""
    parser = argparse.ArgumentParser(prog="python -m examples.experiment report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--results", nargs="+", required=True, type=Path, help="folders of results")
    add("--out", type=Path, help="folder of results.md and images/ (default: the first folder of results)")
    add("--focus", help="the strategy that is compared with the others (default: passion)")
    add("--table", choices=TABLES, help="only print this table")
    add("--data", help="--data of the run, to predict and draw patients (needs the trained weights)")
    add("--held-out", metavar="FOLDER", help="--held-out of the run")
    options = parser.parse_args(arguments)
    try:
        stores = {folder.resolve().name: Store(folder) for folder in options.results}
        if len(stores) < len({folder.resolve() for folder in options.results}):
            raise ConfigError("two folders of results have the same name, by which a page refers to them; rename one")
        if spaced := [name for name in stores if " " in name]:
            raise ConfigError(f"a page cannot refer to {spaced[0]!r}, because of the space; rename the folder")
        if options.table:
            for store in stores.values():
                print(TABLES[options.table](Comparison.read(store, options.focus)))
            return 0
        cohort_of = (lambda fold: load(options.data, fold, options.held_out)) if options.data else None
        out = options.out or options.results[0]
        written = report(stores, out, focus=options.focus, cohort_of=cohort_of)
    except ConfigError as error:
        parser.error(str(error))
    print(f"{out / 'results.md'}: {written} tables and pictures; CSV files in the folders of results")
    return written


def report(
    stores: Mapping[str, Store],
    out: Path,
    *,
    focus: str | None = None,
    cohort_of: Callable[[int], Cohort] | None = None,
    draw: bool = True,
) -> int:
    """Pack the results, draw the pictures and fill the page.

    Args:
        stores: folders of results by name.
        out: folder of the page.
        focus: the strategy that is compared with the others, where the page names none; see
            :meth:`Comparison.read`.
        cohort_of: the cohort of a fold, for pictures of patients.
        draw: False leaves pictures and results as they are and only writes the page.

    Returns:
        How many blocks of the page were written.

    Raises:
        ConfigError: the page asks for something that does not exist.
    """
    page, images = out / "results.md", out / "images"
    images.mkdir(parents=True, exist_ok=True)
    items = [*TABLES, *CAPTIONS]
    text = page.read_text(encoding="utf-8") if page.exists() else "# Results\n"
    shown = {name.split(" ")[0] for name in marked_blocks(text)}
    text += "".join(f"\n{_section(study, items)}" for study in stores if study not in shown)
    # Pages choose what they show, and may show studies that are not at hand now.
    marked = [name for name in marked_blocks(text) if name.split(" ")[0] in stores]
    asked = [(name, *_parts(name, focus)) for name in marked]
    problems = [
        f"{name!r}: no table {item!r}.{suggest(item, items)}" for name, _, item, _ in asked if item not in items
    ]
    raise_problems(problems, what=str(page))
    comparisons = {key: Comparison.read(stores[key[0]], key[1]) for key in {(each[1], each[3]) for each in asked}}
    for store in stores.values() if draw else ():
        store.pack()
    for name, study, item, against in asked:
        of = comparisons[study, against]
        if item in TABLES:
            text = with_block(text, name, TABLES[item](of).rstrip())
            continue
        picture = images / f"results_{re.sub('[^a-zA-Z0-9]+', '_', name)}.png"
        if draw and item in PLOTS:
            PLOTS[item](of, picture)
        elif draw and cohort_of:
            overlays(of, stores[study], cohort_of, picture)
        # Pictures of patients stay from the last time that weights and data were at hand.
        text = with_block(text, name, _shown(picture, CAPTIONS[item], of.study.credit))
    page.write_text(text, encoding="utf-8")
    return len(marked)


def _parts(name: str, focus: str | None) -> tuple[str, str, str | None]:
    """Study, table and focus of a block."""
    study, item, own = (*name.split(" "), "", "")[:3]
    return study, item, own or focus


def _shown(picture: Path, caption: str, credit: str) -> str:
    if not picture.exists():
        return "Not drawn."
    return f"![{caption}](images/{picture.name})\n\n{caption}." + (f" Data: {credit}." if credit else "")


def _section(study: str, items: Sequence[str]) -> str:
    """Markers for everything about one study."""
    blocks = [f"### {item}\n\n<!-- begin: {study} {item} -->\n<!-- end: {study} {item} -->\n" for item in items]
    return "\n".join([f"## {study}\n", *blocks])
