"""finetune_: the loop over epochs and steps, what is kept, and what happens when a loss is NaN.

The parts know nothing of each other: masks, schedule, loss, batches, ranks, checkpoint. It knows no kernel.
"""

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rmtkern.loading import load_state_
from rmtkern.models import PrunableWeight, check_values, prunable_weights
from rmtkern.progress import progress
from rmtkern.pruning.bulk import cut_bulk, share_kept
from rmtkern.pruning.plan import PrunePlan
from rmtkern.ranks import Ranks
from rmtkern.spectral_linear import merge_factors_
from rmtkern.training.batches import Batch, read_batch, rng_kept, seed_epoch, split
from rmtkern.training.checkpoint import optimizer_tensors, read_run, restore_, restore_optimizer_, save_run
from rmtkern.training.config import FinetuneConfig
from rmtkern.training.ema import Ema
from rmtkern.training.loss import REGULARISERS, objective
from rmtkern.training.masks import Masks
from rmtkern.training.ranks import full, gradients_travel, is_sharded, local, reshard, wrap
from rmtkern.training.report import Epoch, FinetuneReport
from rmtkern.training.schedule import learning_rate

__all__ = ["finetune_"]

_log = logging.getLogger(__name__)


def finetune_(
    model: nn.Module,
    plan: PrunePlan | None,
    train_loader: Any,
    *,
    held_out: Any = None,
    teacher: nn.Module | str | Path | None = None,
    config: FinetuneConfig | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    show_progress: bool | None = None,
    **fields: Any,
) -> FinetuneReport:
    """Train the surviving weights of a pruned classifier, in place; pruned weights are exactly 0 after every step.

    The model ends with the state that was best on held-out data: the one before training, or that of an epoch. If
    anything fails, or if the loss becomes NaN or infinite, it has the best state so far as well. With several
    processes, call torch.distributed.init_process_group() first and this on every rank: a plain module is put into
    DistributedDataParallel, one that is in it already or that was sharded with fully_shard stays so.

    Args:
        model: maps a batch to logits [B, classes], or to an object with `.logits`; float32, float64 or bfloat16.
        plan: from prune_, checked against the model; None: every weight of a Linear, Conv2d or attention that is
            zero now is held.
        train_loader: images [B, ...], a pair (images, labels [B] int64), or a loader with a length whose batches are
            tensors, (inputs, labels), or mappings of keyword arguments with the labels under "labels" or "label". Data
            without labels need a teacher. On several ranks a loader gives each its own part (DistributedSampler);
            tensors are divided here.
        held_out: the same kinds, to choose the best state; None: config.holdout of `train_loader` is taken away from
            it, with its augmentation.
        teacher: the dense model to distil from; or the path of its safetensors, read into a copy of `model`.
        config: all settings; then none of `fields` may be given.
        checkpoint: file that holds the whole run after every epoch (safetensors).
        resume: go on from `checkpoint` if that file exists; the result has the bits of an uninterrupted run, if
            the loader keeps no state between epochs but its `generator` and `sampler`.
        show_progress: progress bar; None: only on a terminal.
        fields: of FinetuneConfig, such as epochs=3.

    Returns:
        The report: a row for each epoch, which one was kept, and why it stopped if it did.

    Raises:
        TypeError: an argument of the wrong type, an unknown field, or batches of a wrong kind.
        ValueError: a value out of range; zeros that are not the plan's; no data; labels outside the classes; a teacher
            or checkpoint that does not fit; float16 weights; ranks that see different numbers of batches.
        RuntimeError: something else wrote into a pruned weight; says which, and after which epoch and step.
        PackedModelError: the model is packed.
    """
    config = _config(config, fields)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    path = None if checkpoint is None else Path(checkpoint)
    _check_checkpoint(path, resume)
    ranks = Ranks.current()
    with rng_kept(), _restored(model, teacher):
        run = _Run(model, plan, train_loader, held_out, teacher, config, ranks, show_progress)
        if path is not None and resume and path.is_file():
            run.read(path)
        return run.run(path)


def _config(config: FinetuneConfig | None, fields: Mapping[str, Any]) -> FinetuneConfig:
    known = FinetuneConfig.__dataclass_fields__
    unknown = [name for name in fields if name not in known]
    if unknown:
        raise TypeError(f"finetune_: unknown field {unknown[0]!r}; expected one of {', '.join(known)}")
    if config is None:
        return FinetuneConfig(**fields)
    if not isinstance(config, FinetuneConfig):
        raise TypeError(f"config: expected a FinetuneConfig, got {type(config).__name__}")
    if fields:
        raise TypeError(
            f"finetune_: got a FinetuneConfig and {', '.join(fields)}; put everything into the FinetuneConfig"
        )
    return config


def _check_checkpoint(path: Path | None, resume: bool) -> None:
    if path is None:
        if resume:
            raise ValueError("resume=True needs checkpoint=, the file of the run to go on with")
        return
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent}: no such folder to write {path.name} into; create it first")
    if path.exists() and not resume:
        raise ValueError(f"{path} exists; pass resume=True to go on from it, or remove it")


@contextmanager
def _restored(*models: Any) -> Iterator[None]:
    """Afterwards every module is in train or eval mode as it was, and the models have no gradients."""
    modes = {part: part.training for model in models if isinstance(model, nn.Module) for part in model.modules()}
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
        for parameter in models[0].parameters():
            parameter.grad = None


class _NotFinite(Exception):
    """A loss or gradient that is NaN or infinite; the message says where."""


class _Run:
    """One call of finetune_: the live objects, and how far it is."""

    def __init__(
        self,
        model: nn.Module,
        plan: PrunePlan | None,
        train: Any,
        held_out: Any,
        teacher: nn.Module | str | Path | None,
        config: FinetuneConfig,
        ranks: Ranks,
        show_progress: bool | None,
    ) -> None:
        self.config, self.ranks = config, ranks
        self.show = show_progress if ranks.rank == 0 else False
        bare = wrap(model, Ranks())[1]
        weights = prunable_weights(bare, "all")
        self.parameters = {name: p for name, p in bare.named_parameters() if p.requires_grad}
        _check_parameters(bare, weights, self.parameters)
        self.train, self.held_out = split(
            train, held_out, fraction=config.holdout, batch_size=config.batch_size, seed=config.seed, ranks=ranks
        )
        if config.patience is not None and self.held_out is None:
            raise ValueError("patience: stopping early needs held-out data; pass held_out=, or holdout= a fraction > 0")
        first = next(iter(self.parameters.values()))
        self.device, self.dtype = local(first).device, first.dtype
        for what, source in (("train_loader", self.train), ("held_out", self.held_out)):
            if source is not None and ranks.differ(len(source), self.device):
                raise ValueError(f"{what}: the processes have different numbers of batches (this one {len(source)})")
        self.teacher = _teacher(teacher, bare)
        self.model, self.bare = wrap(model, ranks)  # from here on the parameters of all ranks are equal
        self.masks = Masks.of(bare, plan)
        self.regularised = [weight for weight in weights if weight.parameter.requires_grad]
        self.optimizer = _optimizer(config, self.parameters, {id(weight.parameter) for weight in weights})
        self.optimizer.zero_grad()  # gradients from before do not count
        if config.cut_every is not None and any(is_sharded(weight.parameter) for weight in self.regularised):
            raise ValueError("cut_every: the weights are sharded, and a spectrum needs whole ones; take cut_every=None")
        self.ema = Ema(self.parameters, config.ema) if config.ema else None
        self.state = {**self.parameters, **dict(bare.named_buffers())}
        self.steps_per_epoch = -(-len(self.train) // config.accumulate)
        self.rows: list[Epoch] = []
        self.step = self.best_epoch = 0
        self.best = self._state()
        self.stopped: str | None = None

    def run(self, path: Path | None) -> FinetuneReport:
        """All epochs that are left; the model has the best state afterwards, whatever happens."""
        try:
            if not self.rows:
                start = time.perf_counter()
                held = self._score()
                self.rows.append(Epoch(0, None, self._penalty(), *held, None, time.perf_counter() - start))
            while len(self.rows) <= self.config.epochs and self.stopped is None:
                self._finish(self._epoch(len(self.rows)))
                if path is not None:
                    self._save(path)
        except _NotFinite as error:
            self.stopped = f"{error}; the model has the state of epoch {self.best_epoch}"
            _log.warning("finetune_ stopped: %s", self.stopped)
        finally:
            restore_(self.state, self.best)
            reshard(self.bare)
        self.masks.check("in the state that was kept")
        return self._report()

    def read(self, path: Path) -> None:
        """Continue from a checkpoint, to the bit.

        Raises:
            ValueError: the checkpoint is of another run.
        """
        parts, facts = read_run(path)
        for name, mine in self._identity().items():
            theirs = facts["identity"][name]
            if theirs == mine:
                continue
            if isinstance(mine, dict) and isinstance(theirs, dict):  # what differs is enough
                keys = [key for key in mine | theirs if mine.get(key) != theirs.get(key)]
                mine, theirs = ({key: part.get(key) for key in keys} for part in (mine, theirs))
            raise ValueError(
                f"{path} is of another run: its {name} is {theirs}, here it is {mine}; repeat the call of the first"
                " run, or give another checkpoint="
            )
        report = FinetuneReport.from_dict(facts["report"])
        self.rows, self.step, self.best_epoch = list(report.epochs), report.steps, report.best_epoch
        self.stopped = report.stopped
        restore_(self.state, parts["model"])
        restore_(self.best, parts["best"])
        restore_optimizer_(self.optimizer, self.parameters, parts.get("optimizer", {}))
        if self.ema is not None:
            restore_(self.ema.averages, parts["ema"])
        self.masks.check(f"in {path}")

    def _save(self, path: Path) -> None:
        parts: dict[str, Mapping[str, Tensor]] = {
            "model": self.state,
            "best": self.best,
            "optimizer": optimizer_tensors(self.optimizer, self.parameters),
            **({"ema": self.ema.averages} if self.ema is not None else {}),
        }
        save_run(path, parts, {"identity": self._identity(), "report": self._report().to_dict()}, self.ranks)

    def _identity(self) -> dict[str, Any]:
        """What must be equal in a run and in its continuation."""
        return {
            "config": asdict(self.config),
            "processes": self.ranks.world,
            "number of steps per epoch": self.steps_per_epoch,
            "zeros (as a hash)": self.masks.digest,
            "teacher": self.teacher is not None,
            "parameters and buffers": {name: list(tensor.shape) for name, tensor in self.state.items()},
        }

    def _report(self) -> FinetuneReport:
        return FinetuneReport(self.config, tuple(self.rows), self.best_epoch, self.step, self.masks.count, self.stopped)

    def _epoch(self, epoch: int) -> Epoch:
        """Train one epoch and score it."""
        start = time.perf_counter()
        seed_epoch(self.config.seed, epoch, self.ranks.rank)
        self.model.train()
        batches = self.train.epoch(epoch)
        summed, seen, lr = 0.0, 0, 0.0
        label = f"epoch {epoch}/{self.config.epochs}"
        for at in progress(range(1, self.steps_per_epoch + 1), label, show=self.show):
            group = [read_batch(batch, self.device, self.dtype) for batch in islice(batches, self.config.accumulate)]
            if not group:
                raise ValueError(f"train_loader: epoch {epoch} ended after {at - 1} of {self.steps_per_epoch} steps; "
                                 "expected a loader that gives as many batches as its length says")  # fmt: skip
            lr = self._rate()
            loss = self._step(group, lr, f"epoch {epoch}, step {at}")
            size = sum(batch.size for batch in group)
            summed, seen = summed + loss * size, seen + size
        self.masks.check_state(self.optimizer, f"after epoch {epoch}")
        total, count = self.ranks.total([summed, seen], self.device)
        cut = self._cut(epoch)
        held = self._score()
        if held[0] is not None and not math.isfinite(held[0]):
            raise _NotFinite(f"held-out loss {held[0]} after epoch {epoch}")
        return Epoch(epoch, total / count, self._penalty(), *held, lr, time.perf_counter() - start, cut)

    @torch.no_grad()
    def _cut(self, epoch: int) -> int | None:
        """Prune the spectra of the weights after this epoch; returns how many singular values went."""
        every = self.config.cut_every
        if every is None or epoch % every:
            return None
        keep, gone = share_kept(epoch, self.config.cut_until), 0
        for weight in self.regularised:
            found = [cut_bulk(weight.as_matrix()[rows], keep, gate=self.config.cut_gate)
                     for rows in weight.blocks().values()]  # fmt: skip
            gone += sum(count for _, count in found)
            weight.parameter.copy_(weight.to_parameter(torch.cat([block for block, _ in found])))
            _, mask = self.masks.held.get(weight.name, (None, None))
            if mask is not None:
                weight.parameter.masked_fill_(mask, 0)
            self.ranks.share_(weight.parameter)
        return gone

    def _rate(self) -> float:
        config = self.config
        steps = config.epochs * self.steps_per_epoch
        return learning_rate(self.step, steps, peak=config.lr, warmup=config.warmup, floor=config.floor)

    def _step(self, group: list[Batch], lr: float, where: str) -> float:
        """One optimizer step over the batches of a group; returns their mean loss."""
        size = sum(batch.size for batch in group)
        mean = 0.0
        for index, batch in enumerate(group):
            with gradients_travel(self.model, index == len(group) - 1):
                share = self._loss(self.model, batch)[0] * (batch.size / size)
                share.backward()
            mean += float(share.detach())
        self._add_penalty_gradient()
        self.masks.hold_gradients_()
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = float(full(torch.nn.utils.get_total_norm(gradients)))
        self._refuse_not_finite(mean, norm, where)
        if self.config.clip is not None and norm > self.config.clip:
            for gradient in gradients:
                local(gradient).mul_(self.config.clip / norm)
        for options in self.optimizer.param_groups:
            options["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.step)
        self.step += 1
        self.masks.check(f"after {where}")
        return mean

    def _refuse_not_finite(self, loss: float, norm: float, where: str) -> None:
        """Raise _NotFinite on all ranks if one has a loss or gradient that is NaN or infinite."""
        wrong = not (math.isfinite(loss) and math.isfinite(norm))
        if self.ranks.total([wrong], self.device)[0]:
            here = f"loss {loss:.4g}, length of the gradient {norm:.4g}"
            raise _NotFinite(f"{where}: {here}" if wrong else f"{where}: not finite on another process")

    def _loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The objective without the regulariser, and the logits."""
        config = self.config
        if batch.labels is None and self.teacher is None:
            raise ValueError("train_loader: the data have no labels; give labels, or teacher= to distil from")
        cast: Any = nullcontext()
        if config.autocast is not None:
            cast = torch.autocast(self.device.type, getattr(torch, config.autocast))
        wanted = None
        with cast:
            if self.teacher is not None and (config.distill > 0 or batch.labels is None):
                with torch.no_grad():
                    wanted = replace(batch, labels=None).logits(self.teacher)
            logits = batch.logits(model)
        if wanted is not None and wanted.shape != logits.shape:
            raise ValueError(
                f"teacher: expected logits {tuple(logits.shape)} as the model's, got {tuple(wanted.shape)}; give the "
                "dense model that was pruned"
            )
        options = {"smoothing": config.label_smoothing, "distill": config.distill, "temperature": config.temperature}
        return objective(logits, batch.labels, wanted, **options), logits

    @torch.no_grad()
    def _add_penalty_gradient(self) -> None:
        if self.config.regulariser is None:
            return
        gradient = REGULARISERS[self.config.regulariser].gradient
        for weight in self.regularised:
            if weight.parameter.grad is not None:
                more = weight.to_parameter(gradient(weight.as_matrix()))
                weight.parameter.grad.add_(more, alpha=self.config.strength)

    @torch.no_grad()
    def _penalty(self) -> float | None:
        if self.config.regulariser is None:
            return None
        value = REGULARISERS[self.config.regulariser].value
        with self._kept_weights():
            return self.config.strength * sum(float(full(value(weight.as_matrix()))) for weight in self.regularised)

    def _kept_weights(self) -> Any:
        """Inside, the model has the weights that would be kept now: the averages if there are any."""
        return self.ema.in_place() if self.ema is not None else nullcontext()

    def _score(self) -> tuple[float | None, float | None]:
        """Held-out loss and accuracy of the weights that would be kept now; None without held-out data."""
        if self.held_out is None:
            return None, None
        self.bare.eval()
        loss = hits = labelled = count = 0.0
        with self._kept_weights(), torch.no_grad():
            reshard(self.bare)
            for raw in progress(self.held_out.epoch(0), "held out", total=len(self.held_out), show=self.show):
                batch = read_batch(raw, self.device, self.dtype)
                value, logits = self._loss(self.bare, batch)
                loss, count = loss + float(value) * batch.size, count + batch.size
                if batch.labels is not None:
                    hits += int((logits.argmax(1) == batch.labels).sum())
                    labelled += batch.size
        reshard(self.bare)
        loss, hits, labelled, count = self.ranks.total([loss, hits, labelled, count], self.device)
        return loss / count, hits / labelled if labelled else None

    def _finish(self, row: Epoch) -> None:
        """Take note of an epoch: keep its state if it is the best, and stop if nothing got better for long."""
        before = self.rows[self.best_epoch].held_out_loss
        if row.held_out_loss is None or before is None or not row.held_out_loss >= before:
            self.best_epoch, self.best = row.epoch, self._state()
        self.rows.append(row)
        patience = self.config.patience
        if patience is not None and row.epoch - self.best_epoch >= patience and row.epoch < self.config.epochs:
            self.stopped = f"after epoch {row.epoch}, as the held-out loss was lowest in epoch {self.best_epoch}"

    @torch.no_grad()
    def _state(self) -> dict[str, Tensor]:
        """A copy of all that the model holds, with the weights that would be kept now."""
        with self._kept_weights():
            return {name: tensor.detach().clone() for name, tensor in self.state.items()}


def _check_parameters(model: nn.Module, weights: list[PrunableWeight], parameters: Mapping[str, nn.Parameter]) -> None:
    check_values(weights)
    if not parameters:
        raise ValueError("model: no parameter requires a gradient; nothing can be trained")
    for name, parameter in parameters.items():
        if parameter.dtype == torch.float16:
            raise ValueError(
                f"{name} is float16, whose gradients underflow; call model.float(), and autocast='bfloat16' for speed"
            )
    if any(parameter.dtype == torch.bfloat16 for parameter in parameters.values()):
        _log.warning(
            "bfloat16 weights lose updates smaller than 1/256 of a weight; call model.float() and give "
            "autocast='bfloat16' instead"
        )


def _teacher(teacher: nn.Module | str | Path | None, model: nn.Module) -> nn.Module | None:
    """The teacher in eval mode."""
    if teacher is None:
        return None
    if isinstance(teacher, str | Path):
        if any(is_sharded(parameter) for parameter in model.parameters()):
            raise ValueError(
                "teacher: a sharded model cannot be copied to read a file into it; pass the dense model as a module"
            )
        made = deepcopy(model)
        merge_factors_(made)  # the file may hold whole weights, or factors again
        load_state_(made, teacher, "the teacher")
        return made.eval()
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher: expected a module or a path, got {type(teacher).__name__}")
    mine = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) in mine for parameter in teacher.parameters()):
        raise ValueError("teacher: it shares parameters with the model; pass a copy made before pruning")
    return teacher.eval()


def _optimizer(
    config: FinetuneConfig, parameters: Mapping[str, nn.Parameter], decayed: set[int]
) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters.values() if id(p) in decayed], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters.values() if id(p) not in decayed], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=config.lr)
