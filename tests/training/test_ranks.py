"""finetune_ on two gloo processes on the CPU: DDP, FSDP2, and what one process does with the same rows."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from rmtkern.api import prune_
from rmtkern.models import prunable_weights
from rmtkern.ranks import Ranks
from rmtkern.training.loop import finetune_
from rmtkern.training.ranks import full, wrap
from tests.parallel import on_two_ranks, part

# float64, so that sums over ranks and sums over one batch agree far better than a step is long
OPTIONS = {"epochs": 2, "lr": 1e-2, "holdout": 0.25, "ema": 0.5, "regulariser": "group-lasso", "strength": 1e-3,
           "accumulate": 2, "clip": 0.5, "show_progress": False}  # fmt: skip
ATOL = 1e-9


def dense():
    torch.manual_seed(1)
    layers = nn.Linear(6, 9), nn.GELU(), nn.LayerNorm(9), nn.Linear(9, 8), nn.GELU(), nn.Linear(8, 3)
    return nn.Sequential(*layers).double()


def pruned():
    model = dense()
    return model, prune_(model, 0.6, "uniform")


def data():
    x = torch.randn(64, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return x, x[:, :3].argmax(1)


def shard(model):
    mesh = init_device_mesh("cpu", (2,))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(model):
    return {name: full(parameter).clone() for name, parameter in model.named_parameters()}


class Crash(Exception):
    pass


def crash_in_epoch_2(model, plan, **options):
    """An interrupted run: the second epoch's first batch fails on every rank."""
    from rmtkern.training import loop

    original = loop.seed_epoch

    def crash(seed, epoch, rank):
        if epoch == 2:
            raise Crash
        original(seed, epoch, rank)

    loop.seed_epoch = crash
    try:
        with pytest.raises(Crash):
            finetune_(model, plan, data(), batch_size=6, **options)
    finally:
        loop.seed_epoch = original


def work(rank, port, folder):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found, reports = {}, {}
    options = {**OPTIONS, "batch_size": 6, "teacher": dense()}

    def keep(name, model, report):
        found.update({f"{name}/{key}": value for key, value in whole(model).items()})
        reports[name] = report.to_json()

    for name, place in (("auto", None), ("ddp", DistributedDataParallel), ("fsdp", shard)):
        model, plan = pruned()
        if place is not None:
            model = place(model)
        bare = model.module if name == "ddp" else model
        keep(name, bare, finetune_(model, plan, data(), **options))
        plan.verify(bare)  # gathers what is sharded

    options.pop("batch_size")
    for name, place in (("ddp", lambda model: model), ("fsdp", shard)):
        path = f"{folder}/{name}.run.safetensors"
        model, plan = pruned()
        crash_in_epoch_2(place(model), plan, checkpoint=path, **options)
        model, plan = pruned()
        report = finetune_(place(model), plan, data(), batch_size=6, checkpoint=path, resume=True, **options)
        keep(f"{name} resumed", model, report)

    nan = data()
    if rank == 1:
        nan[0][:] = float("nan")
    model, plan = pruned()
    report = finetune_(model, plan, nan, epochs=1, holdout=0)
    keep("nan", model, report)
    with pytest.raises(ValueError, match="different numbers of batches"):
        finetune_(model, plan, [data()] * (1 + rank), holdout=0)
    with pytest.raises(ValueError, match="sharded model cannot be copied"):
        finetune_(shard(pruned()[0]), None, data(), teacher="dense.safetensors")
    half = pruned()[0]
    fully_shard(half[0], mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(ValueError, match=r"call fully_shard\(model\) on the root as well"):
        finetune_(half, None, data())
    save_file(found, f"{folder}/{rank}.safetensors", metadata=reports)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return on_two_ranks(work, folder)


@pytest.mark.parametrize("name", ["auto", "ddp", "fsdp"])
def test_two_processes_do_what_one_does(ranks, name):
    model, plan = pruned()
    before = copy.deepcopy(model.state_dict())
    finetune_(model, plan, data(), batch_size=12, teacher=dense(), **OPTIONS)
    found = part(ranks[0], name)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(found[key], value, atol=ATOL, rtol=0)
        assert not torch.allclose(found[key], before[key], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["auto", "ddp", "fsdp", "ddp resumed", "fsdp resumed", "nan"])
def test_ranks_agree_and_pruned_weights_are_zero(ranks, name):
    one, two = (part(found, name) for found in ranks)
    assert one and all(torch.equal(one[key], two[key]) for key in one)
    model, plan = pruned()
    for weight in prunable_weights(model, [layer.name for layer in plan.layers]):
        assert bool((one[weight.name][weight.parameter == 0] == 0).all())


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_resumed_run_has_the_same_bits(ranks, name):
    once, twice = part(ranks[0], name), part(ranks[0], f"{name} resumed")
    assert all(torch.equal(once[key], twice[key]) for key in once)


def test_nan_on_one_process_stops_all_and_restores(ranks):
    model, _ = pruned()
    assert all(torch.equal(value, part(ranks[0], "nan")[key]) for key, value in model.state_dict().items())


def test_torchrun_without_init_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"call torch\.distributed\.init_process_group\(\) first"):
        Ranks.current()


def test_one_process_is_not_wrapped():
    model = dense()
    assert wrap(model, Ranks()) == (model, model)
