"""How a backbone is talked to: names, arguments, masks, images, and the spec that binds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from models import NAMES, DeepNet, MeanNet, NoMaskNet, batch, spec_of
from passion_plugin.backbone import BackboneSpec, MaskCodec
from passion_plugin.backbone._adapter import BackboneAdapter
from passion_plugin.backbone._calls import (
    Argument,
    BackboneCall,
    batch_size,
    blank,
    join,
    locate_argument,
    split,
    vector_hint,
)
from passion_plugin.backbone._features import resolve_module
from passion_plugin.backbone._masks import check_mask, codec_for, encoded_like
from passion_plugin.errors import BackboneError, ConfigError, InputError
from passion_plugin.wrapper import PassionWrapper

M = NAMES[:3]
MIXED = [[1, 1, 0], [1, 1, 1], [0, 0, 1]]


def wrap(net: Any, **spec: Any) -> PassionWrapper:
    return PassionWrapper(net, net.names, missing_rates=(0.2,) * len(net.names), spec=spec_of(net, **spec))


def _noted(forward: Callable[..., Any], calls: list[int], number: int) -> Callable[..., Any]:
    def run(x: Tensor) -> Any:
        calls.append(number)
        return forward(x)

    return run


def loss_of(model: PassionWrapper, *args: Any, target: Tensor, **kwargs: Any) -> float:
    model(*args, **kwargs)
    return model.passion_loss(target).item()


class TestNames:
    net = nn.ModuleDict(
        {
            "left": nn.ModuleDict({"t1": nn.Identity(), "t1ce": nn.Identity(), "seg": nn.Identity()}),
            "right": nn.ModuleDict({"t2": nn.Identity(), "seg": nn.Identity(), "xt1": nn.Identity()}),
        }
    )

    @pytest.mark.parametrize(
        ("name", "path"),
        [("left.t1", "left.t1"), ("t1", "left.t1"), ("t1ce", "left.t1ce"), ("right.seg", "right.seg")],
    )
    def test_a_name_is_a_full_path_or_a_suffix_of_whole_components(self, name: str, path: str) -> None:
        assert resolve_module(self.net, name) == (path, "")

    @pytest.mark.parametrize("name", ["1", "ce", "t", "eft.t1", ".t1", "left.", "left.t", ""])
    def test_a_part_of_a_component_never_matches(self, name: str) -> None:
        path, problem = resolve_module(self.net, name)
        assert path is None
        assert problem

    def test_a_suffix_that_fits_twice_names_both(self) -> None:
        path, problem = resolve_module(self.net, "seg")
        assert path is None
        assert "['left.seg', 'right.seg']" in problem
        assert "Give more of the dotted name" in problem

    def test_an_unknown_name_suggests_close_ones(self) -> None:
        assert "Did you mean 'left.t1ce'" in resolve_module(self.net, "left.t1c")[1]

    def test_an_exact_path_wins_over_a_suffix(self) -> None:
        net = nn.ModuleDict({"seg": nn.Identity(), "inner": nn.ModuleDict({"seg": nn.Identity()})})
        assert resolve_module(net, "seg")[0] == "seg"

    def test_shared_modules_are_found_under_each_of_their_names(self) -> None:
        one = nn.Identity()
        assert resolve_module(nn.ModuleDict({"a": one, "b": one}), "b") == ("b", "")

    def test_t1_is_never_t1ce(self) -> None:
        names = ("t1ce", "t1")
        net = MeanNet(names)
        spec = BackboneSpec(encoders={"t1": "t1", "t1ce": "t1ce"}, classifier="classifier", students="replay")
        adapter = BackboneAdapter(net, spec, names)
        assert adapter.encoders["t1"] == (net.encoders["t1"],)
        assert adapter.encoders["t1ce"] == (net.encoders["t1ce"],)


class TestSpec:
    def test_single_names_become_tuples_and_sequences_are_frozen(self) -> None:
        coarse = ["a", "b"]
        encoders: Any = {"t1": "x", "t2": ["y", "z"]}
        spec = BackboneSpec(encoders=encoders, classifier="c", deep_supervision=coarse, mask_columns=["t2", "t1"])
        coarse.append("c")
        assert spec.encoders == {"t1": ("x",), "t2": ("y", "z")}
        assert spec.deep_supervision == ("a", "b")
        assert spec.mask_columns == ("t2", "t1")
        assert spec.replaced(students="replay").students == "replay"
        assert spec.students == "auto"

    def test_every_wrong_field_is_told_at_once(self) -> None:
        with pytest.raises(ConfigError) as error:
            BackboneSpec(
                classifier="",
                outputs="logits",  # type: ignore[arg-type]
                students="magic",  # type: ignore[arg-type]
                mask_meaning="absent",  # type: ignore[arg-type]
                mask_format="bytes",
            )
        for part in ("5 problems", "outputs", "'magic'", "mask_meaning", "mask_format", "classifier"):
            assert part in str(error.value)

    @pytest.mark.parametrize("students", ["replay", "mixed", "heads"])
    def test_students_that_replay_need_encoders(self, students: Any) -> None:
        with pytest.raises(ConfigError, match="needs the names of the encoders"):
            BackboneSpec(classifier="c", students=students)

    def test_mixed_replay_excludes_another_notion_of_absence(self) -> None:
        with pytest.raises(ConfigError, match="cannot be combined with fill_missing="):
            BackboneSpec(classifier="c", encoders={"t1": "x"}, students="mixed", fill_missing=lambda x, mask: x)

    def test_replay_without_a_mask_is_not_what_the_checks_choose(self) -> None:
        net = NoMaskNet(M)
        model = wrap(net, mask_argument=None, students="auto")
        x, mask, y = batch(MIXED)
        model(x, passion_presence=mask, passion_target=y)
        assert model.passion.adapter is not None
        assert model.passion.adapter.spec.students == "mixed"
        assert (model.passion.loss_terms().distance[:2, :2] > 1e-4).all()

    @pytest.mark.parametrize("encoders", [{"t1": 3}, {"t1": [3]}])
    def test_encoders_must_be_names(self, encoders: Any) -> None:
        with pytest.raises(ConfigError, match=r"(?s)encoders.*3"):
            BackboneSpec(classifier="c", encoders=encoders)


class TestBinding:
    def test_every_wrong_name_is_told_at_once_with_close_matches(self) -> None:
        net = DeepNet(M)
        spec = BackboneSpec(
            encoders={"flair": "encoders.flai", "t2": "encoders.t1", "t1": "encoders.t1"},
            classifier="clasifier",
            deep_supervision=("corse",),
            student_mode={"is_trainin": False},
            mask_columns=("flair", "t1"),
            students="replay",
        )
        with pytest.raises(ConfigError) as error:
            PassionWrapper(net, M, missing_rates=(0.1,) * 3, spec=spec)
        for part in (
            "does not fit DeepNet",
            "Did you mean 'classifier'",
            "Did you mean 'coarse'",
            "'encoders.flair'",
            "unknown modality 't2'. Did you mean",
            "modality 't1ce' has none",
            "'t2' and 't1' name the same module",
            "Did you mean 'is_training'",
            "must be a permutation",
        ):
            assert part in str(error.value)

    def test_a_wrong_preset_name_and_a_wrong_spec_are_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"unknown preset 'rfent'. Did you mean 'rfnet'"):
            PassionWrapper(MeanNet(M), M, missing_rates=(0.1,) * 3, spec="rfent")
        with pytest.raises(ConfigError, match="spec"):
            PassionWrapper(MeanNet(M), M, missing_rates=(0.1,) * 3, spec=3)  # type: ignore[arg-type]

    def test_a_module_that_never_runs_is_no_classifier(self) -> None:
        x, mask, _ = batch(MIXED)
        with pytest.raises(BackboneError, match="called 0 times"):
            wrap(MeanNet(M), classifier="encoders")(x, mask)

    def test_a_classifier_that_was_replaced_after_wrapping_is_noticed(self) -> None:
        model = wrap(MeanNet(M))
        x, mask, y = batch(MIXED)
        assert loss_of(model, x, mask, target=y) > 0
        model.backbone.classifier = nn.Conv2d(4, 3, 1)
        with pytest.raises(RuntimeError, match="replaced"):
            model(x, mask)

    def test_several_modules_per_modality_are_all_replayed(self) -> None:
        net = MeanNet(M)
        calls: list[int] = []
        for name in M:
            for number, part in enumerate(net.encoders[name]):
                part.forward = _noted(part.forward, calls, number)
        x, mask, y = batch(MIXED)
        whole = loss_of(wrap(net), x, mask, target=y)
        calls.clear()
        parts = {name: (f"encoders.{name}.0", f"encoders.{name}.1") for name in M}
        # The activation of the encoder works in place on what its convolution put out.
        assert loss_of(wrap(net, encoders=parts, copy_features=True), x, mask, target=y) == whole
        assert calls == [0, 1] * 3

    def test_features_changed_in_place_ask_for_copies(self) -> None:
        net = MeanNet(M)
        parts = {name: f"encoders.{name}.0" for name in M}
        x, mask, _ = batch(MIXED)
        with pytest.raises(RuntimeError, match=r"copy_features=True"):
            wrap(net, encoders=parts)(x, mask)

    @pytest.mark.parametrize("students", ["replay", "mixed", "rerun"])
    def test_exact_ways_of_letting_one_modality_through_agree(self, students: Any) -> None:
        net = MeanNet(M).double()
        x, mask, y = batch(MIXED, dtype=torch.float64)
        wanted = loss_of(wrap(net), x, mask, target=y)
        assert loss_of(wrap(net, students=students), x, mask, target=y) == pytest.approx(wanted, rel=1e-12)
        rerun = wrap(net, students="rerun", encoders={})
        assert loss_of(rerun, x, mask, target=y) == pytest.approx(wanted, rel=1e-12)

    def test_a_rerun_student_does_not_move_the_encoders_of_other_modalities(self) -> None:
        net = NoMaskNet(M)
        x, mask, y = batch([[1, 1, 0]])
        model = wrap(net, mask_argument=None, students="rerun")
        model(x, passion_presence=mask)
        model.passion_loss(y).backward()
        # Its encoder sees zeros in every student pass, and would learn a bias from them.
        assert net.encoders["t1"].bias.grad is None or not net.encoders["t1"].bias.grad.any()
        assert net.encoders["flair"].bias.grad.any()

    def test_a_custom_call_replaces_the_call_of_student_passes(self) -> None:
        net = MeanNet(M)
        seen: list[tuple[list[float], list[list[bool]]]] = []

        def call(backbone: nn.Module, x: Tensor, mask: Tensor) -> Any:
            seen.append((x.flatten(2).abs().sum((0, 2)).tolist(), mask.tolist()))
            return backbone(x, mask)

        x, mask, y = batch(MIXED)
        called = wrap(net, forward_fn=call)
        found = loss_of(called, x, mask, target=y)
        assert found == loss_of(wrap(called.unwrap()), x, mask, target=y)
        masks = [masks for _, masks in seen]
        assert masks == [[[True, False, False]] * 2, [[False, True, False]] * 2, [[False, False, True]]]
        assert all(sum(value > 0 for value in content) == 1 for content, _ in seen)

    def test_what_absent_means_can_be_told(self) -> None:
        net = MeanNet(M)
        fills: list[list[list[bool]]] = []

        def absent(x: Tensor, mask: Tensor) -> Tensor:
            fills.append(mask.tolist())
            return torch.where(mask[:, :, None, None], x, -7.0)

        seen: list[Tensor] = []
        net.encoders["flair"].register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        x, mask, _ = batch([[1, 1, 0], [0, 1, 1]])
        wrap(net, fill_missing=absent, students="rerun")(x, mask)
        assert fills[0] == mask.tolist()
        alone = [[True, False, False]], [[False, True, False]] * 2, [[False, False, True]]
        assert fills[1:] == list(alone)
        assert torch.equal(seen[0][1], torch.full((1, 4, 4), -7.0))
        assert torch.equal(seen[0][0], x[0, :1])


class TestMasks:
    def test_a_mask_of_every_kind_gives_the_same_loss(self) -> None:
        x, mask, y = batch(MIXED)
        net = MeanNet(M)
        wanted = loss_of(wrap(net), x, mask, target=y)

        class Floating(MeanNet):
            def forward(self, x: Tensor, mask: Tensor) -> Any:
                assert mask.is_floating_point()
                return super().forward(x, mask.bool())

        class Inverted(MeanNet):
            def forward(self, x: Tensor, *, missing: Tensor) -> Any:  # type: ignore[override]
                assert missing.dtype == torch.int64
                return super().forward(x, missing == 0)

        floating, inverted = Floating(M), Inverted(M)
        for other in (floating, inverted):
            other.load_state_dict(net.state_dict())
        assert loss_of(wrap(floating, mask_format="float"), x, mask.float(), target=y) == wanted
        model = wrap(inverted, mask_format="int", mask_meaning="missing", mask_argument="missing")
        assert loss_of(model, x, missing=(~mask).long(), target=y) == wanted

    def test_a_list_of_indices_holds_for_the_whole_batch(self) -> None:
        class Listed(MeanNet):
            def forward(self, x: Tensor, indices: list[int]) -> Any:  # type: ignore[override]
                mask = torch.zeros(len(x), len(self.names), dtype=torch.bool)
                mask[:, indices] = True
                return super().forward(x, mask)

        net, listed = MeanNet(M), Listed(M)
        listed.load_state_dict(net.state_dict())
        x, mask, y = batch([[1, 0, 1]] * 2)
        model = wrap(listed, mask_format="indices")
        assert loss_of(model, x, [0, 2], target=y) == loss_of(wrap(net), x, mask, target=y)
        with pytest.raises(InputError, match=r"at most once, got \[0, 7\]"):
            model(x, [0, 7])
        for wrong in (mask, [True, False, True]):
            with pytest.raises(InputError, match="list of modality indices"):
                model(x, wrong)

    def test_columns_in_another_order_are_translated(self) -> None:
        class Shuffled(MeanNet):
            def forward(self, x: Tensor, mask: Tensor) -> Any:  # Columns are (t1, flair, t1ce).
                return super().forward(x, mask[:, [1, 2, 0]])

        net, shuffled = MeanNet(M), Shuffled(M)
        shuffled.load_state_dict(net.state_dict())
        x, mask, y = batch(MIXED)
        model = wrap(shuffled, mask_columns=("t1", "flair", "t1ce"))
        assert loss_of(model, x, mask[:, [2, 0, 1]], target=y) == loss_of(wrap(net), x, mask, target=y)
        assert torch.equal(model.passion.loss_terms().active[0], torch.tensor([True, True, False]))

    def test_a_codec_translates_anything(self) -> None:
        class Coded(MeanNet):
            def forward(self, x: Tensor, code: int) -> Any:  # type: ignore[override]
                mask = torch.tensor([[bool(code >> m & 1) for m in range(3)]]).expand(len(x), -1)
                return super().forward(x, mask)

        codec = MaskCodec(
            encode=lambda mask: sum(1 << m for m, here in enumerate(mask[0].tolist()) if here),
            decode=lambda code: torch.tensor([bool(code >> m & 1) for m in range(3)]),
        )
        net, coded = MeanNet(M), Coded(M)
        coded.load_state_dict(net.state_dict())
        x, mask, y = batch([[1, 1, 0]] * 2)
        model = wrap(coded, mask_format=codec)
        assert loss_of(model, x, 3, target=y) == loss_of(wrap(net), x, mask, target=y)

    @given(data=st.data())
    def test_decoding_undoes_encoding(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(2, 6))
        names = NAMES[:count]
        columns = data.draw(st.one_of(st.none(), st.permutations(names)))
        kind = data.draw(st.sampled_from(["bool", "float", "int", "indices"]))
        meaning = data.draw(st.sampled_from(["present", "missing"]))
        row = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
        mask = torch.tensor([row, row])
        if kind != "indices":
            mask[1] = torch.tensor(data.draw(st.permutations(row)))
        codec = codec_for(kind, meaning, columns, names)
        raw = codec.encode(mask)
        assert torch.equal(codec.decode(raw).expand(2, -1), mask)
        column = (columns or list(names)).index(names[0])
        says = column in raw if kind == "indices" else bool(raw[0, column])
        assert says is (row[0] if meaning == "present" else not row[0])

    @pytest.mark.parametrize(
        ("kind", "given", "wanted"),
        [
            ("float", torch.ones(2, 3).bfloat16(), torch.bfloat16),
            ("float", None, torch.float32),
            ("int", torch.ones(2, 3, dtype=torch.uint8), torch.uint8),
            ("bool", torch.ones(2, 3), torch.bool),
            ("float", torch.ones(2, 3, dtype=torch.bool), torch.float32),
        ],
    )
    def test_a_mask_has_the_number_format_of_one_of_its_kind(self, kind: str, given: Any, wanted: torch.dtype) -> None:
        mask = torch.tensor(MIXED, dtype=torch.bool)
        raw = encoded_like(given, codec_for(kind, "present", None, M), mask)
        assert raw.dtype == wanted
        assert torch.equal(raw.bool(), mask)

    def test_indices_cannot_say_that_samples_differ(self) -> None:
        with pytest.raises(InputError, match="samples have different masks"):
            codec_for("indices", "present", None, M).encode(torch.tensor(MIXED, dtype=torch.bool))

    def test_backbones_that_cannot_mix_masks_say_so(self) -> None:
        model = wrap(MeanNet(M), per_sample_masks=False)
        x, mask, y = batch(MIXED)
        with pytest.raises(InputError, match="group samples by their modalities, or use batches of one"):
            model(x, mask)
        assert loss_of(model, x[:1], mask[:1], target=y[:1]) > 0

    @pytest.mark.parametrize("masked", [True, False])
    def test_nor_may_passion_presence_mix_for_them(self, masked: bool) -> None:
        net: Any = MeanNet(M) if masked else NoMaskNet(M)
        model = wrap(net, per_sample_masks=False, **({} if masked else {"mask_argument": None, "students": "mixed"}))
        x, _, y = batch([[1, 1, 1]] * 3)
        alone = torch.tensor([[1, 0, 0]] * 3).bool()
        call = (x, alone) if masked else (x,)
        mixed, alike = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 1]]).bool(), torch.tensor([[1, 1, 0]] * 3).bool()
        with pytest.raises(InputError, match="cannot mix masks in one batch"):
            model(*call, passion_presence=mixed, passion_target=y)
        assert model(*call, passion_presence=alike, passion_target=y)[1] > 0

    def test_a_checked_mask_is_bool_on_the_cpu_without_gradient(self) -> None:
        mask = torch.tensor([[True, False], [True, True]])
        assert torch.equal(check_mask(mask, 2, ("a", "b"), what="m"), mask)
        assert torch.equal(check_mask(mask[0], 2, ("a", "b"), what="m"), mask[:1].expand(2, -1))


class TestCalls:
    def test_an_argument_is_found_by_position_and_by_name(self) -> None:
        net = MeanNet(M)
        assert locate_argument(net, 1) == locate_argument(net, "mask") == Argument(1, "mask")
        call = BackboneCall((1,), {"mask": 2})
        assert call.get(Argument(1, "mask")) == 2
        assert call.get(Argument(0, "x")) == 1
        assert call.get(Argument(2, "y"), "nothing") == "nothing"
        assert call.replaced(Argument(1, "mask"), 5).kwargs == {"mask": 5}
        assert call.replaced(Argument(0, "x"), 7).args == (7,)
        assert call.replaced(Argument(2, "y"), 9).kwargs == {"mask": 2, "y": 9}
        assert call.args == (1,)
        with pytest.raises(LookupError, match="has no name"):
            call.replaced(Argument(4, None), 1)

    def test_rows_cut_what_has_the_batch_in_front_and_leave_the_rest(self) -> None:
        x, weights, table = torch.randn(3, 2, 4), torch.randn(3), torch.randn(5, 3)
        mask = torch.ones(3, 2, dtype=torch.bool)
        call = BackboneCall((x, mask), {"weights": weights, "extra": {"deep": [x, table]}})
        cut = call.rows(torch.tensor([2, 0]), 3, whole=(Argument(1, "mask"),))
        assert torch.equal(cut.args[0], x[[2, 0]])
        assert cut.args[1] is mask
        assert cut.kwargs["weights"] is weights
        assert torch.equal(cut.kwargs["extra"]["deep"][0], x[[2, 0]])
        assert cut.kwargs["extra"]["deep"][1] is table

    def test_further_arguments_reach_the_students_row_by_row(self) -> None:
        class Positioned(MeanNet):
            def forward(self, x: Tensor, mask: Tensor, place: Tensor, *, scale: float = 1.0) -> Any:  # type: ignore[override]
                assert len(place) == len(x)
                return super().forward(x + place[:, :, None, None] * scale, mask)

        net = Positioned(M)
        x, mask, y = batch(MIXED)
        place = torch.randn(3, 3)
        found = loss_of(wrap(net, students="rerun"), x, mask, place, scale=0.5, target=y)
        assert found == pytest.approx(loss_of(wrap(net), x, mask, place, scale=0.5, target=y), rel=1e-5)
        assert found != loss_of(wrap(net), x, mask, place, scale=2.0, target=y)

    def test_a_vector_with_an_entry_for_each_sample_is_refused_by_name(self) -> None:
        class Sited(MeanNet):
            def forward(self, x: Tensor, mask: Tensor, site: Tensor) -> Any:  # type: ignore[override]
                return super().forward(x + site.view(-1, 1, 1, 1), mask)

        x, mask, _ = batch(MIXED)
        site = torch.arange(3.0)
        cure = r"argument 'site' has 3 entries .* class weights.* pass it as a column \(site\[:, None\]\)"
        with pytest.raises(BackboneError, match=f"only flair of 2 sample.* must match.*{cure}"):
            wrap(Sited(M))(x, mask, site)
        with pytest.raises(BackboneError, match=f"flair was given 1 sample.* prediction has 3.*{cure}"):
            wrap(Sited(M), students="rerun")(x, mask[[0, 2, 2]], site=site)
        with pytest.raises(BackboneError, match=f"could not be run.*{cure}"):
            wrap(Sited(M), students="auto")(x, mask, site)
        assert wrap(Sited(M), students="auto")(x, mask, site[:, None]).shape == (3, 3, 4, 4)

    def test_only_vectors_that_may_be_too_long_are_named(self) -> None:
        net, mask = MeanNet(M), Argument(1, "mask")
        vector, column = torch.zeros(3), torch.zeros(3, 1)
        assert vector_hint(net, BackboneCall((column, vector), {"size": torch.zeros(2)}), 3, whole=(mask,)) == ""
        hint = vector_hint(net, BackboneCall((column, vector, vector), {"extra": {"age": vector}}), 3, whole=(mask,))
        assert "A vector in positional argument 2 and in argument 'extra' has 3 entries" in hint
        assert "(vector[:, None])" in hint

    def test_an_argument_for_students_replaces_one_passed_by_position(self) -> None:
        seen: list[bool] = []

        class Quick(MeanNet):
            def forward(self, x: Tensor, mask: Tensor, aux: bool = False) -> Any:
                seen.append(aux)
                return super().forward(x, mask)

        x, mask, _ = batch([[1, 1, 0]])
        wrap(Quick(M), student_kwargs={"aux": False})(x, mask, True)
        assert seen == [True, False, False]

    def test_the_mask_of_a_compiled_backbone_may_be_passed_by_name(self) -> None:
        net = MeanNet(M)
        compiled = torch.compile(net, backend="eager")
        assert locate_argument(compiled, 1) == locate_argument(compiled, "mask") == Argument(1, "mask")
        adapter = BackboneAdapter(compiled, spec_of(net), M)
        x, mask, _ = batch(MIXED)
        assert torch.equal(adapter.presence_of(BackboneCall((x,), {"mask": mask})), mask)

    @pytest.mark.parametrize(
        ("where", "input_argument", "mask_argument"),
        [("swapped", 1, 0), ("swapped", "x", "mask"), ("by name", 0, "mask"), ("apart", (0, 1, 2), 4)],
    )
    def test_an_example_goes_where_the_spec_says(self, where: str, input_argument: Any, mask_argument: Any) -> None:
        class Swapped(MeanNet):
            def forward(self, mask: Tensor, x: Tensor) -> Any:  # type: ignore[override]
                return super().forward(x, mask)

        class ByName(MeanNet):
            def forward(self, x: Tensor, *, mask: Tensor) -> Any:
                return super().forward(x, mask)

        class Apart(MeanNet):
            def forward(  # type: ignore[override]
                self, a: Tensor, b: Tensor, c: Tensor, scale: float = 1.0, mask: Any = None
            ) -> Any:
                return super().forward(torch.cat([a, b, c], 1) * scale, mask)

        net = {"swapped": Swapped, "by name": ByName, "apart": Apart}[where](M)
        x, mask, _ = batch([[1, 1, 1]] * 2)
        images = x.split(1, dim=1) if where == "apart" else x
        spec = spec_of(net, students="auto", input_argument=input_argument, mask_argument=mask_argument)
        model = PassionWrapper(net, M, missing_rates=(0.2,) * 3, spec=spec, example_input=images, example_mask=mask)
        assert model.passion.adapter is not None
        assert model.passion.adapter.spec.students == "replay"

    def test_an_example_with_a_gap_says_which_argument_is_missing(self) -> None:
        class Late(MeanNet):
            def forward(self, *arguments: Any) -> Any:
                return super().forward(arguments[0], arguments[2])

        net = Late(M)
        x, mask, _ = batch([[1, 1, 1]] * 2)
        spec = spec_of(net, students="auto", mask_argument=2)
        with pytest.raises(InputError, match=r"nothing was given for argument 1 .* only for argument 2"):
            PassionWrapper(net, M, missing_rates=(0.2,) * 3, spec=spec, example_input=x, example_mask=mask)


class TestImages:
    parts = tuple(torch.randn(2, 1, 4, 4) for _ in M)

    def containers(self) -> list[Any]:
        return [
            torch.cat(self.parts, 1),
            list(self.parts),
            tuple(self.parts),
            dict(zip(reversed(M), reversed(self.parts), strict=True)),
        ]

    def test_every_container_is_split_and_joined(self) -> None:
        for x in self.containers():
            found = split(x, M)
            assert all(torch.equal(one, other) for one, other in zip(found, self.parts, strict=True))
            again = join(found, x, M)
            assert type(again) is type(x)
            assert all(torch.equal(one, other) for one, other in zip(split(again, M), self.parts, strict=True))
            assert batch_size(x, M) == 2

    def test_blanking_zeroes_what_is_not_kept_and_writes_nowhere(self) -> None:
        keep = torch.tensor([[True, False, True], [False, True, True]])
        for x in self.containers():
            before = [part.clone() for part in split(x, M)]
            for row, column in (~keep).nonzero().tolist():
                split(x, M)[column][row] = torch.nan
            found = split(blank(x, keep, M), M)
            for column, part in enumerate(found):
                assert torch.equal(part[keep[:, column]], before[column][keep[:, column]])
                assert part[~keep[:, column]].eq(0).all()
            assert split(x, M)[1][0].isnan().all()
            for part, old in zip(split(x, M), before, strict=True):
                part.copy_(old)
            assert blank(x, torch.ones_like(keep), M) is x

    def test_several_channels_per_modality_stay_together(self) -> None:
        x = torch.randn(2, 6, 4, 4)
        assert torch.equal(split(x, M)[1], x[:, 2:4])
        kept = blank(x, torch.tensor([[False, True, False]] * 2), M)
        assert kept[:, [0, 1, 4, 5]].eq(0).all()
        assert torch.equal(kept[:, 2:4], x[:, 2:4])

    @pytest.mark.parametrize(
        ("x", "message"),
        [
            (torch.zeros(2, 4, 4, 4), r"\(batch, 3 × channels, \*spatial\).*got \(2, 4, 4, 4\)"),
            ([torch.zeros(1)] * 2, "a list of 3 tensors"),
            ({"flair": torch.zeros(1), "t1ce": torch.zeros(1), "T1": 0}, r"no entry for \['t1'\]"),
            ("image", "BackboneSpec.fill_missing and BackboneSpec.forward_fn"),
        ],
    )
    def test_images_that_do_not_fit_say_what_would(self, x: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            split(x, M)

    @pytest.mark.parametrize("students", ["auto", "replay", "rerun"])
    def test_a_mapping_may_hold_other_things_than_images(self, students: Any) -> None:
        class Batched(MeanNet):
            def forward(self, entries: Any, mask: Tensor) -> Any:  # type: ignore[override]
                assert len(entries["place"]) == len(mask)
                x = torch.cat([entries[name] for name in M], 1) * entries["affine"].trace()
                return super().forward(x + entries["place"][:, :, None, None], mask)

        x, mask, y = batch([*MIXED, [1, 1, 1]])
        images = dict(zip(M, x.split(1, dim=1), strict=True))
        others = {"id": list("abcd"), "affine": torch.eye(3), "place": torch.randn(4, 3)}
        net = Batched(M)
        losses = []
        for entries in ({**others, **images}, {**images, **others}):
            model = wrap(net, students=students)
            losses.append(loss_of(model, entries, mask, target=y))
            assert model.passion.adapter is not None
            assert model.passion.adapter.image_size(BackboneCall((entries, mask), {})) == (4, 4)
            model.unwrap()
        assert losses[0] == losses[1]

    def test_backbones_with_lists_mappings_and_separate_arguments_give_the_same_loss(self) -> None:
        class Listed(MeanNet):
            def forward(self, images: Any, mask: Tensor) -> Any:
                values = [images[name] for name in M] if isinstance(images, dict) else list(images)
                return super().forward(torch.cat(values, 1), mask)

        class Apart(MeanNet):
            def forward(self, a: Tensor, b: Tensor, c: Tensor, mask: Tensor) -> Any:  # type: ignore[override]
                return super().forward(torch.cat([a, b, c], 1), mask)

        net, listed, apart = MeanNet(M), Listed(M), Apart(M)
        for other in (listed, apart):
            other.load_state_dict(net.state_dict())
        x, mask, y = batch(MIXED)
        wanted = loss_of(wrap(net), x, mask, target=y)
        parts = x.split(1, dim=1)
        for students in ("replay", "rerun"):
            assert loss_of(wrap(listed, students=students), list(parts), mask, target=y) == pytest.approx(wanted)
            named = dict(zip(M, parts, strict=True))
            assert loss_of(wrap(listed, students=students), named, mask, target=y) == pytest.approx(wanted)
            by_place = wrap(apart, students=students, input_argument=(0, 1, 2), mask_argument=3)
            assert loss_of(by_place, *parts, mask, target=y) == pytest.approx(wanted)
            by_place.unwrap()
            by_name = wrap(apart, students=students, input_argument=("a", "b", "c"), mask_argument="mask")
            found = loss_of(by_name, parts[0], b=parts[1], c=parts[2], mask=mask, target=y)
            assert found == pytest.approx(wanted)
            by_name.unwrap()
