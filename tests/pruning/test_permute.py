"""Channels that change places: where it is found to be allowed, that the model computes the same, and that it pays."""

import copy

import pytest
import torch
from torch import nn

from rmtkern import api
from rmtkern.api import prune_
from rmtkern.models import prunable_weights
from rmtkern.pruning.permute import find_sites, group_rows, permute_
from rmtkern.pruning.plan import PruneConfig
from rmtkern.pruning.sensitivity import sensitivities
from tests.pruning.test_stages import waiting_threads
from tests.test_api import IMAGES, MODELS, Injected, state, unchanged


def names(sites):
    return [(tuple(w.role for w, _ in s.producers), s.consumer and s.consumer.role, s.block) for s in sites]


def values(role, block):
    return ((role,), "attn_out", block)


HIDDEN = {64: (("mlp_in",), "mlp_out", 64), 128: (("mlp_in",), "mlp_out", 128), 32: (("mlp_in",), "mlp_out", 32)}
FUSED = (("qkv", "qkv"), None)
EXPECTED = {
    "timm vit": [values("qkv", 16), (*FUSED, 16), HIDDEN[128]],
    "timm eva02": [values("v", 24)],  # its queries and keys are rotated, its hidden units normalised with weights
    "timm swin": [
        *(values("qkv", 16), (*FUSED, 16), HIDDEN[64]),
        *(values("qkv", 16), (*FUSED, 16), HIDDEN[128]),
    ],
    "hf vit": [(("q", "k"), None, 16), values("v", 16), HIDDEN[64]],
    "hf clip": [(("q", "k"), None, 16), values("v", 16), HIDDEN[64]],
    "torchvision vit": [values("qkv", 8), (*FUSED, 8), HIDDEN[32]],
    "torchvision swin": [
        *(values("qkv", 16), (*FUSED, 16), HIDDEN[64]),
        *(values("qkv", 16), (*FUSED, 16), HIDDEN[128]),
    ],
}


def outputs(model, x=IMAGES):
    with torch.no_grad():
        found = model(x)
    return found if isinstance(found, torch.Tensor) else found[0]


def randomised(model):
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)  # so that no head or scale is zero
    return model.double().eval()


@pytest.mark.parametrize("name", MODELS)
def test_sites_are_found_without_names_and_the_model_computes_the_same(name):
    torch.manual_seed(0)
    model, x = randomised(MODELS[name]()), IMAGES.double()
    weights, before, expected = prunable_weights(model), state(model), outputs(model, IMAGES.double())
    for unit in ((4, 1), (4, 2), (1, 2), (1, 4)):
        sites = [one for one in EXPECTED[name] if unit[0] > 1 or one[1]]
        assert names(find_sites(model, weights, unit, x)) == sites
        assert unchanged(model, before) and waiting_threads() == 0
    for pattern in ("4x2", "2:4"):
        before = state(model)
        costs = permute_(model, weights, sensitivities(model, weights, x), pattern, x)
        assert not unchanged(model, before)
        torch.testing.assert_close(outputs(model, x), expected, rtol=1e-10, atol=1e-10)  # float64, other order of sums
        for cost, again in zip(costs.values(), sensitivities(model, weights, x).values(), strict=True):
            torch.testing.assert_close(cost.rows, again.rows, rtol=1e-4, atol=1e-12)  # sums and inverses, reordered
            torch.testing.assert_close(cost.columns, again.columns, rtol=1e-4, atol=1e-12)


class Gated(nn.Module):
    def __init__(self, between=None):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)
        self.between = between or nn.Identity()

    def forward(self, x):
        return x + self.down_proj(self.between(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)))


def test_gates_go_with_their_partners_and_what_knows_the_order_forbids():
    x = torch.randn(20, 16)
    for between, count in (
        (nn.Identity(), 1),
        (nn.LayerNorm(32, elementwise_affine=False), 1),
        (nn.LayerNorm(32), 0),
        (nn.Softmax(-1), 1),
        (nn.Conv1d(1, 1, 3, padding=1), 0),
    ):
        if isinstance(between, nn.Conv1d):
            between = nn.Sequential(nn.Unflatten(1, (1, 32)), between, nn.Flatten())
        model = nn.Sequential(Gated(between), Gated(between))
        sites = find_sites(model, prunable_weights(model, ("*_proj.weight",)), (4, 1), x)
        assert len(sites) == 2 * count
        assert all(len(site.producers) == 2 and site.consumer is not None for site in sites)


def test_rows_that_are_alike_become_neighbours():
    torch.manual_seed(0)
    kinds = torch.randperm(32) // 4
    features = torch.eye(8)[kinds] + 0.05 * torch.randn(32, 8)
    order = group_rows(features, 4)
    assert order.sort().values.tolist() == list(range(32))
    assert all(len(set(group)) == 1 for group in kinds[order].reshape(8, 4).tolist())
    # where greed errs, swaps help: the longest row takes the one that another needs more
    features = torch.tensor([[3.0, 0.0], [1.0, 2.0], [0.9, 0.0], [0.0, 2.5]])
    assert {frozenset(pair) for pair in group_rows(features, 2).reshape(2, 2).tolist()} == {
        frozenset((0, 2)),
        frozenset((1, 3)),
    }


class Mlp(nn.Module):
    """Hidden units of four kinds that read different inputs, in an order that mixes them."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)
        kinds = torch.arange(32) % 4
        for unit, kind in enumerate(kinds.tolist()):
            self.fc1.weight.data[unit] *= 0.02
            self.fc1.weight.data[unit, 4 * kind : 4 * kind + 4] *= 50

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x)))


@pytest.mark.parametrize("method", ["admm", "sensitivity", "wanda"])
def test_mini_blocks_lose_less_with_exact_counts(method):
    torch.manual_seed(0)
    dense, x = nn.Sequential(Mlp(), Mlp()).eval(), torch.randn(256, 16)
    lost = {}
    for permute in (False, True):
        model = copy.deepcopy(dense)
        plan = prune_(model, 0.5, method, "4x1", targets="*fc1.weight", calibration=x, permute=permute)
        plan.verify(model)
        assert plan.config.permute == permute and plan.sparsity == 0.5
        lost[permute] = float((outputs(model, x) - outputs(dense, x)).square().mean())
    assert lost[True] == pytest.approx(lost[False])  # alone, fc1 has no partner that may move with it
    for permute in (False, True):
        model = copy.deepcopy(dense)
        plan = prune_(model, 0.5, method, "4x1", targets="*.weight", calibration=x, permute=permute)
        assert plan.sparsity == 0.5 and PruneConfig(**{**vars(plan.config)}) == plan.config
        lost[permute] = float((outputs(model, x) - outputs(dense, x)).square().mean())
    assert lost[True] < 0.95 * lost[False]


class Uneven(nn.Module):
    """Hidden units of two sizes, the large ones side by side; fc1 has the pattern already, so that only fc2 loses."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 64), nn.Linear(64, 16)
        self.fc1.weight.data *= 1 + 5 * (torch.arange(64) % 16 < 8)[:, None]
        self.fc1.weight.data[:, torch.arange(16) % 4 < 2] = 0

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x)))


@pytest.mark.parametrize("method", ["cast", "admm", "wanda"])
@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_groups_of_n_of_m_lose_less(method, pattern):
    torch.manual_seed(0)
    dense, x = nn.Sequential(Uneven(), Uneven()).eval(), torch.randn(512, 16)
    lost = {}
    for permute in (False, True):
        model = copy.deepcopy(dense)
        plan = prune_(model, 0.5, method, pattern, targets="*fc2.weight", calibration=x, permute=permute)
        plan.verify(model)
        assert plan.sparsity == 0.5
        lost[permute] = float((outputs(model, x) - outputs(dense, x)).square().mean())
    assert lost[True] == pytest.approx(lost[False])  # alone, fc2 has no partner that may move with it
    for permute in (False, True):
        model = copy.deepcopy(dense)
        prune_(model, 0.5, method, pattern, targets="*.weight", calibration=x, permute=permute).verify(model)
        lost[permute] = float((outputs(model, x) - outputs(dense, x)).square().mean())
    assert lost[True] < 0.9 * lost[False]


@pytest.mark.parametrize("method", ["admm", "sensitivity"])
def test_outputs_that_share_an_n_of_m_pattern(method):
    model = MODELS["timm vit"]()
    plan = prune_(model, 0.5, method, "2:4x4", calibration=IMAGES, permute=True)
    plan.verify(model)
    for weight in prunable_weights(model):
        zero = (weight.as_matrix() == 0).reshape(-1, 4, weight.shape[1])
        assert (zero == zero[:, :1]).all() and zero.reshape(-1, 4).sum(1).eq(2).all()


def test_bad_input_and_failures_change_nothing(monkeypatch):
    model = MODELS["timm vit"]()
    before = state(model)
    with pytest.raises(ValueError, match="permute: pattern 'unstructured' has no mini-blocks and no groups to fill"):
        prune_(model, 0.5, calibration=IMAGES, permute=True)
    with pytest.raises(ValueError, match=r"method 'row' with permute=True needs images; pass calibration="):
        prune_(model, 0.5, pattern="4x1", permute=True)
    with pytest.raises(TypeError, match="permute: expected a bool, 'blocks' or None, got int"):
        prune_(model, 0.5, pattern="4x1", calibration=IMAGES, permute=1)

    def fail(*args, **kwargs):
        assert not unchanged(model, before)  # it is permuted by now
        raise Injected

    monkeypatch.setattr(api, "make_masks", fail)
    with pytest.raises(Injected):
        prune_(model, 0.5, pattern="4x1", calibration=IMAGES, permute=True)
    assert unchanged(model, before) and waiting_threads() == 0


def test_auto_permutes_where_there_are_mini_blocks_to_fill():
    def permuted(pattern, method="auto", images=IMAGES, **how):
        return prune_(MODELS["timm vit"]().eval(), 0.5, method, pattern, calibration=images, **how).config.permute

    assert permuted("4x1") == permuted("1x2") == "blocks"  # features inside the model keep their order
    assert not permuted("4x1", permute=False) and not permuted("4x1", images=None)
    assert not permuted("unstructured") and not permuted("2:4") and not permuted("4x1", "sensitivity")
