"""compare: a model in several engines on this machine, in one interleaved run, outputs checked; a verdict in words.

It joins pack_ and the engines of peers.py and times them; it prunes nothing.
"""

import contextlib
import copy
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles

import torch
from torch import Tensor, nn

from rmtkern.errors import PackedModelError
from rmtkern.packing import is_packed, pack_
from rmtkern.packing.outputs import OUTPUT_TOLERANCE
from rmtkern.packing.timing import WALL, interleaved_samples
from rmtkern.peers import PEERS, PeerMissing, in_bfloat16, prepare
from rmtkern.progress import progress
from rmtkern.pruning.calibrate import tensors_of
from rmtkern.tables import Table, Tabulated

__all__ = [
    "DEFAULT",
    "ENGINES",
    "Comparison",
    "EngineTime",
    "allowed_error",
    "check_engines",
    "compare",
    "relative_error",
]

ENGINES: dict[str, dict[str, str]] = {
    "torch": {"float32": "torch-fp32", "bfloat16": "torch-bf16"},
    "dense": {},
    "packed": {},
    "torch-compile": {"float32": "compile-fp32", "bfloat16": "compile-bf16"},
    "onnxruntime": {"float32": "onnxruntime-fp32", "bfloat16": "onnxruntime-fp32"},
    "openvino": {"float32": "openvino-fp32", "bfloat16": "openvino-bf16"},
    "torch-int8": dict.fromkeys(("float32", "bfloat16"), "torch-int8"),
    "openvino-int8": dict.fromkeys(("float32", "bfloat16"), "openvino-int8"),
}
"""Engine -> precision asked for -> the peer that runs it; "dense" and "packed" are ours. ONNX Runtime has no bfloat16
on the CPU."""
DEFAULT: tuple[str, ...] = ("torch", "dense", "packed", "torch-compile", "onnxruntime", "openvino")
"""Engines that are compared if none are named."""
NOISE = 0.03
"""Closer than this, two times count as equal."""
INT8_TOLERANCE = 0.3
"""int8 has no accuracy rule here: its error is reported, and only a wrong model (an error of about 1) is refused."""


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Largest difference of two outputs over the largest magnitude of the second one."""
    return float((got.double() - exact.double()).abs().max() / exact.abs().max())


def allowed_error(dtype: str, model: nn.Module, example: Tensor, exact: Tensor) -> float:
    """Largest relative error of an output in a precision.

    float32: what pack_ allows. bfloat16: the project's accuracy rule with PyTorch's own bfloat16 model as the dense op:
    twice its error and 4 eps.

    Args:
        dtype: "float32", "bfloat16" or "int8".
        model: in eval mode, float32.
        example: images [B, C, H, W] float32, or token ids [B, T] int64.
        exact: what the model returns.
    """
    if dtype == "float32":
        return OUTPUT_TOLERANCE[torch.float32]
    if dtype == "int8":
        return INT8_TOLERANCE
    torchs = relative_error(copy.deepcopy(model).bfloat16()(in_bfloat16(example)), exact)
    return 2 * torchs + 4 * torch.finfo(torch.bfloat16).eps


@dataclass(frozen=True, slots=True)
class EngineTime:
    """One engine that ran the model.

    Args:
        engine: a key of ENGINES.
        dtype: that it computed in.
        p20_ms: a fifth of its calls took less [ms].
        p50_ms: median [ms].
        p80_ms: a fifth of its calls took more [ms].
        error: of its output against PyTorch in float32, relative to the largest magnitude.
    """

    engine: str
    dtype: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    error: float


@dataclass(frozen=True)
class Comparison(Tabulated):
    """What `compare` measured; prints as a table with the verdict under it.

    Args:
        rows: the engines that ran, the fastest first.
        skipped: engine -> why it is not among them.
        dtype: that was asked for.
        example: shape of the input, such as "8x3x224x224".
        threads: that every engine was given.
        clock: what was read.
        sparsity: fraction of zeros in the linear weights of the model.
    """

    rows: tuple[EngineTime, ...]
    skipped: Mapping[str, str]
    dtype: str
    example: str
    threads: int
    clock: str
    sparsity: float

    def row(self, engine: str) -> EngineTime | None:
        """The row of an engine; None if it did not run."""
        return next((row for row in self.rows if row.engine == engine), None)

    @property
    def strongest(self) -> EngineTime | None:
        """The fastest dense engine that computes in the precision that was asked for."""
        return next((row for row in self.rows if row.engine != "packed" and row.dtype == self.dtype), None)

    @property
    def speedup(self) -> float | None:
        """`strongest` over packed; None if one of them is missing."""
        packed, strongest = self.row("packed"), self.strongest
        return None if packed is None or strongest is None else strongest.p50_ms / packed.p50_ms

    @property
    def verdict(self) -> list[str]:
        """What to take from it, in sentences."""
        packed, strongest, speedup = self.row("packed"), self.strongest, self.speedup
        lines = []
        if packed is None or strongest is None or speedup is None:
            what = "the packed model was not timed" if packed is None else f"no dense engine in {self.dtype} was timed"
            lines.append(f"No verdict on packing: {what}.")
        else:
            against = f"the fastest dense engine in {self.dtype} here ({strongest.engine}, {strongest.p50_ms:.4g} ms)"
            if speedup > 1 + NOISE:
                lines.append(f"Take the packed model: it is {speedup:.2f} times as fast as {against}.")
            elif speedup < 1 - NOISE:
                lines.append(
                    f"Do not pack: {against} is {1 / speedup:.2f} times as fast as the packed model "
                    f"({packed.p50_ms:.4g} ms)."
                )
            else:
                lines.append(
                    f"Packing makes no difference: {speedup:.2f} times as fast as {against}, within the noise."
                )
            low, high = sorted((packed, strongest), key=lambda row: row.p50_ms)
            if low.p80_ms > high.p20_ms and abs(speedup - 1) > NOISE:
                lines.append("The two spread so much that a repetition may say otherwise; time them again.")
            for row in self.rows:
                if row.dtype != self.dtype and row.p50_ms < packed.p50_ms:
                    lines.append(
                        f"{row.engine} in {row.dtype} is {packed.p50_ms / row.p50_ms:.2f} times as fast as the packed "
                        f"model in {self.dtype}; its outputs differ by {row.error:.2g}, measure its accuracy."
                    )
            plain = self.row("torch")
            if plain is not None and plain is not strongest:
                lines.append(f"Against PyTorch as it is: {plain.p50_ms / packed.p50_ms:.2f} times as fast.")
        return lines

    def table(self) -> Table:
        """One row per engine, then what was skipped and the verdict."""
        packed = self.row("packed")
        rows = [
            (row.engine, row.dtype, row.p50_ms, row.p20_ms, row.p80_ms,
             None if packed is None else row.p50_ms / packed.p50_ms, row.error) for row in self.rows
        ]  # fmt: skip
        columns = ("engine", "dtype", "median ms", "p20 ms", "p80 ms", "packed is x times as fast", "error")
        notes = [
            f"input {self.example}, {self.threads} thread(s), {self.clock}, interleaved; {100 * self.sparsity:.1f} % "
            "of the linear weights are zero; dense: each linear in its fastest dense form, our attention and LayerNorm",
            *(f"skipped: {engine}: {reason}" for engine, reason in self.skipped.items()),
            *self.verdict,
        ]
        return Table(columns, rows, notes)

    def to_json(self) -> str:
        """Everything, as a JSON object."""
        found = {"strongest": self.strongest.engine if self.strongest else None, "speedup": self.speedup}
        return json.dumps({**asdict(self), **found, "verdict": self.verdict}, indent=1)


class _FirstTensor(nn.Module):
    """A model that returns the first floating-point tensor of what the inner one returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return tensors_of(self.model(x))[0]


def compare(
    model: nn.Module,
    example: Tensor,
    engines: Sequence[str] = DEFAULT,
    *,
    dtype: torch.dtype = torch.float32,
    packed: nn.Module | None = None,
    budget_ms: float = 10_000.0,
    show_progress: bool | None = None,
) -> Comparison:
    """Time a model in several engines on this machine, with the same weights, input, precision and threads.

    Every engine is checked first: one whose output differs from PyTorch's in float32 by more than its precision allows
    is left out, with the reason. Then all run in interleaved rounds. Time is the CPU time of the whole process with one
    thread, which a busy machine does not change, and wall time with several. Compiled code of this process is dropped
    (torch._dynamo.reset) where "torch-compile" is asked for.

    Args:
        model: pruned or dense, float32, in eval mode, on the CPU; not changed. Dense engines run its zeros as numbers.
        example: what it is called with, [B, ...] float32, or int64 for token ids of a text model.
        engines: of ENGINES. "torch" is PyTorch as it is, "dense" each linear in its fastest dense form, "packed" what
            `pack_` makes of it; "torch" always runs too. "onnxruntime" computes in float32 in any case.
        dtype: float32 or bfloat16.
        packed: the model after `pack_`, if it is at hand; default, packed here.
        budget_ms: about how long all timed rounds take together [ms]; every engine has 3 to 5 rounds at least. Setting
            the engines up takes longer, and each holds a copy of the model.
        show_progress: progress bar; None: only on a terminal.

    Returns:
        Comparison: times, what was skipped and why, and a verdict.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an unknown engine or dtype, or a model that pack_ does not take.
        PackedModelError: `model` is packed.
    """
    names = _checked(model, example, engines, dtype)
    precision = str(dtype).removeprefix("torch.")
    threads = torch.get_num_threads()
    plain = _FirstTensor(model)
    skipped: dict[str, str] = {}
    calls: dict[str, Callable[[], Tensor]] = {}
    facts: dict[str, tuple[str, float]] = {}
    allowed: dict[str, float] = {}  # in each precision, which takes a run of a copy of the model
    with torch.no_grad(), contextlib.redirect_stdout(sys.stderr):  # an engine's own messages are not our output
        exact = plain(example)
        for name in progress(names, "setting engines up", show=show_progress):
            peer = ENGINES[name].get(precision)
            kind = PEERS[peer].dtype if peer else precision
            try:
                calls[name] = call = _call(name, peer, plain, packed, example, dtype, threads)
                got = call()
            except PeerMissing as reason:
                skipped[name] = str(reason)
                continue
            except Exception as failure:  # an engine may refuse a model in any way
                said = " ".join(str(failure).split())[:200]
                skipped[name] = f"it cannot run this model ({type(failure).__name__}: {said})"
                continue
            if kind not in allowed:
                allowed[kind] = allowed_error(kind, plain, example, exact)
            error = relative_error(got, exact)
            if error <= allowed[kind]:
                facts[name] = (kind, error)
            else:
                skipped[name] = f"its output differs by {error:.2g}, allowed in {kind} are {allowed[kind]:.2g}"
        one = threads == 1
        samples = interleaved_samples(
            {name: calls[name] for name in facts}, budget_ms, time.process_time if one else WALL, settle=not one
        )
    rows = [EngineTime(name, kind, *_spread(samples[name]), error) for name, (kind, error) in facts.items()]
    return Comparison(
        tuple(sorted(rows, key=lambda row: row.p50_ms)), skipped, precision, "x".join(map(str, example.shape)), threads,
        "process CPU time" if one else "wall time", _sparsity(model),
    )  # fmt: skip


def check_engines(engines: Sequence[str]) -> None:
    """Refuse names that are no engines: TypeError for a bare string, ValueError for an unknown name."""
    if isinstance(engines, str):
        raise TypeError(f"engines: expected a sequence of names, got the string {engines!r}")
    for name in engines:
        if name not in ENGINES:
            raise ValueError(f"unknown engine {name!r}; valid: {', '.join(ENGINES)}")


def _checked(model: object, example: object, engines: Sequence[str], dtype: torch.dtype) -> list[str]:
    """The engines to run, each once, "torch" first; refuses bad arguments."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if not isinstance(example, Tensor) or example.dtype not in (torch.float32, torch.int64):
        got = example.dtype if isinstance(example, Tensor) else type(example).__name__
        raise TypeError(f"example: expected a tensor [B, ...] of torch.float32 or torch.int64 (token ids), got {got}")
    check_engines(engines)
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype: expected torch.float32 or torch.bfloat16, got {dtype}")
    if is_packed(model):
        raise PackedModelError("the model is packed; pass the one before pack_, and this one as packed=")
    if training := [name or "the model" for name, module in model.named_modules() if module.training]:
        raise ValueError(f"{training[0]} is in train mode; call model.eval() first")
    if other := [name for name, value in model.named_parameters() if value.dtype != torch.float32]:
        raise ValueError(f"{other[0]} is not float32; compare the float32 model and ask for dtype= instead")
    return list(dict.fromkeys(("torch", *engines)))


def _call(
    name: str,
    peer: str | None,
    plain: "_FirstTensor",
    packed: nn.Module | None,
    example: Tensor,
    dtype: torch.dtype,
    threads: int,
) -> Callable[[], Tensor]:
    """An engine, set up on the model."""
    if peer is not None:
        return prepare(peer, plain, example, threads)
    ours = packed if name == "packed" else None
    if ours is None:
        ours = copy.deepcopy(plain.model)
        narrow = dtype if dtype == torch.bfloat16 else None
        pack_(ours, example, dtype=narrow, layouts=() if name == "dense" else None, show_progress=False)
    model = _FirstTensor(ours)
    return lambda: model(example)


def _spread(samples: Sequence[float]) -> tuple[float, float, float]:
    fifths = quantiles(samples, n=5, method="inclusive")
    return fifths[0], median(samples), fifths[3]


def _sparsity(model: nn.Module) -> float:
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    total = sum(weight.numel() for weight in weights)
    return 1 - sum(int(weight.count_nonzero()) for weight in weights) / max(1, total)
