"""Calibration and spectra over two gloo processes on the CPU: what one process finds, and the same bits on both."""

import json
import os

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from rmtkern.api import analyze, prune_
from rmtkern.shrinking import shrink_
from tests.parallel import on_two_ranks, part

ATOL = 1e-9
REPAIRED = (
    1e-3  # conjugate gradients stop at 1e-3 of the output's energy norm, and by rounding one step sooner or later
)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(16), Mlp()

    def forward(self, x):
        return x + self.mlp(self.norm(x))


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 16), nn.Sequential(Block(), Block()), nn.Linear(16, 4)).double().eval()


def data():
    x = torch.randn(22, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return x, x[:, :4].argmax(1)


SAME: dict[str, dict] = {
    "spectra": {"method": "seb", "haar": 0.5},
    "wanda": {"method": "wanda", "calibration": data()[0]},
    "loader": {"method": "wanda", "calibration": None},  # of each rank its own part, see `asked`
    "obs": {"method": "obs", "calibration": data()[0]},
    "admm": {"method": "admm", "pattern": "1x2", "calibration": data()[0]},
    "cast": {"method": "cast", "pattern": "2:4", "calibration": data()[0]},
    "ser": {"method": "ser", "calibration": data()},
    "ser-gradient": {"method": "ser-gradient", "calibration": data()},
    "max drop": {"method": "uniform", "max_drop": 0.1, "evaluate": None, "tolerance": 0.1},
}
"""What two processes find as one does."""

RANDOM: dict[str, dict] = {
    "sensitivity": {"method": "auto", "pattern": "4x1", "calibration": data()[0], "permute": True},
    "best": {"method": "auto", "budget": "best", "calibration": data()[0]},
}
"""What depends on random signs, of each process its own: alike on both."""


def asked(name, rank=0, world=1):
    options = dict((SAME | RANDOM)[name])
    x, y = data()
    if name == "max drop":
        y = net()(x).argmax(1)  # the model is right
    own = [(x[rank::world], y[rank::world])]
    options |= {key: own for key in ("calibration", "evaluate") if options.get(key, 0) is None}
    return options if name == "max drop" else {"sparsity": 0.5, **options}


def work(rank, port, folder):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found, plans = {}, {}
    for name in SAME | RANDOM:
        model = net()
        plan = prune_(model, **asked(name, rank, 2))
        plan.verify(model)
        plans[name] = plan.to_json()
        found.update({f"{name}/{key}": value.clone() for key, value in model.state_dict().items()})
    model = net()
    shrink_(model, mlp=0.5, multiple=1, calibration=data()[0])
    found.update({f"shrink/{key}": value.clone() for key, value in model.state_dict().items()})
    plans["fits"] = analyze(net()).to_json()

    with pytest.raises(ValueError, match="expected at least one image for each process, got 1"):
        prune_(net(), 0.5, "obs", calibration=data()[0][:1])
    with pytest.raises(ValueError, match="the processes have different numbers of batches"):
        prune_(net(), 0.5, "ser", calibration=[data()] * (1 + rank))
    model = fully_shard(net(), mesh=init_device_mesh("cpu", (2,)))
    for verb in (lambda: prune_(model, 0.5, "uniform"), lambda: analyze(model)):
        with pytest.raises(ValueError, match=r"is sharded \(a DTensor\).*before fully_shard"):
            verb()
    save_file(found, f"{folder}/{rank}.safetensors")
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(plans, file)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    tensors = on_two_ranks(work, folder)
    return tensors, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", [*SAME, *RANDOM, "shrink"])
def test_the_ranks_have_the_same_bits(ranks, name):
    one, two = (part(tensors, name) for tensors in ranks[0])
    assert one and all(torch.equal(one[key], two[key]) for key in one)
    assert ranks[1][0].get(name) == ranks[1][1].get(name)


@pytest.mark.parametrize("name", SAME)
def test_two_processes_find_what_one_does(ranks, name):
    model = net()
    plan = prune_(model, **asked(name))
    found, dense = part(ranks[0][0], name), net().state_dict()
    atol = REPAIRED if plan.config.repair == "obs" else ATOL
    for key, value in model.state_dict().items():
        assert int(((found[key] == 0) != (value == 0)).sum()) <= (0 if atol == ATOL else 0.01 * value.numel())
        both = (found[key] != 0) & (value != 0)
        torch.testing.assert_close(found[key][both], value[both], atol=atol, rtol=0)
    assert name != "max drop" or plan.target.images == 22
    assert not torch.equal(found["1.0.mlp.fc1.weight"], dense["1.0.mlp.fc1.weight"])
    images = 0 if name in ("spectra", "max drop") else 22
    assert json.loads(ranks[1][0][name])["calibration_images"] == plan.calibration_images == images


def test_the_parts_were_used(ranks):
    half = net()
    prune_(half, 0.5, "obs", calibration=data()[0][::2])  # what rank 0 alone would find
    found = part(ranks[0][0], "obs")
    assert any(not torch.equal(found[key] == 0, value == 0) for key, value in half.state_dict().items())


def test_units_are_removed_as_by_one_process(ranks):
    model = net()
    shrink_(model, mlp=0.5, multiple=1, calibration=data()[0])
    for key, value in model.state_dict().items():
        torch.testing.assert_close(part(ranks[0][0], "shrink")[key], value, atol=1e-7, rtol=0)


def test_each_decomposes_its_share_and_all_get_all_fits(ranks):
    fits = json.loads(analyze(net()).to_json())
    for plans in ranks[1]:
        found = json.loads(plans["fits"])
        assert list(found) == list(fits)
        assert found == fits


@pytest.mark.parametrize("name", ["sensitivity", "best"])
def test_random_signs_cost_no_exactness(ranks, name):
    plan = json.loads(ranks[1][0][name])
    zeros = sum(layer["zeros"] for layer in plan["layers"])
    assert zeros == round(0.5 * sum(layer["total"] for layer in plan["layers"]))
    assert name != "best" or len(plan["budgets"]) == 3
