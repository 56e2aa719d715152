"""What fuzzing found, each in its smallest form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from models import NAMES, MeanNet, NoMaskNet, batch, spec_of
from passion_plugin.backbone import BackboneSpec
from passion_plugin.baselines import AGM, OGMGE, PMR, named_strategy
from passion_plugin.config import PassionConfig
from passion_plugin.data import EvenSubsets, PresenceTable, blank_missing, draw_presence, drop_modalities, parse_subset
from passion_plugin.errors import BackboneError, ConfigError, InputError, raise_problems, suggest
from passion_plugin.training import PreferenceEstimator
from passion_plugin.wrapper import PassionWrapper

M = NAMES[:3]
MIXED = [[1, 1, 0], [1, 1, 1], [0, 0, 1]]
RATES = (0.2, 0.5, 0.75)
ARRAY = np.array(["a", "b"])


def wrap(net: MeanNet | NoMaskNet | None = None, *, config: PassionConfig | None = None, **spec: Any) -> PassionWrapper:
    net = MeanNet(M) if net is None else net
    return PassionWrapper(net, M, missing_rates=RATES, spec=spec_of(net, **spec), config=config)


class Small(MeanNet):
    """Cannot take a single sample."""

    def __init__(self, names: Any, error: Exception) -> None:
        super().__init__(names)
        self.error = [error]  # in a list, so that the same object is raised by a copy that the checks make

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Any:
        if len(x) == 1:
            raise self.error[0]
        return super().forward(x, mask)


class TestPasses:
    @pytest.mark.parametrize("memory", ["default", "low"])
    def test_batch_normalisation_of_one_value_in_a_student_says_which(self, memory: Any) -> None:
        model = wrap(MeanNet(M, norm="batch"), config=PassionConfig(memory=memory))
        x, mask, y = batch([[1, 0, 0], [1, 1, 0]], side=1, classes=1)
        with pytest.raises(
            BackboneError, match=r"(?s)only flair of 1 sample\(s\): ValueError: Expected more.*Use larger"
        ):
            model(x, mask)
        x, mask, y = batch(MIXED)
        assert model(x, mask, passion_target=y)[1].isfinite()

    def test_batch_normalisation_of_one_value_in_an_absent_sample_says_so(self) -> None:
        model = wrap(MeanNet(M, norm="batch"), students="mixed")
        x, mask, _ = batch([[1, 1, 1], [1, 1, 1]], side=1)
        with pytest.raises(BackboneError, match="one sample in which every modality is absent: ValueError"):
            model(x, mask)

    @pytest.mark.parametrize("students", ["replay", "mixed"])
    @pytest.mark.parametrize("error", [torch.OutOfMemoryError("too much"), MemoryError()], ids=["torch", "python"])
    def test_what_the_machine_raises_stays_what_it_is_with_a_note(self, error: Exception, students: Any) -> None:
        model = wrap(Small(M, error=error), students=students)
        before = error.args
        x, mask, _ = batch([[1, 1, 0], [0, 0, 1]])
        with pytest.raises(type(error)) as raised:
            model(x, mask)
        assert raised.value is error
        assert error.args == before
        assert "while the backbone was given" in vars(error).pop("__notes__")[-1]

    @pytest.mark.parametrize(
        "text",
        [
            "CUDA out of memory. Tried to allocate 2.00 GiB",
            "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory",
            "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED.",
        ],
    )
    def test_a_batch_size_finder_still_recognises_a_plain_runtime_error(self, text: str) -> None:
        memory = pytest.importorskip("lightning.pytorch.utilities.memory")
        model = wrap(Small(M, error=RuntimeError(text)))
        x, mask, _ = batch([[1, 1, 0], [0, 0, 1]])
        with pytest.raises(BackboneError) as raised:
            model(x, mask)
        assert memory.is_oom_error(raised.value)

    def test_the_kind_of_an_error_is_not_read_off_its_words(self) -> None:
        model = wrap(Small(M, error=RuntimeError("slot 'malloc_gate' is missing")))
        x, mask, _ = batch([[1, 1, 0], [0, 0, 1]])
        with pytest.raises(BackboneError, match=r"only flair of 1 sample\(s\): RuntimeError: slot 'malloc_gate'"):
            model(x, mask)

    @pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("no"), OSError("no such file")])
    def test_what_the_backbone_raises_is_no_matter_of_normalisation(self, error: Exception) -> None:
        model = wrap(Small(M, error=error))
        x, mask, _ = batch([[1, 1, 0], [0, 0, 1]])
        with pytest.raises(BackboneError, match=rf"only flair of 1 sample\(s\): \w+: {error}$") as raised:
            model(x, mask)
        assert raised.value.__cause__ is error

    def test_softmax_of_one_class_is_refused_by_the_name_of_the_classifier(self) -> None:
        model = wrap(MeanNet(M, classes=1))
        x, mask, _ = batch(MIXED, classes=1)
        with pytest.raises(BackboneError, match=r"'classifier' gives one class.*outputs='sigmoid'"):
            model(x, mask)


class TestTensors:
    @pytest.mark.parametrize(
        ("change", "says"),
        [(lambda tensor: tensor.to("meta"), "meta device"), (lambda tensor: tensor.to_sparse(), "to_dense")],
        ids=["meta", "sparse"],
    )
    def test_tensors_without_values_to_look_at_are_refused(self, change: Any, says: str) -> None:
        model = wrap()
        x, mask, y = batch(MIXED)
        with pytest.raises(InputError, match=f"the input .*{says}"):
            model(change(x), mask)
        with pytest.raises(InputError, match=f"the mask .*{says}"):
            model(x, change(mask))
        model(x, mask)
        with pytest.raises(InputError, match=f"the target .*{says}"):
            model.passion_loss(change(y))
        assert model.passion_loss(y) > 0

    def test_a_complex_mask_is_no_integer_mask(self) -> None:
        model = wrap(mask_format="int")
        x, mask, _ = batch(MIXED)
        with pytest.raises(InputError, match=r"must be a int tensor.*got dtype torch\.complex64"):
            model(x, mask + 0j)

    def test_a_meta_presence_is_refused(self) -> None:
        net = NoMaskNet(M)
        model = wrap(net, mask_argument=None, students="mixed")
        x, mask, _ = batch(MIXED)
        with pytest.raises(InputError, match="passion_presence is on the meta device"):
            model(x, passion_presence=mask.to("meta"))

    def test_a_meta_list_of_indices_is_refused(self) -> None:
        model = wrap(mask_format="indices", per_sample_masks=False)
        x, _, _ = batch([[1, 1, 1]])
        with pytest.raises(InputError, match="the mask is on the meta device"):
            model(x, torch.zeros(2, device="meta"))

    @pytest.mark.parametrize("images", [3, "image.nii", None])
    def test_what_is_no_container_of_images_is_refused(self, images: Any) -> None:
        model = wrap()
        _, mask, _ = batch(MIXED)
        with pytest.raises(InputError, match=r"the input must be a tensor, a list|the call has no argument 'x'"):
            model(images, mask)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda parts: [parts[0], None, parts[2]], "must be a tensor, a list of 3 tensors"),
            (
                lambda parts: dict(zip(M, [parts[0], 7, parts[2].sum()], strict=True)),
                "(?s)2 problems.*'t1ce' is a int.*'t1'",
            ),
            (lambda parts: [parts[0][:2], *parts[1:]], r"batch sizes of .* differ: \[2, 3, 3\]"),
        ],
        ids=["none", "numbers", "batch sizes"],
    )
    def test_every_wrong_image_of_a_container_is_named(self, change: Any, says: str) -> None:
        class Parts(MeanNet):
            def encode(self, x: Any) -> Any:
                parts = x.values() if isinstance(x, dict) else x
                return [encoder(part) for encoder, part in zip(self.encoders.values(), parts, strict=True)]

        model = wrap(Parts(M))
        x, mask, y = batch(MIXED)
        with pytest.raises(InputError, match=says):
            model(change(list(x.split(1, dim=1))), mask)
        assert model(list(x.split(1, dim=1)), mask, passion_target=y)[1].isfinite()


class TestFunctions:
    @pytest.mark.parametrize("value", [None, 3, torch.zeros(2)], ids=["none", "number", "shape"])
    def test_absent_must_return_images(self, value: Any) -> None:
        model = wrap(fill_missing=lambda x, keep: value)
        x, mask, _ = batch(MIXED)
        with pytest.raises(BackboneError, match=r"BackboneSpec\.fill_missing gave a .* for a torch.float32 tensor"):
            model(x, mask)

    @pytest.mark.parametrize("value", [3, (), range(3), torch.zeros(3), [None] * 3], ids=repr)
    def test_unimodal_outputs_must_be_predictions(self, value: Any) -> None:
        model = wrap(unimodal_outputs=lambda raw: value, config=PassionConfig.official())
        x, mask, y = batch(MIXED)
        with pytest.raises(BackboneError, match=r"BackboneSpec\.unimodal_outputs gave"):
            model(x, mask, passion_target=y)


class TestSettings:
    @pytest.mark.parametrize("field", ["mode", "modulation", "memory", "backend", "skip_missing_encoders", "gate"])
    def test_an_array_is_no_word(self, field: str) -> None:
        with pytest.raises(ConfigError, match=f"{field} must be .*array"):
            PassionConfig(**{field: ARRAY})  # type: ignore[arg-type]

    @pytest.mark.parametrize("field", ["share_random_state", "skip_missing_encoders"])
    def test_a_number_is_no_flag(self, field: str) -> None:
        with pytest.raises(ConfigError, match=f"{field} must be True"):
            PassionConfig(**{field: 1})  # type: ignore[arg-type]

    def test_a_flag_or_an_endless_integer_is_no_number(self) -> None:
        with pytest.raises(ConfigError, match=r"(?s)2 problems.*temperature.*True.*eta must"):
            PassionConfig(temperature=True, eta=10**400)

    def test_every_field_of_a_spec_has_a_kind_and_all_wrong_ones_are_told(self) -> None:
        wrong: dict[str, Any] = {
            **{
                "classifier": ARRAY,
                "encoders": None,
                "deep_supervision": "head",
                "outputs": ARRAY,
                "input_argument": (),
            },
            **{
                "mask_argument": 1.5,
                "mask_format": 3,
                "mask_meaning": None,
                "mask_columns": 7,
                "per_sample_masks": "yes",
            },
            **{"student_mode": 3, "student_kwargs": [], "fill_missing": 0, "forward_fn": "f", "unimodal_outputs": 1},
            **{"students": ARRAY},
            **{"copy_features": None, "can_skip_encoders": torch.zeros(2)},
        }
        assert set(wrong) == set(BackboneSpec.__dataclass_fields__)
        with pytest.raises(ConfigError, match=f"{len(wrong)} problems") as caught:
            BackboneSpec(**wrong)
        assert all(f"{name} must be" in str(caught.value) for name in wrong)

    @pytest.mark.parametrize("modalities", [3, True, ARRAY[:1], torch.zeros(2), [[], []], object])
    def test_modalities_of_another_kind_are_refused(self, modalities: Any) -> None:
        with pytest.raises(ConfigError, match=r"modalities must be at least two names|names are strings"):
            PassionWrapper(MeanNet(M), modalities, missing_rates=RATES)

    def test_a_rate_alone_is_refused_as_a_tensor_too(self) -> None:
        with pytest.raises(ConfigError, match=r"missing_rates: got .* need one for each"):
            PassionWrapper(MeanNet(M), M, missing_rates=torch.tensor(0.5))

    @pytest.mark.parametrize("make", [OGMGE, AGM, PMR], ids=lambda make: make.__name__)
    @pytest.mark.parametrize("alpha", ["1", None, 1j, [], ARRAY, torch.zeros(2), True], ids=lambda a: type(a).__name__)
    def test_strategies_say_that_a_number_is_none(self, make: Any, alpha: Any) -> None:
        with pytest.raises(ConfigError, match="alpha must be a positive number"):
            make(alpha)

    def test_a_list_is_no_strategy_name(self) -> None:
        with pytest.raises(ConfigError, match=r"unknown strategy \[\]"):
            named_strategy([])  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"eta_every": 1.5}, "eta_every"),
            ({"eta": "x", "beta_min": None}, r"(?s)2 problems.*eta='x'.*beta_min=None"),
            ({"presence_counts": 3}, "presence_counts: got 3, need one for each"),
            ({"presence_counts": ["a", "b"]}, r"presence_counts: got .* need positive numbers"),
            ({"mode": ARRAY}, "mode="),
        ],
    )
    def test_an_estimator_refuses_what_is_no_number(self, options: Any, says: str) -> None:
        with pytest.raises(ConfigError, match=says):
            PreferenceEstimator(M[:2], **options)


class TestMissing:
    def test_ten_digits_too_many_are_not_allocated(self) -> None:
        with pytest.raises(ConfigError, match=r"samples=1000000.*: more than 10000000; pass their ids"):
            draw_presence(10**30, {"a": 0.1, "b": 0.1}, seed=0)
        assert len(draw_presence(np.int64(3), {"a": 0.1, "b": 0.1}, seed=0)) == 3  # type: ignore[arg-type]

    @pytest.mark.parametrize("rates", [0.5, "a=0.5", [0.1, 0.2], None])
    def test_rates_are_a_mapping(self, rates: Any) -> None:
        with pytest.raises(ConfigError, match="pass a rate for each modality"):
            draw_presence(3, rates, seed=0)

    @pytest.mark.parametrize("modalities", [3, None, [0, "x"], [[]]])
    def test_names_of_another_type_are_no_crash_of_the_suggestion(self, modalities: Any) -> None:
        with pytest.raises(ConfigError, match="modalit"):
            parse_subset("t1", modalities)
        assert suggest("1", [1, "t1"]) == " Did you mean '1' or 't1'?"  # type: ignore[list-item]

    def test_a_table_says_all_that_is_no_list_and_keeps_its_seed_readable(self) -> None:
        with pytest.raises(ConfigError, match=r"(?s)2 problems.*modalities must be.*None.*sample_ids=3"):
            PresenceTable(3, None, np.ones((1, 1), bool))  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"(?s)nominal_rates is \{.*seed is -1"):
            PresenceTable(("p",), ("a",), np.ones((1, 1), bool), {"a": "x"}, -1)  # type: ignore[dict-item]
        with pytest.raises(ConfigError, match=r"shape \(\), need two axes"):
            PresenceTable.from_array(1, ("a",))
        table = PresenceTable.from_array([[1, 1]], ("a", "b"))
        assert [] not in table
        with pytest.raises(ConfigError, match=r"no sample \[\]"):
            table[[]]  # type: ignore[index]
        with pytest.raises(ConfigError, match="sample_ids=7"):
            table.select(7)  # type: ignore[arg-type]

    def test_functions_say_what_is_no_tensor(self) -> None:
        with pytest.raises(InputError, match=r"(?s)2 problems.*images is a list.*presence is a str"):
            blank_missing([], "x")  # type: ignore[arg-type]
        with pytest.raises(InputError, match="presence is a list"):
            drop_modalities([True])  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="generator is a int"):
            drop_modalities(torch.ones(1, 2, dtype=torch.bool), generator=3)  # type: ignore[arg-type]

    def test_a_sampler_says_all_that_is_wrong(self) -> None:
        with pytest.raises(ConfigError, match=r"(?s)3 problems.*table must.*seed must.*length must"):
            EvenSubsets("t", seed=-1, length="x")  # type: ignore[arg-type]


def test_a_thousand_problems_are_a_short_message() -> None:
    with pytest.raises(ConfigError) as caught:
        raise_problems([f"problem {number}" for number in range(1000)], what="file")
    lines = str(caught.value).splitlines()
    assert (lines[0], lines[20], lines[21]) == ("file: 1000 problems", "  20. problem 19", "  and 980 more")
    assert len(lines) == 22
