"""Training in two real processes: the gradients and the beta of one process on the whole batch."""

from __future__ import annotations

import copy
import importlib
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from models import NAMES, DeepNet, MeanNet, batch, options_of, spec_of
from passion_plugin import attach, get_passion_state_dict, set_passion_state_dict
from passion_plugin.backbone._sharding import is_sharded
from passion_plugin.baselines import AGM, OGMGE, RedCore
from passion_plugin.config import PassionConfig
from passion_plugin.errors import BackboneError, ConfigError, PassionError, UsageError
from passion_plugin.training import PassionEngine, PreferenceEstimator
from passion_plugin.wrapper import PassionWrapper
from ranks import Ranks

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="torch was built without gloo",
)

M = NAMES[:3]
RATES = (0.2, 0.4, 0.6)
STEPS = 3
# The first two rows go to rank 0, the others to rank 1.
PRESENCE = {
    "mixed": [[1, 1, 0], [1, 1, 1], [0, 1, 1], [1, 0, 1]],
    "a rank lacks a modality": [[1, 1, 1], [1, 0, 1], [1, 1, 0], [0, 1, 0]],
    "a rank has single modalities only": [[1, 1, 1], [1, 0, 1], [1, 0, 0], [0, 1, 0]],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
}


@pytest.fixture(autouse=True)
def _shards_need_pytorch_2_6(request: pytest.FixtureRequest) -> None:
    """PyTorch 2.5 has ``fully_shard`` for CUDA only."""
    old = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6)
    if old and "shard" in request.node.name:
        pytest.skip("fully_shard on a CPU needs PyTorch 2.6")


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    pool = Ranks()
    yield pool
    pool.stop()


class Checkpointed(MeanNet):
    """Encoders or decoder run under activation checkpointing."""

    where = "encoders"
    reentrant = False

    def encode(self, x: Tensor) -> list[Tensor]:
        if self.where != "encoders":
            return super().encode(x)
        parts = zip(self.names, x.chunk(len(self.names), 1), strict=True)
        return [checkpoint(self.encoders[name], part, use_reentrant=False) for name, part in parts]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        features = self.fuse(self.encode(x), mask)
        if self.where == "decoder":
            return self.classifier(checkpoint(self.decoder, features, use_reentrant=self.reentrant))
        return self.classifier(self.decoder(features))


class CheckpointedDecoder(Checkpointed):
    where = "decoder"


class ReentrantDecoder(CheckpointedDecoder):
    reentrant = True


def shard(model: Any, where: str) -> None:
    """``fully_shard`` every part on its own, or the whole in one."""
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:  # PyTorch 2.5
        from torch.distributed._composable.fsdp import fully_shard

    net = model.backbone if isinstance(model, PassionWrapper) else model
    for part in (*net.encoders.values(), net.decoder) if where == "parts" else ():
        fully_shard(part)
    fully_shard(model)


def build(
    net: type[MeanNet] = MeanNet, style: str = "wrap", heads: bool = False, shard_first: str = "", **options: Any
) -> tuple[Any, PassionEngine]:
    """The module to train and the engine of its loss and epochs, the same in every process."""
    torch.manual_seed(3)
    backbone = net(M).double()
    if shard_first:
        shard(backbone, shard_first)
    options = {"modalities": M, "missing_rates": RATES, "spec": spec_of(backbone), **options}
    if heads:
        x, mask, _ = batch([[1, 1, 1]] * 2, dtype=torch.float64)
        options |= {"spec": spec_of(backbone, students="heads"), "example_input": x, "example_mask": mask}
    if isinstance(options.get("strategy"), str):
        options |= options_of(options["strategy"], options.get("config"))
    if style == "attach":
        return backbone, attach(backbone, **options)
    model = PassionWrapper(backbone, **options)
    return model, model.passion


def loss_of(model: nn.Module, passion: PassionEngine, calls: str, x: Tensor, mask: Tensor, target: Tensor) -> Tensor:
    """The user's loss and ours, from one call or two."""
    if calls == "one call":
        prediction, ours = model(x, mask, passion_target=target)
    else:
        prediction = model(x, mask)
        ours = passion.loss(target)
    return F.cross_entropy(prediction[0] if isinstance(prediction, tuple) else prediction, target) + ours


@contextmanager
def without_reduction(network: Any) -> Iterator[None]:
    if isinstance(network, DistributedDataParallel):
        with network.no_sync():
            yield
    else:
        network.set_requires_gradient_sync(False)
        yield
        network.set_requires_gradient_sync(True)


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def trained(
    rank: int | None,
    rows: list[list[int]],
    calls: str = "one call",
    *,
    ddp: dict[str, Any] | None = None,
    fsdp: str = "",
    accumulate: bool = False,
    at_once: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Train for a moment on the own rows of a batch; on all of them when ``rank`` is None.

    Args:
        rank: None in the parent.
        rows: which modalities each of the four samples has.
        calls: "one call" or "two calls".
        ddp: options of DistributedDataParallel, None for none.
        fsdp: what to shard after wrapping.
        accumulate: add up the gradients of two batches of one, reduced once.
        at_once: without ranks, whether the rows of both are one batch.
        **options: for :func:`build`.
    """
    model, passion = build(**options)
    if fsdp:
        shard(model, fsdp)
    network: Any = model if ddp is None else DistributedDataParallel(model, **ddp)
    x, mask, target = batch(rows, dtype=torch.float64)
    mine = torch.arange(4) if rank is None else torch.arange(2 * rank, 2 * rank + 2)
    pieces = mine.chunk(2 if accumulate or (rank is None and not at_once) else 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradients = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        for piece in pieces:
            waits = accumulate and piece is not pieces[-1]
            with without_reduction(network) if waits else nullcontext():
                (loss_of(network, passion, calls, x[piece], mask[piece], target[piece]) / len(pieces)).backward()
        gradients.append({name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
    report = passion.end_epoch()
    return {"gradients": gradients, "beta": report.beta, "counts": report.counts, "metrics": passion.metrics()}


def assert_as_one_process(found: list[dict[str, Any]], wanted: dict[str, Any]) -> None:
    for result in found:
        for gradients, reference in zip(result["gradients"], wanted["gradients"], strict=True):
            assert set(gradients) == set(reference)
            for name, gradient in gradients.items():
                scale = float(reference[name].norm())
                assert float((gradient - reference[name]).norm()) <= 1e-12 * scale, name
        torch.testing.assert_close(result["beta"], wanted["beta"], rtol=1e-13, atol=0)
        assert torch.equal(result["counts"], wanted["counts"])
        assert torch.equal(result["beta"], found[0]["beta"])
    assert any(bool(gradient.any()) for gradient in wanted["gradients"][-1].values())
    assert bool((wanted["beta"] != 1).any())


def refusal(rank: int, *args: Any, **kwargs: Any) -> tuple[str, str]:
    """Class and message of the error that training ends with."""
    try:
        trained(rank, *args, **kwargs)
    except PassionError as error:
        return type(error).__name__, str(error)
    raise AssertionError("nothing was refused")


# --- DistributedDataParallel


@pytest.mark.parametrize("presence", PRESENCE)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("calls", ["one call", "two calls"])
@pytest.mark.parametrize("style", ["wrap", "attach"])
def test_ddp_gives_what_one_process_gives_on_the_whole_batch(
    ranks: Ranks, style: str, calls: str, options: str, presence: str
) -> None:
    found = ranks(trained, PRESENCE[presence], calls, ddp=OPTIONS[options], style=style)
    assert_as_one_process(found, trained(None, PRESENCE[presence], calls, style=style))


@pytest.mark.parametrize("calls", ["one call", "two calls"])
def test_ddp_with_auxiliary_outputs_that_students_leave_out(ranks: Ranks, calls: str) -> None:
    presence = PRESENCE["a rank lacks a modality"]
    found = ranks(trained, presence, calls, ddp={"find_unused_parameters": True}, net=DeepNet)
    assert_as_one_process(found, trained(None, presence, calls, net=DeepNet))


@pytest.mark.parametrize("config", [{"memory": "low"}, {"modulation": "encoder"}, {"warmup_epochs": 1}], ids=str)
def test_ddp_with_other_configurations(ranks: Ranks, config: dict[str, Any]) -> None:
    presence, options = PRESENCE["mixed"], {"config": PassionConfig(**config)}
    found, wanted = ranks(trained, presence, ddp={}, **options), trained(None, presence, **options)
    if "warmup_epochs" in config:
        # beta rests, which would say nothing.
        assert all(result["beta"].tolist() == [1, 1, 1] for result in (*found, wanted))
        found = [{**result, "beta": result["counts"]} for result in found]
        wanted = {**wanted, "beta": wanted["counts"]}
    assert_as_one_process(found, wanted)


def test_ddp_with_students_of_several_modalities_that_one_rank_lacks(ranks: Ranks) -> None:
    # One process then draws for the same rows as the first rank, from the same random state.
    presence, config = [[1, 1, 1], [1, 1, 1], [1, 1, 0], [0, 0, 1]], PassionConfig(subset_students=True)
    found = ranks(trained, presence, ddp={}, config=config)
    assert_as_one_process(found, trained(None, presence, config=config))
    without = trained(None, presence)["gradients"][0]
    assert any(not torch.allclose(found[0]["gradients"][0][name], without[name]) for name in without)


@pytest.mark.parametrize("presence", PRESENCE)
@pytest.mark.parametrize("calls", ["one call", "two calls"])
@pytest.mark.parametrize("options", OPTIONS)
def test_ddp_with_heads_for_students(ranks: Ranks, options: str, calls: str, presence: str) -> None:
    if options == "find_unused_parameters" and calls == "two calls":
        for kind, message in ranks(refusal, PRESENCE[presence], calls, ddp=OPTIONS[options], heads=True):
            assert kind == "UsageError"
            assert "passion_target=target" in message
        return
    found = ranks(trained, PRESENCE[presence], calls, ddp=OPTIONS[options], heads=True)
    assert_as_one_process(found, trained(None, PRESENCE[presence], calls, heads=True))


def test_heads_that_ddp_does_not_hold_are_refused(ranks: Ranks) -> None:
    for kind, message in ranks(refusal, PRESENCE["mixed"], ddp={}, heads=True, style="attach"):
        assert kind == "UsageError"
        assert "DistributedDataParallel(PassionWrapper(backbone" in message


def test_heads_without_a_student_in_the_batch_have_a_gradient_of_zero() -> None:
    model, _ = build(heads=True)
    x, mask, target = batch([[1, 1, 0]] * 2, dtype=torch.float64)
    model(x, mask, passion_target=target)[1].backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.passion.heads[2].parameters())
    assert all(bool(p.grad.any()) for p in model.passion.heads[0].parameters())


def wrapped_the_wrong_way_round(rank: int, kind: str) -> str:
    backbone = MeanNet(M)
    if kind == "DistributedDataParallel":
        distributed: nn.Module = DistributedDataParallel(backbone)
    else:
        from torch.distributed.fsdp import FullyShardedDataParallel

        distributed = FullyShardedDataParallel(backbone, device_id=torch.device("cpu"))
    with pytest.raises(ConfigError) as caught:
        PassionWrapper(distributed, M, missing_rates=RATES, spec=spec_of(backbone))
    return str(caught.value)


@pytest.mark.parametrize("kind", ["DistributedDataParallel", "FullyShardedDataParallel"])
def test_wrapping_what_is_distributed_already_is_refused(ranks: Ranks, kind: str) -> None:
    for message in ranks(wrapped_the_wrong_way_round, kind):
        assert f"the backbone is a {kind}" in message
        assert "around the wrapper" in message


def found_in_the_first_batch(rank: int, style: str) -> dict[str, Any]:
    return trained(rank, PRESENCE["mixed"], ddp={}, style=style, spec=None)


@pytest.mark.parametrize("style", ["wrap", "attach"])
def test_ddp_with_a_backbone_that_is_examined_in_the_first_batch(ranks: Ranks, style: str) -> None:
    assert_as_one_process(ranks(found_in_the_first_batch, style), trained(None, PRESENCE["mixed"], style=style))


# --- Shards


@pytest.mark.parametrize("presence", PRESENCE)
@pytest.mark.parametrize("where", ["parts", "whole"])
@pytest.mark.parametrize("when", ["before", "after", "attached"])
def test_fully_shard_gives_what_one_process_gives(ranks: Ranks, when: str, where: str, presence: str) -> None:
    options = {"style": "attach" if when == "attached" else "wrap"}
    how = {"shard_first": where} if when == "before" else {"fsdp": where}
    for calls in ("one call", "two calls"):
        found = ranks(trained, PRESENCE[presence], calls, **how, **options)
        assert_as_one_process(found, trained(None, PRESENCE[presence], calls, **options))


@pytest.mark.parametrize("presence", PRESENCE)
@pytest.mark.parametrize(
    "options",
    [{"net": DeepNet}, {"config": PassionConfig(memory="low")}, {"strategy": "redcore"}],
    ids=["coarse outputs", "low memory", "redcore"],
)
def test_fully_shard_with_other_students(ranks: Ranks, options: dict[str, Any], presence: str) -> None:
    found = ranks(trained, PRESENCE[presence], fsdp="parts", **options)
    assert_as_one_process(found, trained(None, PRESENCE[presence], **options))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"config": PassionConfig(modulation="encoder")}, "are sharded by fully_shard"),
        ({"strategy": "ogm-ge"}, "are sharded by fully_shard"),
        ({"strategy": "agm"}, "are sharded by fully_shard"),
        ({"spec": None}, "cannot be examined"),
        ({"heads": True}, "fully_shard(model)"),
    ],
    ids=["encoder modulation", "ogm-ge", "agm", "examination", "heads"],
)
def test_what_shards_cannot_do_is_refused(ranks: Ranks, options: dict[str, Any], reason: str) -> None:
    for _, message in ranks(refusal, PRESENCE["mixed"], fsdp="parts", **options):
        assert reason in message


def test_heads_in_a_wrapper_that_is_one_shard(ranks: Ranks) -> None:
    presence = PRESENCE["a rank lacks a modality"]
    assert_as_one_process(ranks(trained, presence, fsdp="whole", heads=True), trained(None, presence, heads=True))


def found_sharded(rank: int, hidden: str) -> list[bool]:
    """Whether a network is, before and after, where the public module lacks the name or was never imported."""
    model, _ = build()
    found = []
    with pytest.MonkeyPatch.context() as patch:
        if hidden == "module":
            patch.delitem(sys.modules, "torch.distributed.fsdp", raising=False)
            patch.delitem(sys.modules, "torch.distributed._composable.fsdp", raising=False)
        found.append(is_sharded(model))
        assert hidden != "module" or "torch.distributed.fsdp" not in sys.modules
    shard(model, "whole")
    importlib.import_module("torch.distributed._composable.fsdp")  # where the name is in PyTorch 2.5

    with pytest.MonkeyPatch.context() as patch:
        if hidden == "name":
            patch.delattr("torch.distributed.fsdp.FSDPModule", raising=False)
        found.append(is_sharded(model))
    return found


@pytest.mark.parametrize("hidden", ["", "name", "module"])
def test_shards_are_found_where_this_version_of_torch_has_them(ranks: Ranks, hidden: str) -> None:
    assert ranks(found_sharded, hidden) == [[False, True]] * 2


def steps(model: Any, optimizer: torch.optim.Optimizer, rank: int, number: int) -> Tensor:
    """Train on the own half of a batch, and return beta at the end of the epoch."""
    rows = slice(2 * rank, 2 * rank + 2)
    x, mask, target = (part[rows] for part in batch(PRESENCE["mixed"], dtype=torch.float64))
    for _ in range(number):
        optimizer.zero_grad()
        loss_of(model, model.passion, "one call", x, mask, target).backward()
        optimizer.step()
    return model.end_epoch().beta


def saved_and_loaded(rank: int, folder: str, where: str, **options: Any) -> list[dict[str, Tensor]]:
    """What a sharded training arrives at, by itself and through a checkpoint, and where the second one started."""

    def fresh() -> tuple[Any, torch.optim.Optimizer]:
        model, _ = build(**options)
        shard(model, where)
        return model, torch.optim.AdamW(model.parameters(), lr=0.05)

    def everything(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        network, state = dcp_state.get_state_dict(model, optimizer)
        return {"model": network, "optimizer": state}

    def reached(model: Any) -> dict[str, Tensor]:
        return {name: whole(parameter) for name, parameter in model.named_parameters()}

    (model, optimizer), (other, its_optimizer) = fresh(), fresh()
    started = reached(other)
    steps(model, optimizer, rank, 2)
    dcp.save(everything(model, optimizer), checkpoint_id=folder)
    state = everything(other, its_optimizer)
    dcp.load(state, checkpoint_id=folder)
    dcp_state.set_state_dict(other, its_optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    betas = [steps(one, its, rank, 2) for one, its in ((model, optimizer), (other, its_optimizer))]
    return [{**reached(model), "beta": betas[0]}, {**reached(other), "beta": betas[1]}, started]


@pytest.mark.parametrize(
    ("where", "options"),
    [("parts", {}), ("whole", {}), ("whole", {"heads": True}), ("parts", {"strategy": "redcore"})],
    ids=["parts", "whole", "heads", "redcore"],
)
def test_a_sharded_training_goes_on_from_a_distributed_checkpoint(
    ranks: Ranks, where: str, options: dict[str, Any], tmp_path: Path
) -> None:
    for unbroken, resumed, started in ranks(saved_and_loaded, str(tmp_path / "checkpoint"), where, **options):
        assert all(torch.equal(resumed[name], value) for name, value in unbroken.items())
        assert bool((resumed["beta"] != 1).any())
        assert not any(torch.equal(resumed[name], value) for name, value in started.items())


def addon_of_shards(rank: int) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """What asking for the add-on state of sharded heads ends in; the whole state, before and after sharding."""
    model, _ = build(heads=True)
    before = get_passion_state_dict(model)
    shard(model, "whole")
    messages = []
    for ask in (
        lambda: get_passion_state_dict(model),
        lambda: set_passion_state_dict(model, before),
    ):
        with pytest.raises(UsageError) as caught:
            ask()
        messages.append(str(caught.value))
    model.load_state_dict(model.state_dict())
    options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    return messages, before, dcp_state.get_model_state_dict(model, options=options)


def test_the_add_on_state_of_sharded_heads_is_refused_and_that_of_the_whole_model_is_not(
    ranks: Ranks,
) -> None:
    (messages, before, full), (others, _, _) = ranks(addon_of_shards)
    assert len(messages) == len(others) == 2
    for message in messages + others:
        assert "torch.distributed.checkpoint" in message
    model, _ = build(heads=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(full)
    heads = {name: value for name, value in get_passion_state_dict(model).items() if name.startswith("heads.")}
    assert heads
    assert all(torch.equal(value, before[name]) for name, value in heads.items())


def addon_beside_shards(rank: int) -> tuple[Tensor, Tensor]:
    (model, _), (other, _) = build(), build()
    for one in (model, other):
        shard(one, "parts")
    beta = steps(model, torch.optim.SGD(model.parameters(), lr=0.1), rank, 2)
    set_passion_state_dict(other, get_passion_state_dict(model))
    return beta, other.passion.preference.beta


def test_the_add_on_state_without_heads_is_whole_beside_shards(ranks: Ranks) -> None:
    for beta, loaded in ranks(addon_beside_shards):
        assert bool((beta != 1).any())
        assert torch.equal(loaded, beta)


class OverRanks(nn.SyncBatchNorm):
    """Centres over all ranks: what SyncBatchNorm does to the order of collective calls, which runs on GPUs only."""

    def forward(self, x: Tensor) -> Tensor:
        from torch.distributed.nn.functional import all_reduce

        axes = (0, *range(2, x.ndim))
        total, count = all_reduce(x.sum(axes)), all_reduce(torch.tensor(float(x[:, 0].numel())))
        return x - (total / count).view(-1, *[1] * (x.ndim - 2))


class Synchronised(MeanNet):
    def __init__(self, modalities: Any) -> None:
        super().__init__(modalities)
        self.decoder[1] = OverRanks(self.classifier.in_channels)
        for encoder in self.encoders.values():
            encoder[1] = OverRanks(self.classifier.in_channels)


@pytest.mark.parametrize("presence", PRESENCE)
def test_synchronised_normalisation_does_not_hang(ranks: Ranks, presence: str) -> None:
    # Without DistributedDataParallel, which accepts the layer on GPUs only: it is the passes that must not wait.
    spec = spec_of(MeanNet(M), can_skip_encoders=True)
    first, second = ranks(trained, PRESENCE[presence], net=Synchronised, spec=spec)
    assert torch.equal(first["beta"], second["beta"])
    for result in (first, second):
        assert any(bool(gradient.any()) for gradient in result["gradients"][-1].values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.distributed.is_nccl_available(), reason="torch was built without NCCL")
def test_sync_batch_norm_with_one_nccl_rank_gives_what_batch_norm_gives(tmp_path: Path) -> None:
    plain = MeanNet(M, norm="batch").to("cuda", torch.float64)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    x, mask, target = (part.cuda() for part in batch(PRESENCE["mixed"], dtype=torch.float64))

    def gradients(net: Any, distribute: Any) -> tuple[dict[str, Tensor], Tensor]:
        model = PassionWrapper(net, M, missing_rates=RATES, spec=spec_of(net))
        loss_of(distribute(model), model.passion, "one call", x, mask, target).backward()
        return {name: whole(p.grad) for name, p in net.named_parameters()}, model.end_epoch().beta

    wanted = gradients(plain, lambda model: model)
    store = (tmp_path / "store").as_uri()
    torch.distributed.init_process_group("nccl", init_method=store, rank=0, world_size=1)
    try:
        found = gradients(synchronised, lambda model: DistributedDataParallel(model, device_ids=[0]))
    finally:
        torch.distributed.destroy_process_group()
    assert any(isinstance(module, nn.SyncBatchNorm) for module in synchronised.modules())
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


# --- Gradient accumulation and activation checkpointing


@pytest.mark.parametrize("calls", ["one call", "two calls"])
@pytest.mark.parametrize("how", [{"ddp": {}}, {"fsdp": "parts"}], ids=["no_sync", "fully_shard"])
def test_accumulated_gradients_are_those_of_the_big_batch(ranks: Ranks, how: dict[str, Any], calls: str) -> None:
    for presence in PRESENCE.values():
        found = ranks(trained, presence, calls, accumulate=True, **how)
        assert_as_one_process(found, trained(None, presence, calls))


@pytest.mark.parametrize("net", [Checkpointed, CheckpointedDecoder])
@pytest.mark.parametrize("how", [{}, {"ddp": {}}, {"fsdp": "parts"}], ids=["one process", "ddp", "fully_shard"])
def test_checkpointing_that_is_not_reentrant_changes_nothing(
    ranks: Ranks, how: dict[str, Any], net: type[MeanNet]
) -> None:
    presence = PRESENCE["a rank lacks a modality"]
    wanted = trained(None, presence)
    found = ranks(trained, presence, net=net, **how) if how else [trained(None, presence, net=net)]
    assert_as_one_process(found, wanted)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_refused_when_wrapped_and_at_the_latest_in_the_first_batch() -> None:
    x, mask, _ = batch([[1, 1, 1]] * 2, dtype=torch.float64)
    reason = r"reentrant activation checkpointing.*use_reentrant=False"
    with pytest.raises(BackboneError, match=reason):
        build(net=ReentrantDecoder, spec=None, example_input=x, example_mask=mask)
    with pytest.raises(BackboneError, match=reason):
        trained(None, PRESENCE["mixed"], net=ReentrantDecoder)


# --- Statistics


def test_official_mode_divides_by_the_samples_of_the_whole_training_set(ranks: Ranks) -> None:
    presence = PRESENCE["mixed"]
    table = torch.tensor(presence * 3, dtype=torch.bool)
    options: dict[str, Any] = {"config": PassionConfig.official(), "missing_rates": None, "presence": table}
    # The gate is one of each batch here, so that the batches have to be the same.
    wanted = trained(None, presence, at_once=False, **options)
    assert_as_one_process(ranks(trained, presence, ddp={}, **options), wanted)
    wrong = trained(None, presence, at_once=False, **{**options, "presence": table[:9]})
    assert not torch.allclose(wrong["beta"], wanted["beta"], rtol=1e-6)


def epochs(rank: int, wide: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    estimator = PreferenceEstimator(M)
    found = []
    for _ in range(5):
        for _ in range(4):
            distance = torch.rand(6, 3, generator=generator, dtype=torch.float64).to(wide)
            presence = torch.rand(6, 3, generator=generator) < 0.6
            presence[:, 0] |= ~presence.any(1)
            rows = slice(None) if rank < 0 else slice(rank, None, 2)
            estimator.update(distance[rows], presence[rows])
        found.append(estimator.end_epoch().beta)
    return found


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_beta_of_two_ranks_is_that_of_one_process_over_many_epochs(ranks: Ranks, wide: torch.dtype) -> None:
    wanted = epochs(-1, wide)
    for found in ranks(epochs, wide):
        for beta, reference in zip(found, wanted, strict=True):
            torch.testing.assert_close(beta, reference, rtol=1e-13, atol=0)


def strategy_epoch(rank: int, strategy: Any) -> dict[str, Any]:
    found = trained(rank, PRESENCE["mixed"], ddp={}, strategy=strategy)
    return {**found, "mean": getattr(strategy, "_mean", None), "steps": getattr(strategy, "_steps", None)}


def test_redcore_has_the_weights_of_one_process(ranks: Ranks) -> None:
    found = ranks(strategy_epoch, RedCore())
    assert_as_one_process(found, trained(None, PRESENCE["mixed"], strategy=RedCore()))


@pytest.mark.parametrize("rule", [OGMGE, AGM])
def test_rules_that_scale_encoders_report_the_factors_of_all_ranks(ranks: Ranks, rule: Any) -> None:
    found = ranks(strategy_epoch, rule())
    assert torch.equal(found[0]["beta"], found[1]["beta"])
    assert found[0]["counts"].tolist() == [2 * STEPS] * 3
    assert found[0]["metrics"]["factor/flair"] != found[1]["metrics"]["factor/flair"]
    for mine, theirs in zip(*(result["gradients"] for result in found), strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def pooled(rank: int) -> list[Tensor]:
    rule = AGM()
    rule.prepare(M, PassionConfig(), PassionEngine(MeanNet(M), modalities=M, missing_rates=RATES).frequencies)
    seen = []
    for epoch in range(2):
        for value in ([1.0, 2.0], [3.0])[rank]:
            rule._steps += 1
            rule._mean = rule._mean + (value + epoch - rule._mean) / rule._steps
        rule.end_epoch()
        seen.append(rule._mean)
    return seen


def test_agm_pools_the_running_means_and_counts_no_step_twice(ranks: Ranks) -> None:
    for first, second in ranks(pooled):
        torch.testing.assert_close(first, torch.full((3,), (1.0 + 2 + 3) / 3))
        torch.testing.assert_close(second, torch.full((3,), (1.0 + 2 + 3 + 2 + 3 + 4) / 6))


def close(rank: int, what: str) -> str:
    names = ("a", "b", "c")
    first, second = PreferenceEstimator(names), PreferenceEstimator(("x", "y"))
    if what == "modalities" and rank:
        first = PreferenceEstimator(("a", "c", "b"))
    if what == "number" and rank:
        first = PreferenceEstimator(names[:2])
    if what == "epoch" and rank:
        first.epoch = 1
    if what == "order" and rank:
        first, second = second, first
    try:
        first.end_epoch()
    except UsageError as error:
        return str(error)
    return ""


@pytest.mark.filterwarnings("ignore::passion_plugin.PassionWarning")
@pytest.mark.parametrize("what", ["modalities", "number", "epoch", "order"])
def test_ranks_that_close_different_epochs_get_an_error_and_not_a_hang(ranks: Ranks, what: str) -> None:
    for rank, message in enumerate(ranks(close, what)):
        assert f"end_epoch() of rank {rank} closes epoch" in message
        assert f"rank(s) {1 - rank} something else" in message


# --- The example


def test_the_example_starts_with_torchrun(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*command, "-m", "examples.train_ddp", "--epochs", "2", "--patients", "4", "--out", str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    # Both processes write to one pipe, where lines may run into each other.
    told = dict(re.findall(r"epoch 2: rank (\d), beta ((?:\d\.\d{4} ?){4})", run.stdout))
    assert set(told) == {"0", "1"}
    assert told["0"].split() == told["1"].split() != ["1.0000"] * 4
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    packed = io.BytesIO(state["passion"]["_extra_state"]["strategy_state"])
    assert torch.load(packed, weights_only=True)["epoch"] == 2
    assert not any(key.startswith("module.") for key in state["backbone"])
