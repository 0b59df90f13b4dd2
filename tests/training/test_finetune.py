"""finetune_ on tiny models: zeros after every step, the same bits after a resume, and every way it stops."""

import copy
import json
import logging
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from rmtkern.api import prune_
from rmtkern.training import loop
from rmtkern.training.config import FinetuneConfig
from rmtkern.training.ema import Ema
from rmtkern.training.loop import finetune_
from rmtkern.training.loss import REGULARISERS, objective
from rmtkern.training.report import FinetuneReport
from rmtkern.training.schedule import learning_rate


def dense(dropout=0.1):
    torch.manual_seed(1)
    layers = nn.Linear(6, 16), nn.GELU(), nn.LayerNorm(16), nn.Dropout(dropout), nn.Linear(16, 8), nn.GELU()
    return nn.Sequential(*layers, nn.Linear(8, 3))


def pruned(sparsity=0.6, **options):
    model = dense(**options)
    return model, prune_(model, sparsity, "uniform")


def data(count=48):
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(2))
    return x, x[:, :3].argmax(1)


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in two)


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.conv, self.norm = nn.Conv2d(2, 6, 2), nn.BatchNorm2d(6)
        self.attn = nn.MultiheadAttention(6, 2, batch_first=True)
        self.pos_embed = nn.Parameter(torch.ones(1, 4, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.norm(self.conv(x)).flatten(2).transpose(1, 2) + self.pos_embed
        return self.head(self.attn(x, x, x, need_weights=False)[0].mean(1))


class Watch:
    """After every optimizer step: weights, gradients, momentum and moments where the model was zero at the start."""

    def __init__(self, model):
        self.masks = {p: p.detach() == 0 for p in model.parameters() if p.ndim > 1}
        self.steps = 0

    def __enter__(self):
        self.handle = register_optimizer_step_post_hook(self.look)
        return self

    def __exit__(self, *_):
        self.handle.remove()

    def look(self, optimizer, args, kwargs):
        self.steps += 1
        for parameter, mask in self.masks.items():
            assert bool((parameter[mask] == 0).all()) and bool((parameter.grad[mask] == 0).all())
            for value in optimizer.state[parameter].values():
                if isinstance(value, torch.Tensor) and value.shape == mask.shape:
                    assert bool((value[mask] == 0).all()) and bool((value[~mask] != 0).any())


@settings(max_examples=25, deadline=None)
@given(
    optimizer=st.sampled_from(["adamw", "sgd"]),
    weight_decay=st.sampled_from([0.0, 0.5]),
    momentum=st.sampled_from([0.0, 0.9]),
    accumulate=st.sampled_from([1, 3]),
    clip=st.sampled_from([None, 0.01]),
    ema=st.sampled_from([0.0, 0.9]),
    autocast=st.sampled_from([None, "bfloat16"]),
    penalty=st.sampled_from([None, "l1", "l2", "group-lasso"]),
    pattern=st.sampled_from(["unstructured", "2:4", "4x1"]),
    with_plan=st.booleans(),
    with_teacher=st.booleans(),
)
def test_pruned_weights_are_zero_after_every_step(penalty, pattern, with_plan, with_teacher, **options):
    model = dense()
    plan = prune_(model, 0.5, "uniform", pattern, ignore="0")
    before = bits(model)
    options |= {"regulariser": penalty, "strength": 0.1 if penalty else 0.0}
    if options["optimizer"] == "sgd" and options["momentum"] == 0:
        options["momentum"] = 0.5  # plain SGD keeps no state that could be looked at
    with Watch(model) as watch:
        report = finetune_(
            model, plan if with_plan else None, data(), lr=0.05, epochs=2, batch_size=8, holdout=0,
            teacher=dense() if with_teacher else None, **options,
        )  # fmt: skip
    plan.verify(model)
    assert report.steps == watch.steps == 2 * math.ceil(6 / options["accumulate"])
    assert report.held.zeros == plan.selected.zeros
    assert not torch.equal(model[4].weight, before["4.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_convolutions_attention_and_dtypes(dtype):
    model = Conv().to(dtype)
    plan = prune_(model, 0.5, "uniform", targets="all")
    images = torch.randn(24, 2, 3, 3), torch.arange(24) % 3
    with Watch(model) as watch:
        report = finetune_(model, plan, images, lr=0.01, epochs=2, batch_size=8, ema=0.5)
    assert watch.steps == report.steps == 6 and report.held.zeros == plan.selected.zeros
    for weight, mask in watch.masks.items():
        assert bool((weight[mask] == 0).all())
    assert int(model.norm.num_batches_tracked) == 3 * report.best_epoch  # buffers belong to the state that is kept


def test_a_nan_gradient_of_a_pruned_weight_is_masked():
    model, plan = pruned(dropout=0.0)
    masks = loop.Masks.of(model, plan)
    model[0].weight.grad = torch.where(model[0].weight == 0, torch.nan, 1.0)
    masks.hold_gradients_()
    assert torch.equal(model[0].weight.grad, (model[0].weight != 0).float())


def test_what_writes_into_a_pruned_weight_is_found():
    model, plan = pruned()
    mine = bits(model)

    def write(module, args):
        if module.training:
            with torch.no_grad():
                module.weight[module.weight == 0] = 1e-30

    model[4].register_forward_pre_hook(write)
    with pytest.raises(RuntimeError, match=r"4\.weight: \d+ pruned weights are not 0 after epoch 1, step 1, though"):
        finetune_(model, plan, data())
    assert same(mine, bits(model))


def test_state_of_the_optimizer_is_checked():
    model, plan = pruned()
    masks = loop.Masks.of(model, plan)
    optimizer = torch.optim.AdamW(model.parameters())
    model(data()[0]).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"0\.weight: \d+ pruned entries of the optimizer's exp_avg are not 0 there"):
        masks.check_state(optimizer, "there")


def test_only_matrices_are_decayed():
    model = Conv()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim > 1 or parameter is model.norm.weight)
    x, y = torch.zeros(8, 2, 3, 3), torch.zeros(8, dtype=torch.long)
    nn.init.zeros_(model.head.weight)  # no gradient reaches what is below it in the first step
    before = bits(model)
    finetune_(model, None, (x, y), epochs=1, lr=0.1, weight_decay=1.0, holdout=0, warmup=0, optimizer="sgd")
    torch.testing.assert_close(model.conv.weight.data, 0.9 * before["conv.weight"])
    torch.testing.assert_close(model.attn.in_proj_weight.data, 0.9 * before["attn.in_proj_weight"])
    for name in ("pos_embed", "norm.weight", "norm.bias"):
        assert torch.equal(model.state_dict()[name], before[name])


def test_accumulated_batches_are_one_large_batch():
    found = []
    for batch_size, accumulate in ((24, 1), (5, 5)):  # 24 = 5 + 5 + 5 + 5 + 4
        model, plan = pruned(dropout=0.0)
        finetune_(
            model.double(), plan, data(24), batch_size=batch_size, accumulate=accumulate, holdout=0, lr=0.01, epochs=3
        )
        found.append(bits(model))
    for name in found[0]:  # float64 sums in another order; a step is 1e-2 long
        torch.testing.assert_close(found[0][name], found[1][name], atol=1e-10, rtol=0)


@pytest.mark.parametrize("options", [{"ema": 0.8}, {"optimizer": "sgd", "momentum": 0.9}, {"autocast": "bfloat16"}])
@pytest.mark.parametrize("after", [1, 2])
def test_a_resumed_run_has_the_same_bits(tmp_path, monkeypatch, options, after):
    options = {"epochs": 3, "lr": 0.02, "batch_size": 8, "seed": 5, "holdout": 0.2, "accumulate": 2, **options}
    path = tmp_path / "run.safetensors"
    model, plan = pruned()
    whole = finetune_(model, plan, data(), teacher=dense(), **options)

    other, _ = pruned()
    original = loop.seed_epoch

    def interrupt(seed, epoch, rank):
        if epoch == after + 1:
            raise KeyboardInterrupt
        original(seed, epoch, rank)

    monkeypatch.setattr(loop, "seed_epoch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        finetune_(other, plan, data(), teacher=dense(), checkpoint=path, resume=True, **options)
    plan.verify(other)
    monkeypatch.setattr(loop, "seed_epoch", original)
    torch.manual_seed(99)  # what ran in between must not matter
    third, _ = pruned()
    report = finetune_(third, plan, data(), teacher=dense(), checkpoint=path, resume=True, **options)
    assert same(bits(third), bits(model))
    timeless = [[replace(row, seconds=0) for row in one.epochs] for one in (report, whole)]
    assert timeless[0] == timeless[1] and report.best_epoch == whole.best_epoch and report.steps == whole.steps

    again = finetune_(other, plan, data(), teacher=dense(), checkpoint=path, resume=True, **options)
    assert same(bits(other), bits(model)) and again == report  # a finished run only gives back its result


def test_a_resumed_loader_with_a_generator_has_the_same_bits(tmp_path):
    def loader():
        dataset = TensorDataset(*data())
        return DataLoader(dataset, 8, shuffle=True, generator=torch.Generator().manual_seed(7))

    options = {"epochs": 2, "lr": 0.02, "checkpoint": tmp_path / "run.safetensors"}
    model, plan = pruned()
    finetune_(model, plan, loader(), **options)

    class Twice(Exception):
        pass

    def limited(self, path, save=loop._Run._save):
        save(self, path)
        raise Twice

    other, _ = pruned()
    options["checkpoint"] = tmp_path / "other.safetensors"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Twice):
        patch.setattr(loop._Run, "_save", limited)
        finetune_(other, plan, loader(), **options)
    finetune_(other, plan, loader(), resume=True, **options)
    assert same(bits(other), bits(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"lr": 0.5},
            r"is of another run: its config is {'lr': [^,]*}, here it is {'lr': 0.5}",
        ),
        ({"train": data(40)}, "its number of steps per epoch is 6, here it is 5"),
        ({"teacher": dense()}, "its teacher is False, here it is True"),
        ({"model": pruned(0.3)}, r"its zeros \(as a hash\) is"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, message):
    path = tmp_path / "run.safetensors"
    model, plan = pruned()
    options = {"epochs": 1, "batch_size": 8, "holdout": 0.0}
    finetune_(model, plan, data(), checkpoint=path, **options)
    model, plan = change.pop("model", pruned())
    mine = bits(model)
    with pytest.raises(ValueError, match=message):
        finetune_(model, plan, change.pop("train", data()), checkpoint=path, resume=True, **{**options, **change})
    assert same(mine, bits(model))


def test_checkpoint_files_that_do_not_fit_are_refused(tmp_path):
    model, plan = pruned()
    path = tmp_path / "run.safetensors"
    with pytest.raises(ValueError, match=r"resume=True needs checkpoint="):
        finetune_(model, plan, data(), resume=True)
    with pytest.raises(ValueError, match=r"no such folder to write run\.safetensors into"):
        finetune_(model, plan, data(), checkpoint=tmp_path / "none" / "run.safetensors")
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"exists; pass resume=True"):
        finetune_(model, plan, data(), checkpoint=path)
    with pytest.raises(ValueError, match="not a checkpoint of finetune_"):
        finetune_(model, plan, data(), checkpoint=path, resume=True)
    path.write_bytes(b"torn")
    with pytest.raises(ValueError, match="not a safetensors file"):
        finetune_(model, plan, data(), checkpoint=path, resume=True)


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    found = []
    for seed in (0, 0, 1):
        model, plan = pruned()
        finetune_(model, plan, data(), seed=seed, lr=0.01, epochs=1, holdout=0)
        found.append(bits(model))
    assert same(found[0], found[1]) and not same(found[0], found[2])


def test_gradients_from_before_do_not_count():
    found = []
    for stale in (False, True):
        model, plan = pruned()
        if stale:
            model(data()[0]).sum().backward()
        torch.manual_seed(0)
        finetune_(model, plan, data(), lr=0.01, epochs=1, holdout=0)
        found.append(bits(model))
    assert same(found[0], found[1])


def test_generators_modes_and_gradients_are_left_as_they_were():
    model, plan = pruned()
    teacher = dense()
    model.eval()
    model[3].train()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    finetune_(model, plan, data(), teacher=teacher, epochs=1)
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]
    assert np.random.get_state()[1].tolist() == state[2]
    assert [module.training for module in model.modules()] == modes and teacher.training
    assert all(p.grad is None for p in [*model.parameters(), *teacher.parameters()])
    assert same(bits(teacher), bits(dense()))


def test_early_stop_keeps_the_best_epoch():
    x, y = data()
    held_out = x[:16], (y[:16] + 1) % 3  # the opposite of what is trained: it only gets worse
    model, plan = pruned()
    before = bits(model)
    report = finetune_(model, plan, (x, y), held_out=held_out, epochs=6, patience=2, lr=0.05)
    assert report.best_epoch == 0 and len(report.epochs) == 3 and same(before, bits(model))
    assert report.stopped == "after epoch 2, as the held-out loss was lowest in epoch 0"
    report = finetune_(model, plan, (x, y), epochs=6, patience=2, lr=0.01, holdout=0.25)
    assert report.stopped is None and len(report.epochs) == 7 and report.best_epoch == 6
    assert report.epochs[6].held_out_accuracy > report.epochs[0].held_out_accuracy


def test_the_kept_state_is_the_one_that_was_scored():
    x, y = data()
    model, plan = pruned()
    report = finetune_(model, plan, (x, y), held_out=(x, y), epochs=3, lr=0.05, ema=0.9, label_smoothing=0.0)
    row = report.epochs[report.best_epoch]
    with torch.no_grad():
        logits = model.eval()(x)
    assert row.held_out_accuracy == float((logits.argmax(1) == y).float().mean())
    assert row.held_out_loss == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-5)


@pytest.mark.parametrize("when", [1, 2])
def test_nan_stops_and_restores(caplog, when):
    x, y = data()
    model, plan = pruned()
    expected, _ = pruned()
    batches = [(x[at : at + 8], y[at : at + 8]) for at in range(0, 48, 8)]
    options = {"lr": 0.02, "holdout": 0.0, "warmup": 0.0, "floor": 1.0}  # a constant rate, whatever the epochs
    if when == 2:
        finetune_(expected, plan, batches, epochs=1, **options)

    class Poisoned(list):
        epoch = 0

        def __iter__(self):
            self.epoch += 1
            for at, (images, labels) in enumerate(list.__iter__(self)):
                yield (images * float("nan") if (self.epoch, at) == (when, 2) else images), labels

    with caplog.at_level(logging.WARNING):
        report = finetune_(model, plan, Poisoned(batches), epochs=3, **options)
    assert report.stopped.startswith(f"epoch {when}, step 3: loss nan, length of the gradient nan; the model has the")
    assert f"state of epoch {when - 1}" in report.stopped and report.stopped in caplog.text
    assert report.best_epoch == when - 1 and len(report.epochs) == when and same(bits(model), bits(expected))
    assert "stopped: epoch" in str(report)
    plan.verify(model)


def test_regularisers_are_what_they_say():
    w = torch.randn(5, 7, dtype=torch.float64)
    w[1] = 0
    w[2, :3] = 0
    expected = {
        "l1": sum(abs(v) for v in w.flatten().tolist()),
        "l2": sum(v * v for v in w.flatten().tolist()),
        "group-lasso": sum(math.sqrt(7) * math.sqrt(sum(v * v for v in row)) for row in w.tolist()),
    }
    assert expected.keys() == REGULARISERS.keys()
    for name, regulariser in REGULARISERS.items():
        assert float(regulariser.value(w)) == pytest.approx(expected[name], rel=1e-12)
        leaf = w.clone().requires_grad_()
        regulariser.value(leaf).backward()
        torch.testing.assert_close(regulariser.gradient(w), leaf.grad, atol=1e-12, rtol=0)
        assert bool((regulariser.gradient(w)[w == 0] == 0).all())


@pytest.mark.parametrize("name", REGULARISERS)
def test_a_regulariser_shrinks_the_weights(name):
    found = []
    for strength in (0.0, 0.1):
        model, plan = pruned()
        given = {"regulariser": name, "strength": strength} if strength else {}
        report = finetune_(model, plan, data(), lr=0.02, epochs=3, holdout=0, weight_decay=0.0, **given)
        found.append(sum(float(p.detach().abs().sum()) for p in model.parameters() if p.ndim > 1))
    assert found[1] < 0.9 * found[0]
    weights = [p.detach() for p in model.parameters() if p.ndim > 1]
    assert report.epochs[-1].penalty == pytest.approx(0.1 * sum(float(REGULARISERS[name].value(w)) for w in weights))


def test_objective_against_its_definition(rng):
    logits, teacher = (torch.from_numpy(rng.normal(size=(4, 5))) for _ in range(2))
    labels = torch.tensor([0, 4, 2, 2])

    def softmax(z):
        e = np.exp(z - z.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    p, q = softmax(teacher.numpy() / 3), softmax(logits.numpy() / 3)
    kl = 9 * (p * np.log(p / q)).sum(1).mean()
    target = 0.9 * np.eye(5)[labels] + 0.1 / 5
    ce = -(target * np.log(softmax(logits.numpy()))).sum(1).mean()
    options = {"smoothing": 0.1, "distill": 0.3, "temperature": 3.0}
    for parts, expected in [
        ((labels, teacher), 0.7 * ce + 0.3 * kl),
        ((labels, None), ce),
        ((None, teacher), kl),
    ]:
        assert float(objective(logits, *parts, **options)) == pytest.approx(expected, rel=1e-12)


@given(steps=st.integers(1, 200), warmup=st.floats(0, 0.99), floor=st.floats(0, 1))
def test_learning_rate_rises_then_falls(steps, warmup, floor):
    rates = [learning_rate(i, steps, peak=2.0, warmup=warmup, floor=floor) for i in range(steps)]
    warm = round(warmup * steps)
    assert rates[:warm] == sorted(rates[:warm]) and rates[warm:] == sorted(rates[warm:], reverse=True)
    assert all(0 < rate <= 2 for rate in rates) and all(rate >= 2 * floor - 1e-12 for rate in rates[warm:])
    if warm < steps:
        assert rates[warm] == 2


def test_ema_is_the_average_and_trades_places():
    layer = nn.Linear(3, 2, bias=False)
    start = layer.weight.detach().clone()
    ema = Ema({"weight": layer.weight}, 0.6)
    expected = start.clone()
    for step in range(8):
        layer.weight.data += 1
        ema.update(step)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * (start + step + 1)
    own = layer.weight.detach().clone()
    with ema.in_place():
        torch.testing.assert_close(layer.weight.data, expected)
        assert torch.equal(ema.averages["weight"], own)
    assert torch.equal(layer.weight.data, own)


class Keyworded(nn.Module):
    """As in transformers: keyword arguments in, an object with logits out."""

    def __init__(self):
        super().__init__()
        self.body = dense(dropout=0.0)

    def forward(self, pixel_values, scale=None):
        return type("Output", (), {"logits": self.body(pixel_values * (1 if scale is None else scale))})()


def test_every_kind_of_batch_trains_alike():
    x, y = data()
    parts = [(x[at : at + 8], y[at : at + 8]) for at in range(0, 48, 8)]
    kinds = {
        "tuples": parts,
        "lists": [list(part) for part in parts],
        "loader": DataLoader(TensorDataset(x, y), 8),
        "int32": [(a, b.int()) for a, b in parts],
        "mappings": [{"pixel_values": a, "labels": b, "scale": 1} for a, b in parts],
        "label": [{"pixel_values": a, "label": b} for a, b in parts],
        "mapping and labels": [({"pixel_values": a}, b) for a, b in parts],
    }
    found = []
    for kind, batches in kinds.items():
        model = Keyworded()
        plan = prune_(model, 0.5, "uniform", targets="*")
        body = model if "pixel_values" in str(batches)[:40] else model.body
        finetune_(body, plan if body is model else None, batches, epochs=1, lr=0.01, holdout=0)
        found.append(bits(model))
        assert same(found[0], found[-1]), kind
    assert not torch.equal(found[0]["body.0.bias"], dense()[0].bias)


def test_data_without_labels_are_distilled():
    x, _ = data()
    outcomes = []
    for train in (x, (x,), list(x.split(16)), DataLoader(TensorDataset(x), 16)):
        model, plan = pruned()
        report = finetune_(model, plan, train, teacher=dense(), epochs=4, lr=0.02, batch_size=16, holdout=0.34)
        outcomes.append(report.epochs[-1].held_out_loss / report.epochs[0].held_out_loss)
        assert report.epochs[-1].held_out_accuracy is None
    assert max(outcomes) < 0.8
    with pytest.raises(ValueError, match="the data have no labels; give labels, or teacher="):
        finetune_(model, plan, x)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_loader_is_split_by_images(shuffle):
    x, y = data()
    x[:, 0] = torch.arange(48)
    seen = {"train": [], "held out": []}
    model = dense()

    def note(module, args):
        seen["train" if module.training else "held out"].append(args[0][:, 0].tolist())

    model.register_forward_pre_hook(note)
    finetune_(model, None, DataLoader(TensorDataset(x, y), 8, shuffle=shuffle), epochs=2, holdout=0.25)
    train, held = ({int(v) for batch in batches for v in batch} for batches in seen.values())
    assert len(train) == 36 and len(held) == 12 and not train & held
    assert seen["held out"][:2] == seen["held out"][2:4]
    assert (seen["train"][:5] == seen["train"][5:]) == (not shuffle)


def test_a_distributed_sampler_moves_on_and_keeps_its_part():
    sampler = DistributedSampler(TensorDataset(*data()), 2, 1, seed=3)
    loader = DataLoader(sampler.dataset, 8, sampler=sampler)
    train, held = loop.split(loader, None, fraction=0.25, batch_size=1, seed=0, ranks=loop.Ranks())
    assert len(train) == 3 and len(held) == 1  # 36 and 12 images over two ranks
    first, second = (torch.cat([x for x, _ in train.epoch(epoch)]) for epoch in (1, 2))
    assert first.shape == second.shape == (18, 6) and not torch.equal(first, second)


def test_teacher_from_a_file(tmp_path):
    save_file(bits(dense()), tmp_path / "dense.safetensors")
    found = []
    for teacher in (dense(), tmp_path / "dense.safetensors", str(tmp_path / "dense.safetensors")):
        model, plan = pruned()
        finetune_(model, plan, data(), teacher=teacher, epochs=1, lr=0.01)
        found.append(bits(model))
    assert same(found[0], found[1]) and same(found[0], found[2])
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not fit the teacher"):
        finetune_(model, plan, data(), teacher=tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"none\.safetensors: no such file"):
        finetune_(model, plan, data(), teacher=tmp_path / "none.safetensors")


def test_distillation_pulls_towards_the_teacher():
    x, y = data()
    distances = []
    for distill in (0.0, 1.0):
        model, plan = pruned(dropout=0.0)
        finetune_(model, plan, (x, y), teacher=dense(dropout=0.0), distill=distill, epochs=10, lr=0.02, holdout=0)
        with torch.no_grad():
            distances.append(float((model(x) - dense(dropout=0.0)(x)).square().mean()))
    assert distances[1] < 0.5 * distances[0]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs: expected at least 1, got 0"),
        ({"epochs": 1.5}, TypeError, "epochs: expected an int, got float"),
        ({"accumulate": True}, TypeError, "accumulate: expected an int, got bool"),
        ({"lr": 0}, ValueError, "lr: expected a finite number > 0, got 0"),
        ({"lr": math.nan}, ValueError, "lr: expected a finite number > 0, got nan"),
        ({"lr": "1e-3"}, TypeError, "lr: expected a number, got str"),
        ({"weight_decay": -1}, ValueError, "weight_decay: expected a finite number >= 0"),
        ({"momentum": 1.0}, ValueError, r"momentum: expected a number in \[0, 1\)"),
        ({"warmup": 1.0}, ValueError, r"warmup: expected a fraction in \[0, 1\)"),
        ({"distill": 1.1}, ValueError, r"distill: expected a fraction in \[0, 1\], got 1.1"),
        ({"clip": 0}, ValueError, "clip: expected a finite number > 0, or None"),
        ({"ema": 1}, ValueError, "ema: expected a decay"),
        ({"holdout": -0.1}, ValueError, "holdout: expected a fraction"),
        ({"optimizer": "lion"}, ValueError, "unknown optimizer 'lion'; expected one of adamw, sgd"),
        ({"optimizer": None}, TypeError, "optimizer: expected a string, got NoneType"),
        ({"autocast": "float16"}, ValueError, "unknown autocast 'float16'; expected one of bfloat16"),
        ({"regulariser": "l3"}, ValueError, "unknown regulariser 'l3'; expected one of l1, l2, group-lasso"),
        ({"regulariser": "l1"}, ValueError, "expected both or neither"),
        ({"strength": 1.0}, ValueError, "expected both or neither"),
        ({"patience": 2}, ValueError, "patience: expected less than epochs = 2, got 2"),
        ({"rate": 1}, TypeError, "unknown field 'rate'; expected one of epochs, lr"),
        ({"config": 3}, TypeError, "config: expected a FinetuneConfig, got int"),
        ({"config": FinetuneConfig(), "lr": 1.0}, TypeError, "got a FinetuneConfig and lr; put everything"),
        ({"patience": 1, "holdout": 0}, ValueError, "stopping early needs held-out data"),
        ({"teacher": 3}, TypeError, "teacher: expected a module or a path, got int"),
        ({"teacher": nn.Linear(6, 2)}, ValueError, r"teacher: expected logits \(2, 3\) as the model's, got \(2, 2\)"),
        ({"holdout": 0.99}, ValueError, "cannot hold out 48 of 48 images"),
    ],
)
def test_bad_settings(fields, error, message):
    model, plan = pruned()
    mine = bits(model)
    with pytest.raises(error, match=message):
        finetune_(model, plan, data(), **fields)
    assert same(mine, bits(model))


X, Y = data(8)


@pytest.mark.parametrize(
    ("train", "error", "message"),
    [
        (3, TypeError, r"train_loader: expected a tensor, a pair \(images, labels\) or a loader of batches, got int"),
        ((X, Y[:4]), ValueError, r"train_loader: expected images \[B, ...\] and labels \[B\], got \(8, 6\) and \(4,\)"),
        ((X[:0], Y[:0]), ValueError, "expected at least one image for each process"),
        ([], ValueError, "train_loader: expected at least one batch, got none"),
        (((X, Y) for _ in range(2)), TypeError, "expected a loader with a length"),
        ([(X, Y)], ValueError, "cannot hold out data of 1 batch"),
        (DataLoader(TensorDataset(X, Y), batch_sampler=[[0], [1]]), ValueError, "a sampler or a data set of its own"),
        ([(X, Y, Y)] * 2, TypeError, "or mappings of tensors, got tuple of 3"),
        (["ab", "cd"], TypeError, "or mappings of tensors, got str"),
        ([(X, Y.float())] * 2, TypeError, "labels: expected a tensor of integer class numbers, got torch.float32"),
        ([(X, [1, 2])] * 2, TypeError, "integer class numbers, got list"),
        ([(X, Y[:3])] * 2, ValueError, r"labels: expected shape \(8,\), one per image, got \(3,\)"),
        ([(X, Y + 2)] * 2, ValueError, r"labels must lie in 0\.\.2, got 2\.\.3; number the classes"),
    ],
)
def test_bad_data(train, error, message):
    model, plan = pruned()
    mine = bits(model)
    with pytest.raises(error, match=message):
        finetune_(model, plan, train)
    assert same(mine, bits(model))


def test_a_set_of_batches_cannot_be_held_out_from():
    class Bare:
        def __len__(self):
            return 2

        def __iter__(self):
            return iter([(X, Y)])

    model, plan = pruned()
    with pytest.raises(ValueError, match="cannot hold out a part of a Bare; pass held_out="):
        finetune_(model, plan, Bare())
    with pytest.raises(ValueError, match="epoch 1 ended after 1 of 2 steps"):
        finetune_(model, plan, Bare(), holdout=0)


def test_bad_models():
    model, plan = pruned()
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got dict"):
        finetune_({}, plan, data())
    with pytest.raises(ValueError, match="differ from the plan; load the checkpoint"):
        finetune_(dense(), plan, data())
    with pytest.raises(ValueError, match="shares parameters with the model"):
        finetune_(model, plan, data(), teacher=model)
    with pytest.raises(ValueError, match=r"is float16, whose gradients underflow; call model\.float\(\)"):
        finetune_(copy.deepcopy(model).half(), plan, data())
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        finetune_(copy.deepcopy(model).requires_grad_(False), plan, data())
    broken = copy.deepcopy(model)
    broken[4].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"4\.weight has NaN or Inf"):
        finetune_(broken, None, data())


def test_bfloat16_weights_are_warned_about(caplog):
    model = pruned()[0]
    with caplog.at_level(logging.WARNING):
        finetune_(model.bfloat16(), None, data(), epochs=1)
    assert "bfloat16 weights lose updates" in caplog.text


def test_config_and_report_as_json():
    config = FinetuneConfig(epochs=2, lr=0.01, clip=None, regulariser="l1", strength=1e-4, patience=1)
    assert FinetuneConfig.from_json(config.to_json()) == config
    model, plan = pruned()
    report = finetune_(model, plan, data(), config=config)
    assert report.config == config and FinetuneReport.from_json(report.to_json()) == report
    assert json.loads(report.to_json())["held"]["zeros"] == plan.selected.zeros
    text = str(report)
    assert f"kept: epoch {report.best_epoch}" in text and "held-out top-1 %" in text and "held at 0: 59.82 % (1" in text
    assert report.seconds == sum(row.seconds for row in report.epochs)
    with pytest.raises(ValueError, match="not the JSON of a FinetuneConfig"):
        FinetuneConfig.from_json('{"rate": 1}')
    with pytest.raises(ValueError, match="not the JSON of a FinetuneReport"):
        FinetuneReport.from_json("{}")
