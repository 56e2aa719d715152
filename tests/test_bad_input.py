"""Whatever is handed over wrongly is refused with a message that says what to do."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import NAMES, MeanNet, NoMaskNet, batch, spec_of
from passion_plugin import attach as put_on
from passion_plugin.config import PassionConfig
from passion_plugin.data import PresenceTable
from passion_plugin.errors import BackboneError, ConfigError, InputError, PassionError, PassionWarning, UsageError
from passion_plugin.wrapper import PassionWrapper

M = NAMES[:3]
MIXED = [[1, 1, 0], [1, 1, 1], [0, 0, 1]]
RATES = (0.2, 0.5, 0.75)


def wrap(net: MeanNet | None = None, *, config: PassionConfig | None = None, **spec: Any) -> PassionWrapper:
    net = MeanNet(M) if net is None else net
    return PassionWrapper(net, M, missing_rates=RATES, spec=spec_of(net, **spec), config=config)


class TestSetUp:
    @pytest.mark.parametrize("attach", [False, True])
    @pytest.mark.parametrize(
        ("modalities", "message"),
        [
            ("t1", "at least two names"),
            (("t1",), "at least two names"),
            ((), "at least two names"),
            (None, "at least two names"),
            (("t1", 2), "modality 2 is a int; names are strings"),
            (("t1", ""), "modality '': a name must"),
            (("t1", "t1\n"), "a name must be printable"),
            (("T1", "C", "T1+C"), "to one name in several ways"),
            (("t1", "t1"), "different names"),
        ],
    )
    def test_modalities_must_be_at_least_two_different_names(self, modalities: Any, message: str, attach: bool) -> None:
        net = MeanNet(M)
        use: Any = put_on if attach else PassionWrapper
        with pytest.raises(ConfigError, match=message):
            use(net, modalities=modalities, missing_rates=RATES)
        assert "forward" not in vars(net)

    def test_all_that_is_wrong_is_told_at_once(self) -> None:
        with pytest.raises(ConfigError) as error:
            PassionWrapper(len, ("t1", "t1"), missing_rates=RATES, config={"temperature": 2})  # type: ignore[arg-type]
        for part in ("3 problems", "torch.nn.Module", "different names", "must be a PassionConfig, got dict"):
            assert part in str(error.value)

    @pytest.mark.parametrize("both", [False, True])
    def test_exactly_one_description_of_rarity_is_needed(self, both: bool) -> None:
        options: dict[str, Any] = {"presence": np.ones((2, 3), bool), "missing_rates": RATES} if both else {}
        found = "both" if both else "neither"
        with pytest.raises(ConfigError, match=rf"either presence= .* or missing_rates= .*{found}"):
            PassionWrapper(MeanNet(M), M, **options)

    @pytest.mark.parametrize(
        ("rates", "message"),
        [
            (
                {"flair": 0.1, "t1ce": 0.1, "t1c": 0.2},
                r"(?s)unknown modality 't1c'. Did you mean 't1ce'.*none for modality 't1'",
            ),
            ({"flair": 0.1, "t1ce": 1.0, "t1": -0.1}, r"(?s)1\.0 is not.*-0\.1 is not"),
            ((0.1, 0.2), "got 2, need one for each"),
            ((0.1, 0.2, math.nan), r"nan is not .*\[0, 1\)"),
            ((0.1, 0.2, "0.3"), r"'0.3' is not .*\[0, 1\)"),
            (0.3, r"missing_rates: got 0\.3, need one for each"),
        ],
    )
    def test_missing_rates_name_every_modality_and_lie_in_range(self, rates: Any, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            PassionWrapper(MeanNet(M), M, missing_rates=rates)

    @pytest.mark.parametrize(
        ("presence", "message"),
        [
            (np.ones((4, 2), bool), r"bool array \(N, 3\).*got shape \(4, 2\)"),
            (np.ones((4, 3), int), "dtype int64"),
            ([[1, 0, 1]], "dtype int64"),
            (np.ones(3, bool), r"got shape \(3,\)"),
            (np.ones((0, 3), bool), r"got shape \(0, 3\)"),
            (np.array([[1, 1, 0], [1, 0, 0]], bool), "'t1' is never present: leave it out"),
            (np.array([[1, 1, 1], [0, 0, 0]], bool), r"no modality at all.*\[1\].*leave them out"),
            ("table.csv", "bool array"),
        ],
    )
    def test_presence_must_be_a_bool_table_without_empty_rows_or_columns(self, presence: Any, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            PassionWrapper(MeanNet(M), M, presence=presence)

    def test_a_table_of_other_modalities_is_refused(self) -> None:
        table = PresenceTable(("a",), ("flair", "t1ce", "t2"), np.ones((1, 3), bool))
        with pytest.raises(ConfigError, match=r"the presence table is for .*'t2'.*the wrapper for .*'t1'"):
            PassionWrapper(MeanNet(M), M, presence=table)

    def test_an_example_mask_without_images_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="example_mask was given without example_input"):
            PassionWrapper(MeanNet(M), M, missing_rates=RATES, example_mask=torch.ones(1, 3, dtype=torch.bool))

    def test_official_mode_has_no_regions(self) -> None:
        model = wrap(outputs="sigmoid", config=PassionConfig.official())
        x, mask, _ = batch(MIXED)
        with pytest.raises(PassionError, match=r"(?s)official.*(softmax|sigmoid).*default"):
            model(x, mask)


class TestConfig:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("mode", "oficial"),
            ("modulation", "decoder"),
            ("memory", "tiny"),
            ("temperature", 0),
            ("temperature", "4"),
            ("temperature", math.nan),
            ("temperature", math.inf),
            ("pixel_weight", -1),
            ("prototype_weight", math.nan),
            ("unimodal_weight", None),
            ("eta", -0.01),
            ("eta_growth", 0),
            ("eta_every", 0),
            ("eta_every", 1.5),
            ("warmup_epochs", -1),
            ("warmup_epochs", 0.5),
            ("beta_min", 0),
            ("beta_min", 1.5),
            ("beta_max", 0.5),
        ],
    )
    def test_a_value_out_of_range_is_named(self, field: str, value: Any) -> None:
        with pytest.raises(ConfigError, match=rf"{field}.*{value!r}"):
            PassionConfig(**{field: value})

    def test_every_wrong_value_is_told_at_once(self) -> None:
        with pytest.raises(ConfigError, match=r"(?s)3 problems.*mode.*temperature.*eta_every"):
            PassionConfig(mode="x", temperature=-1, eta_every=0)  # type: ignore[arg-type]

    def test_a_configuration_does_not_change(self) -> None:
        config = PassionConfig()
        with pytest.raises(AttributeError):
            config.temperature = 2.0  # type: ignore[misc]
        assert config.as_dict()["temperature"] == 4.0
        assert PassionConfig(**config.as_dict()) == config
        assert PassionConfig.official(temperature=2.0) == PassionConfig(mode="official", temperature=2.0)
        with pytest.raises(TypeError, match="temprature"):
            PassionConfig(temprature=2.0)  # type: ignore[call-arg]

    def test_the_defaults_are_those_of_the_paper_and_its_code(self) -> None:
        wanted = {
            "temperature": 4.0,
            "pixel_weight": 0.5,
            "prototype_weight": 0.1,
            "eta": 0.01,
            "eta_growth": 1.5,
            "eta_every": 100,
            "beta_min": 0.1,
            "beta_max": 4.0,
        }
        for config in (PassionConfig(), PassionConfig.official()):
            assert {name: getattr(config, name) for name in wanted} == wanted


class TestMasks:
    @pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8])
    def test_a_mask_of_another_dtype_is_refused_with_the_danger_it_is(self, dtype: torch.dtype) -> None:
        model = wrap()
        x, mask, _ = batch(MIXED)
        with pytest.raises(InputError, match=r"dtype torch\.\w+: .*silently mask nothing.*mask_format"):
            model(x, mask.to(dtype))

    def test_a_bool_mask_for_a_float_backbone_is_refused_too(self) -> None:
        model = wrap(mask_format="float")
        x, mask, _ = batch(MIXED)
        with pytest.raises(InputError, match=r"must be a float tensor.*got dtype torch\.bool"):
            model(x, mask)
        with pytest.raises(InputError, match="only 0 and 1"):
            model(x, mask.float() / 2)
        with pytest.raises(InputError, match="only 0 and 1"):
            model(x, torch.where(mask, 1.0, math.nan))

    @pytest.mark.parametrize("shape", [(3, 2), (3, 4), (2, 3), (1, 3), (3,), (3, 3, 1)])
    def test_a_mask_of_another_shape_is_refused(self, shape: tuple[int, ...]) -> None:
        model = wrap()
        x, _, _ = batch(MIXED)
        with pytest.raises(InputError, match=r"must have shape \((batch|3), 3\).*got \("):
            model(x, torch.ones(shape, dtype=torch.bool))

    def test_a_mask_that_is_no_tensor_is_refused(self) -> None:
        model = wrap()
        x, _, _ = batch(MIXED)
        with pytest.raises(InputError, match="must be a tensor of format 'bool', got list"):
            model(x, MIXED)

    def test_a_sample_without_any_modality_is_refused(self) -> None:
        model = wrap()
        x, mask, _ = batch([[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 0, 0]])
        with pytest.raises(InputError, match=r"every modality is missing in sample\(s\) \[1, 3\]. Leave such"):
            model(x, mask)

    def test_an_empty_batch_is_refused(self) -> None:
        model = wrap()
        x, mask, _ = batch(MIXED)
        with pytest.raises(InputError, match="empty batch"):
            model(x[:0], mask[:0])

    def test_a_call_without_mask_says_what_is_missing(self) -> None:
        class Optional(MeanNet):
            def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
                return super().forward(x, torch.ones(len(x), 3, dtype=torch.bool) if mask is None else mask)

        model = wrap(Optional(M))
        x, _, _ = batch(MIXED)
        with pytest.raises(InputError, match=r"called without its mask .*passion_presence= .*shape \(3, 3\)"):
            model(x)

    @pytest.mark.parametrize(
        ("presence", "message"),
        [
            (torch.ones(3, 3), "passion_presence must have dtype torch.bool.*Pass mask.bool"),
            (torch.ones(2, 3, dtype=torch.bool), r"passion_presence must have shape \(3, 3\)"),
            (torch.zeros(3, 3, dtype=torch.bool), "passion_presence: every modality is missing"),
            ("all", "passion_presence must be a torch.bool tensor"),
        ],
    )
    def test_passion_presence_is_checked_like_a_mask(self, presence: Any, message: str) -> None:
        net = NoMaskNet(M)
        spec = spec_of(net, mask_argument=None, students="mixed")
        model = PassionWrapper(net, M, missing_rates=RATES, spec=spec)
        x, _, _ = batch(MIXED)
        with pytest.raises(InputError, match=message):
            model(x, passion_presence=presence)


class TestImages:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_nan_or_infinity_in_a_present_modality_names_samples_and_modalities(self, value: float) -> None:
        model = wrap()
        x, mask, y = batch(MIXED)
        x[1, 2, 0, 0] = value
        x[0, 0, 1, 1] = value
        x[2, 0] = value  # Absent: allowed.
        with pytest.raises(InputError, match=r"marked present: 'flair' of sample 0, 't1' of sample 1\. Mark it"):
            model(x, mask)
        x[:2] = 0
        assert model(x, mask, passion_target=y)[1].isfinite()

    def test_images_with_another_number_of_channels_are_refused(self) -> None:
        model = wrap()
        _, mask, _ = batch(MIXED)
        with pytest.raises(InputError, match=r"\(batch, 3 × channels, \*spatial\).*got \(3, 4, 4, 4\)"):
            model(torch.randn(3, 4, 4, 4), mask)

    def test_a_call_without_images_says_so(self) -> None:
        model = wrap()
        _, mask, _ = batch(MIXED)
        with pytest.raises(InputError, match="the call has no argument 'x': the images"):
            model(mask=mask)

    def test_a_refused_batch_changes_nothing(self) -> None:
        net = MeanNet(M, norm="batch")
        model = wrap(net)
        x, mask, y = batch(MIXED)
        x[1] = math.nan
        before = {name: value.clone() for name, value in net.state_dict().items()}
        with pytest.raises(InputError):
            model(x, mask)
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        with pytest.raises(UsageError):
            model.passion_loss(y)
        assert model.passion.preference.samples_seen == 0


class TestTargets:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda y: y + 1, r"values from 1 to 3, but 3 classes are 0\.\.2.*Renumber"),
            (lambda y: y - 1, r"values from -1 to 1"),
            (lambda y: torch.where(y == 0, 255, y), "255.*no ignore value"),
            (lambda y: y.float(), r"Use labels\.long\(\)"),
            (lambda y: y.bool(), "bool, which names 2 classes, but there are 3"),
            (lambda y: y[:, None], r"Drop the channel axis with labels\[:, 0\]"),
            (lambda y: y[:2], r"pass integers \(3, 4, 4\)"),
            (lambda y: y[0], r"pass integers \(3, 4, 4\)"),
            (lambda y: y[:, :, :3], r"pass integers \(3, 4, 4\)"),
            (lambda y: F.one_hot(y, 4).movedim(-1, 1), r"pass integers \(3, 4, 4\)"),
            (lambda y: F.one_hot(y, 3), r"pass integers \(3, 4, 4\)"),
            (lambda y: F.one_hot(y, 3).movedim(-1, 1) * 2, "only 0 and 1"),
            (lambda y: F.one_hot(y, 3).movedim(-1, 1) * 0.5, "take the argmax of soft labels"),
            (lambda y: torch.ones(3, 3, 4, 4), r"exactly one class per voxel.*outputs='sigmoid'"),
            (lambda y: torch.zeros(3, 3, 4, 4), "exactly one class per voxel"),
            (lambda y: y.numpy(), "must be a tensor, got a ndarray"),
        ],
    )
    def test_a_target_that_does_not_fit_says_what_to_pass(self, change: Any, message: str) -> None:
        model = wrap()
        x, mask, y = batch(MIXED)
        model(x, mask)
        with pytest.raises(InputError, match=f"(?s){message}"):
            model.passion_loss(change(y))
        assert model.passion.preference.samples_seen == 0
        assert model.passion_loss(y) > 0, "the step waits for a target that fits"

    def test_a_transposed_target_is_not_resized_in_silence(self) -> None:
        model = wrap()
        _, mask, _ = batch(MIXED)
        model(torch.randn(3, 3, 4, 6), mask)
        with pytest.raises(InputError, match=r"(3, 6, 4).*pass integers \(3, 4, 6\)"):
            model.passion_loss(torch.randint(3, (3, 6, 4)))

    def test_regions_need_masks_of_zeros_and_ones(self) -> None:
        model = wrap(outputs="sigmoid")
        x, mask, y = batch(MIXED)
        model(x, mask)
        with pytest.raises(InputError, match="build one mask per region"):
            model.passion_loss(y)
        with pytest.raises(InputError, match="threshold soft masks first"):
            model.passion_loss(torch.full((3, 3, 4, 4), 0.5))

    def test_integer_logits_are_refused(self) -> None:
        class Rounded(nn.Conv2d):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x).long()

        net = MeanNet(M)
        net.classifier = Rounded(4, 3, 1)
        model = wrap(net)
        x, mask, y = batch(MIXED)
        with pytest.raises(InputError, match=r"int64.*floating values as the network gives them"):
            model(x, mask, passion_target=y)


class TestOrder:
    def test_a_loss_needs_a_forward_in_training_mode(self) -> None:
        model = wrap()
        x, mask, y = batch(MIXED)
        message = "call forward in training mode with gradients enabled first"
        with pytest.raises(UsageError, match=message):
            model.passion_loss(y)
        with torch.no_grad():
            model(x, mask)
        with pytest.raises(UsageError, match=message):
            model.passion_loss(y)
        model.eval()
        model(x, mask)
        with pytest.raises(UsageError, match=message):
            model.passion_loss(y)

    def test_a_loss_is_taken_once_per_forward(self) -> None:
        model = wrap()
        x, mask, y = batch(MIXED)
        model(x, mask)
        model.passion_loss(y)
        with pytest.raises(UsageError, match="passion_loss once after each forward"):
            model.passion_loss(y)
        assert model.passion.preference.samples_seen == 3

    def test_terms_need_a_loss(self) -> None:
        model = wrap()
        x, mask, y = batch(MIXED)
        with pytest.raises(UsageError, match=r"call forward in training mode, then passion_loss\(target\)"):
            model.passion.loss_terms()
        model(x, mask)
        with pytest.raises(UsageError, match="no loss terms yet"):
            model.passion.loss_terms()
        model.passion_loss(y)
        assert model.passion.loss_terms().modalities == M

    def test_an_empty_epoch_warns_once_and_changes_nothing(self) -> None:
        model = wrap()
        with pytest.warns(PassionWarning, match="empty: no distance was recorded; compute the PASSION loss"):
            preference = model.end_epoch()
        assert torch.equal(preference.beta, torch.ones(3, dtype=torch.float64))
        assert torch.equal(preference.counts, torch.zeros(3, dtype=torch.float64))
        model.end_epoch()  # A second warning would be an error here.

    def test_an_epoch_of_single_modality_samples_says_why_it_is_empty(self) -> None:
        model = wrap()
        x, mask, y = batch([[1, 0, 0]])
        model(x, mask, passion_target=y)
        with pytest.warns(PassionWarning, match="each had a single modality"):
            model.end_epoch()

    def test_a_prediction_changed_in_place_is_noticed(self) -> None:
        model = wrap()
        x, mask, y = batch(MIXED)
        prediction = model(x, mask)
        with torch.no_grad():
            prediction.mul_(2)
        with pytest.raises(UsageError, match="out-of-place operation on what forward returned"):
            model.passion_loss(y)


class TestBackbones:
    def test_encoders_behind_reentrant_checkpoints_are_refused(self) -> None:
        from torch.utils.checkpoint import checkpoint

        class Reentrant(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(1, 4, 3, padding=1)

            def forward(self, x: Tensor) -> Tensor:
                result: Tensor = checkpoint(self.conv, x, use_reentrant=True)
                return result

        net = MeanNet(M)
        net.encoders["flair"] = Reentrant()
        model = wrap(net)
        x, mask, _ = batch(MIXED)
        with (
            pytest.warns(UserWarning, match="None of the inputs have requires_grad"),
            pytest.raises(BackboneError, match=r"'flair' has trainable parameters but .*use_reentrant=False"),
        ):
            model(x, mask)

    def test_a_classifier_that_runs_twice_is_refused(self) -> None:
        class Twice(MeanNet):
            def forward(self, x: Tensor, mask: Tensor) -> Any:
                features = self.decoder(self.fuse(self.encode(x), mask))
                return self.classifier(features) + self.classifier(features)

        model = wrap(Twice(M))
        x, mask, _ = batch(MIXED)
        with pytest.raises(BackboneError, match=r"'classifier' was called 2 times .*expected once"):
            model(x, mask)

    def test_logits_changed_in_place_by_the_backbone_are_noticed(self) -> None:
        class InPlace(MeanNet):
            def forward(self, x: Tensor, mask: Tensor) -> Any:
                return super().forward(x, mask).add_(1)

        model = wrap(InPlace(M))
        x, mask, _ = batch(MIXED)
        with pytest.raises(BackboneError, match=r"changed in place after the call.*out of place"):
            model(x, mask)

    def test_an_encoder_that_runs_another_number_of_times_is_refused(self) -> None:
        class Moody(MeanNet):
            def encode(self, x: Tensor) -> list[Tensor]:
                if x[:, 1].any():
                    self.encoders["flair"](x[:, :1])
                return super().encode(x)

        model = wrap(Moody(M))
        x, mask, _ = batch([[1, 1, 0]])
        with pytest.raises(BackboneError, match=r"called 1 times in a student pass but 2 times.*students='rerun'"):
            model(x, mask)

    def test_features_without_a_batch_in_front_are_refused(self) -> None:
        net = MeanNet(M)

        class Flipped(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: Tensor) -> Tensor:
                return self.inner(x).movedim(0, -1)

        class Back(MeanNet):
            def encode(self, x: Tensor) -> list[Tensor]:
                return [feature.movedim(-1, 0) for feature in super().encode(x)]

        net = Back(M)
        for name in M:
            net.encoders[name] = Flipped(net.encoders[name])
        model = wrap(net)
        x, mask, _ = batch(MIXED)
        with pytest.raises(BackboneError, match=r"does not have the batch size 3 in front.*students='rerun'"):
            model(x, mask)
