"""The trials of public backbones: the tool finds what is wrong, and the page says what was recorded."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tools.backbones
from examples.markdown import marked_blocks, with_block
from passion_plugin.backbone import BackboneSpec
from passion_plugin.config import PassionConfig
from passion_plugin.wrapper import PassionWrapper
from tools.backbones import table as tables
from tools.backbones.checkout import load
from tools.backbones.measuring import measure
from tools.backbones.table import PAGE, read_rows, table
from tools.backbones.traces import differences, traces
from tools.backbones.trial import Call, Trial
from tools.try_backbone import main
from zoo import ZOO

RECIPE = """
from pathlib import Path

import torch
from torch.nn import functional as F

from examples.backbones.rfnet_like import RFNetLike
from tools.backbones.checkout import images, labels
from tools.backbones.trial import Trial

SOURCE = "https://github.com/somebody/network"
COMMIT = "0123456789" * 4
DATE = "2026-11-25"


def build(checkout: Path) -> Trial:
    torch.manual_seed(0)
    names = ("flair", "t1ce", "t1")
    model = RFNetLike(names, num_classes=3, ndim=2, widths=(4, 6))
    return Trial(
        model=model,
        inputs=(images(8, modalities=3, ndim=2), torch.ones(2, 3, dtype=torch.bool)),
        modalities=names,
        spec=None,
        written="",
        traps="none | at all",
        expect={expect!r},
        reason={reason!r},
        target=labels(8, classes=3, ndim=2),
        task_loss=F.cross_entropy,
        truth="classifier",
    )
"""


@pytest.fixture
def example(tmp_path: Path) -> Any:
    """Write the recipe of a network of our own; returns the command line that tries it."""

    def written(expect: str = "exact", reason: str = "") -> list[str]:
        file = tmp_path / "example.py"
        file.write_text(RECIPE.replace("{expect!r}", repr(expect)).replace("{reason!r}", repr(reason)))
        return [str(file), str(tmp_path)]

    return written


def trial(name: str, expect: Any, reason: str = "", *, spec: Any = None, **changes: Any) -> Trial:
    """A trial of a network of the zoo."""
    entry = ZOO[name]
    count = len(entry.modalities)

    def make(images: Sequence[Tensor], present: Sequence[bool]) -> Call:
        return entry.pack(list(images), torch.tensor([present] * len(images[0])))

    images = entry.full_images(2)
    inputs, keywords = make(images, [True] * count)
    x, mask = entry.full_example()
    # Something that can be learned: which third of the brightness of the first image.
    target = torch.bucketize(images[0][:, 0], torch.tensor([-0.5, 0.5]))
    fields: dict[str, Any] = {
        "model": entry.backbone(),
        "inputs": inputs,
        "keywords": keywords,
        "images": images,
        "make": make,
        "modalities": entry.modalities,
        "spec": spec,
        "written": "",
        "traps": "",
        "expect": expect,
        "reason": reason,
        "target": target,
        "task_loss": F.cross_entropy,
        "truth": entry.classifier,
        "wrap": {"example_input": x, "example_mask": mask} if expect == "heads" else {},
        "call": entry.extra(torch.ones(2, count, dtype=torch.bool)),
    }
    return Trial(**{**fields, **changes})


# The tool


def test_a_backbone_that_is_as_expected_ends_with_zero_and_a_row(example: Any, capsys: Any) -> None:
    assert main([*example(), "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert "can be wrapped" in printed
    last = [line for line in printed.splitlines() if line.startswith("|")][-1]
    cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", last)[1:-1]]
    model = "`example`: [somebody/network](https://github.com/somebody/network/tree/" + "0123456789" * 4
    assert cells[0].startswith(model)
    assert cells[1:5] == ["nothing (detected)", "replay", "0", "0"]
    assert cells[6:] == ["none \\| at all", "2026-11-25, `0123456`"]
    before, after = (float(loss) for loss in cells[5].split("→"))
    assert after < before


@pytest.mark.parametrize(
    ("expect", "reason", "said"),
    [
        ("mixed", "", "the students are 'replay', 'mixed' was expected"),
        ("refused", "whatever", "a refusal was expected, but the students are 'replay'"),
    ],
    ids=["another student mode", "no refusal"],
)
def test_another_outcome_than_expected_ends_with_one(
    example: Any, capsys: Any, expect: str, reason: str, said: str
) -> None:
    assert main(example(expect, reason)) == 1
    assert f"NOT AS EXPECTED: {said}" in capsys.readouterr().out


def test_a_recorded_row_takes_the_place_of_the_last_one_and_stands_in_the_page(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- begin: table -->\n<!-- end: table -->\nbelow\n")
    monkeypatch.setattr(tables, "PAGE", page)
    monkeypatch.setattr(tables, "MEASURED", tmp_path / "measured.csv")
    for _ in range(2):
        assert main([*example(), "--record"]) == 0
    (row,) = read_rows()
    assert (row.name, row.students, row.traps) == ("example", "replay", "none | at all")
    assert page.read_text() == with_block(page.read_text(), "table", table([row]))
    assert "`RFNetLike`" in page.read_text()
    assert main([*example("mixed"), "--record"]) == 1
    assert read_rows() == [row], "a trial that failed is not recorded"


# The measurement


@pytest.mark.parametrize(
    ("name", "expect"),
    [("plain", "exact"), ("leaky_bottleneck", "mixed"), ("shared_encoder", "rerun"), ("variance_of_one", "heads")],
)
def test_every_student_mode_is_measured_as_what_it_is(name: str, expect: str) -> None:
    case = trial(name, expect)
    measured = measure(case)
    assert measured.failures(case) == []
    assert measured.left == ()
    assert measured.leak == 0
    assert (measured.difference is None) == (expect == "heads")


def test_the_steps_of_a_trial_are_those_of_a_wrapper_that_nobody_listens_to() -> None:
    case = trial("plain", "exact")
    model = PassionWrapper(
        case.model,
        case.modalities,
        missing_rates=[0.2] * 3,
        config=PassionConfig(share_random_state=True),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        loss = F.cross_entropy(model(*case.inputs), case.target) + model.passion_loss(case.target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert measure(trial("plain", "exact")).losses == pytest.approx(losses, abs=0)


def test_a_network_without_a_mask_is_told_what_is_there() -> None:
    case = trial("no_mask", "mixed")
    assert measure(case).failures(case) == []


def test_a_refusal_counts_only_for_its_reason() -> None:
    right = trial("mixes_the_batch", "refused", "samples of a batch are not independent")
    assert measure(right).failures(right) == []
    wrong = trial("mixes_the_batch", "refused", "no layer's output is the prediction")
    assert 'refused, but not because of "no layer\'s output is the prediction"' in measure(wrong).failures(wrong)
    unexpected = trial("mixes_the_batch", "exact")
    assert measure(unexpected).failures(unexpected) == ["it was refused"]


def test_wrong_students_are_noticed_although_the_library_was_told_to_trust_them() -> None:
    encoders = {name: f"{name}_encoder" for name in ZOO["leaky_bottleneck"].modalities}
    spec = BackboneSpec(classifier="classifier", encoders=encoders, students="replay")
    case = trial("leaky_bottleneck", "exact", spec=spec)
    measured = measure(case)
    assert measured.relative is not None
    assert measured.relative > 1e-2
    assert measured.leak is not None
    assert measured.leak > 1e-2
    problems = " ".join(measured.failures(case))
    assert "students differ from true runs" in problems
    assert "students see the content of other modalities" in problems


def test_logits_of_another_module_are_noticed() -> None:
    spec = BackboneSpec(classifier="decoy", students="rerun")
    case = trial("decoy_head", "rerun", spec=spec)
    assert "students differ from true runs" in " ".join(measure(case).failures(case))


def test_a_loss_that_does_not_fall_is_a_failure() -> None:
    case = trial("plain", "exact", task_loss=lambda raw, target: -20 * F.cross_entropy(raw, target).clamp(max=50))
    measured = measure(case)
    rising = tuple(reversed(measured.losses))
    assert rising[0] < rising[-1]
    for losses in (rising, (*measured.losses[:-1], float("nan"))):
        failures = type(measured)(**{**vars(measured), "losses": losses}).failures(case)
        assert [text for text in failures if text.startswith("the loss does not fall")]


@pytest.mark.parametrize("what", ["hook", "attribute", "mode", "frozen", "parameter hook"])
def test_whatever_is_left_on_a_module_is_seen(what: str) -> None:
    net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Dropout())
    before = traces(net)
    assert differences(before, traces(net)) == ()
    if what == "hook":
        net[0].register_forward_hook(lambda *_: None)
    elif what == "attribute":
        net[0].forward = net[0].forward  # type: ignore[method-assign]
    elif what == "mode":
        net[1].eval()
    elif what == "frozen":
        net[0].weight.requires_grad_(False)
    else:
        net[0].weight.register_hook(lambda gradient: gradient)
    assert len(differences(before, traces(net))) == 1


def test_a_trial_must_say_what_it_needs() -> None:
    with pytest.raises(ValueError, match="expect must be one of"):
        trial("plain", "fine")
    with pytest.raises(ValueError, match="reason= belongs to"):
        trial("plain", "refused")
    with pytest.raises(ValueError, match="needs task_loss= and truth="):
        trial("plain", "exact", truth="")


# Checkouts


def test_a_module_is_imported_with_its_siblings_and_forgotten(tmp_path: Path) -> None:
    (tmp_path / "layers.py").write_text("width = 7\n")
    (tmp_path / "network.py").write_text(
        "from layers import width\n\nsize = 128\n\n\ndef both():\n    return width, size\n"
    )
    before = dict(sys.modules)
    module = load(tmp_path, "network", size=16)
    assert module.both() == (7, 16)
    assert {"layers", "network"}.isdisjoint(sys.modules)
    assert str(tmp_path) not in sys.path
    assert {name: sys.modules[name] for name in before} == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["layers.py", "network.py"], "no bytecode is written"
    with pytest.raises(AttributeError, match="patch_size"):
        load(tmp_path, "network", patch_size=2)
    with pytest.raises(FileNotFoundError, match="is this a checkout of the repository"):
        load(tmp_path, "model")


# The page


def recipes() -> dict[str, Any]:
    names = [module.name for module in pkgutil.iter_modules(tools.backbones.__path__)]
    modules = {name: importlib.import_module(f"tools.backbones.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "build")}


def test_every_recipe_has_a_row_of_the_commit_it_names() -> None:
    recorded = {row.name: (row.source, row.commit, row.date) for row in read_rows()}
    assert recorded == {name: (module.SOURCE, module.COMMIT, module.DATE) for name, module in recipes().items()}
    for source, commit, date in recorded.values():
        assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", source)
        assert re.fullmatch(r"[0-9a-f]{40}", commit)
        assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", date)


def test_the_rows_say_what_the_recipes_write() -> None:
    rows = {row.name: row for row in read_rows()}
    for name, module in recipes().items():
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            # What a recipe hands on from another one is checked there.
            if (
                isinstance(node, ast.keyword)
                and node.arg in ("written", "traps")
                and not isinstance(node.value, ast.Name)
            ):
                text = eval(compile(ast.Expression(node.value), name, "eval"), vars(module))
                assert getattr(rows[name], node.arg) == text


def test_the_page_says_what_was_recorded() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert marked_blocks(page) == ["table"]
    assert page == with_block(page, "table", table(read_rows())), "run python -m tools.backbones.table"


def test_at_least_14_networks_were_tried_and_each_is_right_or_refused() -> None:
    rows = read_rows()
    assert len(rows) >= 14
    for row in rows:
        refused = row.students.startswith("refused: ")
        assert refused or row.students in ("replay", "mixed replay", "re-run", "heads")
        if row.students in ("replay", "mixed replay", "re-run"):
            assert float(row.relative) <= 1e-4
        if not refused:
            assert float(row.leak) <= 1e-4
