"""The documentation is run: code blocks execute, links resolve, names exist.

Fences: ``python`` runs, ``python notest`` does not; other languages are left alone. The blocks of one file
share a namespace, top to bottom, in an empty working directory.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import NamedTuple

import pytest

import passion_plugin

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "passion_plugin"
PAGES = sorted((ROOT / "docs").glob("**/*.md"))
RUN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
LINKED = [*RUN, ROOT / "CHANGELOG.md", ROOT / "examples" / "README.md"]

FENCE = re.compile(r"^(?P<mark>```+|~~~+)\s*(?P<info>[^`\n]*)$")
LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)(?:\s+\"[^\"]*\")?\)|<img[^>]*\ssrc=\"(?P<src>[^\"]+)\"")
NAME = re.compile(r"`(passion_plugin(?:\.[A-Za-z_]\w*)+)")


class Block(NamedTuple):
    """A fenced block: its info string, the number of its first code line, its text."""

    info: str
    line: int
    code: str


def blocks(text: str) -> list[Block]:
    """All fenced blocks of a Markdown text.

    >>> blocks("a\\n```python notest\\nx = 1\\n```\\n")
    [Block(info='python notest', line=3, code='x = 1')]
    """
    found: list[Block] = []
    opened: tuple[str, str, int] | None = None
    code: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        fence = FENCE.match(line)
        if opened is None:
            if fence:
                opened, code = (fence["mark"], fence["info"].strip(), number + 1), []
        elif fence and fence["mark"].startswith(opened[0]) and not fence["info"]:
            found.append(Block(opened[1], opened[2], "\n".join(code)))
            opened = None
        else:
            code.append(line)
    assert opened is None, f"the fence of line {opened[2] - 1} is never closed" if opened else ""
    return found


def prose(text: str) -> str:
    """The text without its fenced blocks."""
    for block in blocks(text):
        text = text.replace(block.code, "") if block.code.strip() else text
    return text


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as GitHub forms them.

    >>> sorted(anchors("# The method\\n## 1. `end_epoch()`, once\\n"))
    ['1-end_epoch-once', 'the-method']
    """
    headings = re.findall(r"^#{1,6}\s+(.*?)\s*#*$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", RUN, ids=name_of)
def test_python_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to_run = [block for block in blocks(path.read_text(encoding="utf-8")) if block.info == "python"]
    if not to_run:
        pytest.skip("no code to run on this page")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    namespace: dict[str, object] = {"__name__": f"docs_{path.stem.replace('-', '_')}"}
    for block in to_run:
        # Empty lines in front keep the line numbers of a traceback equal to those of the page.
        exec(compile("\n" * (block.line - 1) + block.code, str(path), "exec"), namespace)


@pytest.mark.parametrize("path", RUN, ids=name_of)
def test_fences_say_whether_python_runs(path: Path) -> None:
    infos = {block.info for block in blocks(path.read_text(encoding="utf-8"))}
    odd = sorted(info for info in infos if info.startswith("py") and info not in {"python", "python notest"})
    assert not odd, f"{name_of(path)}: write ```python or ```python notest, not {odd}"
    assert "" not in infos, f"{name_of(path)}: a fence without a language"


@pytest.mark.parametrize("path", LINKED, ids=name_of)
def test_relative_links_resolve(path: Path) -> None:
    text = prose(path.read_text(encoding="utf-8"))
    broken = []
    for match in LINK.finditer(text):
        target = match["target"] or match["src"]
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        if not there.exists():
            broken.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(prose(there.read_text(encoding="utf-8"))):
            broken.append(f"{target}: no such heading")
    assert not broken, f"{name_of(path)}: {broken}"


@pytest.mark.parametrize("path", LINKED, ids=name_of)
def test_every_name_written_in_full_exists(path: Path) -> None:
    missing = []
    for dotted in sorted(set(NAME.findall(path.read_text(encoding="utf-8")))):
        try:
            resolve(dotted)
        except (ImportError, AttributeError) as error:
            missing.append(f"{dotted}: {error}")
    assert not missing, f"{name_of(path)}: {missing}"


def test_the_reference_describes_everything_public() -> None:
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    described = [resolve(dotted) for dotted in re.findall(r":: (passion_plugin\S*)", pages)]
    described += [getattr(module, name) for module in described for name in getattr(module, "__all__", ())]
    missing = [name for name in passion_plugin.__all__ if getattr(passion_plugin, name) not in described]
    assert not missing


def test_the_pages_describe_every_name_of_the_root() -> None:
    text = "\n".join(prose(path.read_text(encoding="utf-8")) for path in PAGES if path.parent.name == "docs")
    missing = [name for name in passion_plugin.__all__ if not re.search(rf"`[^`]*\b{name}\b[^`]*`", text)]
    assert not missing


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_page_opens_with_what_the_reader_can_do_after_it(path: Path) -> None:
    title, _, opening = path.read_text(encoding="utf-8").partition("\n\n")
    assert title.startswith("# ")
    assert re.match(r"After this page you (can|know) ", opening)


def test_the_architecture_names_files_that_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    files = re.findall(r"`([\w/]+\.py)`", text)
    assert len(files) > 30
    assert not [file for file in files if not (PACKAGE / file).exists() and not (ROOT / file).exists()]


def test_the_architecture_names_every_room() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


def resolve(dotted: str) -> object:
    """Import the longest module prefix of a dotted name and walk the rest as attributes."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        name = ".".join(parts[:cut])
        try:
            found: object = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise
            continue
        for part in parts[cut:]:
            fields = getattr(found, "__dataclass_fields__", {})
            found = fields[part] if part in fields else getattr(found, part)
        return found
    raise ImportError(f"no module {parts[0]!r}")
