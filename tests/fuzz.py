"""Mutates headers, metadata, indexes and packed weights: each gives a model that computes what its weights say, or an
error that names the file and, where a tensor was touched, that tensor; never a crash.

python -m tests.fuzz --count 100000 -o benchmarks/results/fuzz.csv      # make fuzz: under AddressSanitizer
python -m tests.fuzz --begin 4711 --count 1                             # one mutation again
"""

import argparse
import copy
import json
import mmap
import os
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from benchmarks.record import read_rows, stamped, write_rows
from rmtkern import load, pack_, save
from rmtkern.files import _checksum
from rmtkern.layouts import LAYOUTS, cpu
from rmtkern.layouts.base import PackedWeight
from rmtkern.nn import PackedModule
from rmtkern.ops import linear
from rmtkern.storage import DTYPE_NAMES, read_metadata
from rmtkern.testing import random_sparse
from tests import test_kept_files as kept

__all__ = ["FILES", "OUTCOMES", "WEIGHT", "Fuzzer", "compare", "fuzzer", "main", "read_rows", "watched"]

OUTCOMES = ("identical", "valid", "refused", "wrong", "crashed")
MOST_SECONDS, MOST_KIB = 20, 1 << 20
"""What a mutation may take, and how much memory all of them may add [KiB]; both under AddressSanitizer."""


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(40, 48), nn.Linear(40, 48), nn.Linear(48, 40)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Net(nn.Module):
    """A little of everything that a file can hold; sizes over a row block and a column block."""

    def __init__(self):
        super().__init__()
        self.wide, self.act, self.narrow = nn.Linear(40, 150), nn.GELU(), nn.Linear(150, 40)
        self.norm, self.attn, self.mlp = nn.LayerNorm(40), nn.MultiheadAttention(40, 2, batch_first=True), Gated()
        self.lent = nn.Linear(40, 40, bias=False)

    def forward(self, x):
        x = self.norm(x + self.narrow(self.act(self.wide(x))))
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return nn.functional.linear(x + self.mlp(x), self.lent.weight)


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def ours_wins(calls: dict[str, Callable[[], object]], budget_ms: float) -> dict[str, float]:
    for call in calls.values():
        call()
    slow = {"original": 9.0, "dense": 8.0, "kernels": 7.0, "packed": 4.0, "separate": 3.0}
    return {
        name: slow.get(name, 5.0 if name.startswith("dense/") or name.endswith("/torch") else 1.0) for name in calls
    }


@dataclass(frozen=True)
class Case:
    """A file to mutate.

    Args:
        build: makes the model that it is loaded into.
        x: what that model is called with, or None if it is a list of layers.
        state: the file's tensors.
        record: the file's record.
        shards: name -> bytes of the same model in shards, with the index first; empty if it is not sharded.
        file: the file.
    """

    build: Callable[[], nn.Module]
    x: Tensor | None
    state: dict[str, Tensor]
    record: dict[str, Any]
    shards: dict[str, bytes]
    file: bytes


def as_file(state: dict[str, Tensor], record: object) -> bytes:
    """A safetensors file with this record and its checksum; the same bytes each time."""
    text = record if isinstance(record, str) else json.dumps(record)
    metadata = {"format": "pt", "rmtkern": text, "rmtkern.crc32": str(zlib.crc32(text.encode("utf-8", "replace")))}
    header: dict[str, Any] = {"__metadata__": metadata}
    data = b""
    for name, tensor in sorted(state.items(), key=lambda entry: (-entry[1].itemsize, entry[0])):
        begin, data = len(data), data + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, len(data)],
        }
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + data


def make_case(model: nn.Module, build: Callable[[], nn.Module], x: Tensor | None, folder: Path, shard: bool) -> Case:
    save(model, folder / "case.safetensors")
    shards: dict[str, bytes] = {}
    if shard:
        save(model, folder / "s" / "x", max_shard_size="30KB")
        index, *files = sorted((folder / "s" / "x").iterdir(), key=lambda path: path.suffix != ".json")
        shards = {path.name: path.read_bytes() for path in (index, *files)}
        assert len(shards) > 2
    path = folder / "case.safetensors"
    state = {name: tensor.clone() for name, tensor in safetensors.torch.load_file(path).items()}
    record = json.loads(read_metadata(path)["rmtkern"])
    return Case(build, x, state, record, shards, as_file(state, record))


def make_cases(folder: Path) -> list[Case]:
    model = net()
    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if parameter.ndim == 2:
                    parameter.copy_(random_sparse(*parameter.shape, 0.6))
    x = torch.randn(1, 7, 40, generator=torch.Generator().manual_seed(1))
    report = pack_(model, x, timer=ours_wins, show_progress=False)
    used = report.packed_layers == len(report.layers) and report.gated[0].form and report.attention[0].used
    assert used and report.norms[0].used, report
    return [make_case(model, net, x, folder, True), make_case(kept.models(), kept.empty, None, folder, False)]


POOL: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 16, 40, 64, 127, 128, 2**31 - 1, 2**31, 2**53, 2**63, 2**64, 10**400,
    -(2**63), 1.5, 1e308, "", "x", "0", "weight", "../x.safetensors", "/etc/passwd", "\0", "\ud800", "F32", "BF16",
    "I64", "bitmask", "dense", "lowrank", "gelu", "bfloat16", [], [1], [0, 0], {}, {"a": 1}, [[]] * 9,
]  # fmt: skip


def spots(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from spots(value[key])


def similar(rng: random.Random, value: Any, found: list[tuple[Any, Any]]) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([value + rng.choice([-64, -8, -1, 1, 8, 64]), 2 * value, value // 2, 0, 1, 4, 2**31 - 1])
    if isinstance(value, list) and value:
        kept = list(value)
        change = rng.randrange(3)
        if change == 0:
            del kept[rng.randrange(len(kept))]
        elif change == 1:
            kept.append(copy.deepcopy(rng.choice(kept)))
        else:
            rng.shuffle(kept)
        return kept
    alike = [place[key] for place, key in found if type(place[key]) is type(value)]
    return copy.deepcopy(rng.choice(alike))


def scramble(rng: random.Random, value: Any) -> Any:
    """A JSON value with one to three changes."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        found = list(spots(value))
        if not found:
            return rng.choice(POOL)
        place, key = rng.choice(found)
        change = rng.random()
        if change < 0.6:
            place[key] = similar(rng, place[key], found)
        elif change < 0.7:
            del place[key]
        elif change < 0.8 and isinstance(place, dict):
            place[rng.choice(["", "x", "other", key + "x"])] = copy.deepcopy(place[key])
        else:
            place[key] = copy.deepcopy(rng.choice(POOL))
    return value


def flip(rng: random.Random, data: bytearray, begin: int = 0, end: int | None = None) -> None:
    """Change one to four bytes."""
    end = len(data) if end is None else end
    for _ in range(rng.randint(1, 4) if end > begin else 0):
        at = rng.randrange(begin, end)
        data[at] = rng.choice([data[at] ^ 1 << rng.randrange(8), rng.randrange(256), 0, 255, 34, 123])


def touched(rng: random.Random, tensor: Tensor) -> Tensor:
    """A copy with other bytes."""
    data = bytearray(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    if rng.random() < 0.1:
        data[:] = bytes([rng.choice([0, 255])]) * len(data)
    flip(rng, data)
    return torch.frombuffer(data, dtype=tensor.dtype).view(tensor.shape).clone() if data else tensor.clone()


def reshaped(rng: random.Random, tensor: Tensor, others: list[Tensor]) -> Tensor:
    """Another shape, dtype or tensor in place of one."""
    change = rng.randrange(7)
    if change == 0 and tensor.numel():
        return tensor.reshape(-1)[: rng.randrange(tensor.numel())].clone()
    if change == 1:
        return torch.cat([tensor.reshape(-1)] * rng.randint(2, 3))
    if change == 2:
        return tensor.reshape(1, *tensor.shape) if rng.random() < 0.5 else tensor.reshape(*tensor.shape, 1)
    if change == 3:
        return tensor.to(
            rng.choice([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])
        )
    if change == 4 and tensor.ndim == 2:
        return tensor.t().contiguous()
    if change == 5:
        return tensor.new_zeros(rng.choice([(), (0,), (1,), (0, 4), (3, 0), (1, 1, 1)]))
    return rng.choice(others).clone()


def header_of(data: bytes) -> tuple[int, dict[str, Any]]:
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return end, json.loads(data[8:end])


@dataclass
class Mutant:
    """What a mutation wrote.

    Args:
        files: name -> bytes; the first one is loaded.
        names: tensors that were touched, of which an error must name one (or the layer); empty if it need not.
        forged: the checksums were made to fit, so that the model may be another one.
    """

    files: dict[str, bytes]
    names: tuple[str, ...] = ()
    forged: bool = False


FILE = "fuzzed.safetensors"


def mutate_header_bytes(rng: random.Random, case: Case) -> Mutant:
    data = bytearray(case.file)
    flip(rng, data, 0 if rng.random() < 0.2 else 8, header_of(data)[0])
    return Mutant({FILE: bytes(data)})


def mutate_header(rng: random.Random, case: Case) -> Mutant:
    data = case.file
    end, header = header_of(data)
    if rng.random() < 0.15:
        key, other = rng.sample(list(header), 2)
        text = json.dumps(header).replace(json.dumps(key), json.dumps(other), 1)
    else:
        metadata = header.pop("__metadata__")
        text = json.dumps({"__metadata__": metadata, **header} if rng.random() < 0.1 else
                          {"__metadata__": metadata, **as_object(scramble(rng, header))})  # fmt: skip
    raw = text.encode("utf-8", "replace")
    return Mutant({FILE: struct.pack("<Q", len(raw)) + raw + data[end:]})


def as_object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"x": value}


def mutate_record(rng: random.Random, case: Case) -> Mutant:
    record = dict(case.record)
    checksums = {} if rng.random() < 0.05 else {"checksums": record.pop("checksums")}
    record = as_object(scramble(rng, record))
    return Mutant({FILE: as_file(case.state, {**record, **checksums})}, forged=True)


def mutate_length(rng: random.Random, case: Case) -> Mutant:
    data = case.file
    cut = rng.choice([rng.randrange(len(data)), rng.randrange(16), len(data) - rng.randrange(1, 9)])
    extended = data + rng.randbytes(rng.randint(1, 64))
    return Mutant({FILE: data[:cut] if rng.random() < 0.7 else extended})


def mutate_index(rng: random.Random, case: Case) -> Mutant:
    (name, text), *rest = case.shards.items()
    shards = dict(rest)
    change = rng.random()
    if change < 0.3:
        data = bytearray(text)
        flip(rng, data)
        text = bytes(data)
    elif change < 0.7:
        text = json.dumps(scramble(rng, json.loads(text))).encode("utf-8", "replace")
    else:
        shard = rng.choice(list(shards))
        if change < 0.8:
            del shards[shard]
        elif change < 0.9:
            shards[shard] = shards[rng.choice(list(shards))]
        else:
            data = bytearray(shards[shard])
            flip(rng, data)
            shards[shard] = bytes(data)
    return Mutant({name: text, **shards})


def mutate_stale(rng: random.Random, case: Case) -> Mutant:
    data = bytearray(case.file)
    end, header = header_of(data)
    name = rng.choice([name for name, entry in header.items() if "data_offsets" in entry and entry["shape"] != [0]])
    begin, stop = header[name]["data_offsets"]
    flip(rng, data, end + begin, end + stop)
    return Mutant({FILE: bytes(data)}, (name,))


def mutate_forged(rng: random.Random, case: Case) -> Mutant:
    state, record = dict(case.state), copy.deepcopy(case.record)
    names = rng.sample([name for name in state if ".weight." in name], rng.randint(1, 2))
    for name in names:
        state[name] = touched(rng, state[name])
    return forged(state, record, names)


def mutate_shapes(rng: random.Random, case: Case) -> Mutant:
    state, record = dict(case.state), copy.deepcopy(case.record)
    name = rng.choice(list(state))
    state[name] = reshaped(rng, state[name], list(state.values())).contiguous()
    return forged(state, record, [name])


def forged(state: dict[str, Tensor], record: dict[str, Any], names: list[str]) -> Mutant:
    record["checksums"] = {name: _checksum(tensor) for name, tensor in state.items()}
    return Mutant({FILE: as_file(state, record)}, tuple(names), forged=True)


FILES: dict[str, Callable[[random.Random, Case], Mutant]] = {
    "header bytes": mutate_header_bytes,
    "header entries": mutate_header,
    "record": mutate_record,
    "length": mutate_length,
    "index and shards": mutate_index,
    "tensor, old checksum": mutate_stale,
    "tensor, new checksum": mutate_forged,
    "shape or dtype": mutate_shapes,
}
WEIGHT = "packed weight, no file"
SHARE = 0.7
"""Of all mutations, those of packed weights alone, without a file around them: they reach the kernels most often."""


def compare(form: PackedWeight, rng: random.Random) -> None:
    """Whether the kernel computes what `unpack` says, on some token count; AssertionError if not."""
    n, k = form.shape
    w = form.unpack()
    dtype = w.dtype
    assert w.shape == (n, k), f"unpack() gives {tuple(w.shape)} for {form.shape}"
    x = torch.randn(rng.choice([1, 3, 40]), k, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = linear(x, form)
    parts = tuple(part.abs() if part.is_floating_point() else part for part in form.tensors())
    # all layouts are linear in each floating part, so this bounds every sum on the way, products of factors included
    scale = x.double().abs() @ type(form)(form.shape, form.params, parts).unpack().double().abs().t()
    error = (y.double() - x.double() @ w.double().t()).abs()
    info = torch.finfo(dtype)
    sums = k + sum(form.params.get(name, 0) for name in ("rank",))
    allowed = scale * (sums * torch.finfo(torch.float32).eps + 8 * info.eps) + sums * info.tiny
    bad = (scale < info.max / 8) & ~(error <= allowed)
    assert not bool(bad.any()), f"{form.label} {form.shape} differs by {float(error[bad].max()):.3g}"


@contextmanager
def instruction_set(isa: str) -> Iterator[None]:
    os.environ["RMTKERN_ISA"] = isa
    try:
        yield
    finally:
        del os.environ["RMTKERN_ISA"]


class Fuzzer:
    """The cases, and what each of them gives when nothing is changed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.cases = make_cases(folder)
        self.fresh: dict[int, nn.Module] = {}  # a model that is refused a file stays as it was, so it is used again
        self.exact: dict[tuple[int, str], Any] = {}
        for number, case in enumerate(self.cases):
            model = load(self.write({FILE: case.file}), case.build())
            for isa in cpu.isas():
                with instruction_set(isa):
                    self.exact[number, isa] = self.result(model, case)
        self.forms = [
            form
            for case in self.cases
            for module in load(self.write({FILE: case.file}), case.build()).modules()
            if isinstance(module, PackedModule)
            for form in module.forms
        ]
        assert {form.layout for form in self.forms} == set(LAYOUTS)

    def write(self, files: dict[str, bytes]) -> Path:
        for path in self.folder.iterdir():
            if path.is_file():
                path.unlink()
        for name, data in files.items():
            (self.folder / name).write_bytes(data)
        return self.folder / next(iter(files))

    def result(self, model: nn.Module, case: Case) -> Any:
        with torch.no_grad():
            if case.x is not None:
                return model(case.x)
            return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def kind(self, index: int) -> str:
        rng = random.Random(f"{self.seed}:{index}")
        return WEIGHT if rng.random() < SHARE else rng.choice(list(FILES))

    def one(self, index: int) -> str:
        """Make one mutation and judge it; AssertionError if what comes out is wrong."""
        rng = random.Random(f"{self.seed}:{index}:")
        kind, isa = self.kind(index), rng.choice(cpu.isas())
        began = time.monotonic()
        with instruction_set(isa):
            outcome = self.weight(rng) if kind == WEIGHT else self.file(rng, kind, isa)
        assert time.monotonic() - began < MOST_SECONDS, "it took too long"
        return outcome

    def file(self, rng: random.Random, kind: str, isa: str) -> str:
        number = 0 if kind == "index and shards" else rng.randrange(len(self.cases))
        case, exact = self.cases[number], self.exact[number, isa]
        mutant = FILES[kind](rng, case)
        path, model = self.write(mutant.files), self.fresh.pop(number, None) or case.build()
        kinds = [type(module) for module in model.modules()]
        try:
            load(path, model)
        except ValueError as error:
            text = str(error)
            assert any(name in text for name in mutant.files), f"no file in: {text}"
            layers = {name.rpartition(".weight.")[0] or name.rpartition(".")[0] for name in mutant.names}
            assert not layers or any(layer in text for layer in layers), f"none of {mutant.names} in: {text}"
            assert [type(module) for module in model.modules()] == kinds, "the model was changed"
            self.fresh[number] = model
            return "refused"
        try:
            y = self.result(model, case)
        except (TypeError, ValueError, RuntimeError):  # a forged record may say that a lent weight is not, or change
            assert mutant.forged, "the model cannot run"  # the order of a pair's modules, which no file can tell
            y = None
        same = torch.equal(y, exact) if isinstance(y, Tensor) else y is not None and equal(y, exact)
        assert same or mutant.forged, "another model came out of a file with old checksums"
        if same:
            return "identical"
        for module in model.modules():
            for form in module.forms if isinstance(module, PackedModule) else ():
                compare(form, rng)
        return "valid"

    def weight(self, rng: random.Random) -> str:
        form = rng.choice(self.forms)
        parts, params = [part.clone() for part in form.tensors()], dict(form.params)
        at = rng.randrange(len(parts))
        change = rng.random()
        shape = form.shape
        if change < 0.7:
            parts[at] = touched(rng, parts[at])
        elif change < 0.85:
            parts[at] = reshaped(rng, parts[at], parts)
        elif change < 0.93 and params:
            params[rng.choice(list(params))] = rng.choice([0, 1, 2, 3, 4, 8, 16, 31, 2**31 - 1])
        else:
            shape = (
                max(1, shape[0] + rng.choice([-1, 0, 1, 7, 128])),
                max(1, shape[1] + rng.choice([-64, -4, 0, 1, 4])),
            )
        try:
            if not all(bool(torch.isfinite(part).all()) for part in parts if part.is_floating_point()):
                return "refused"  # as load does, before a kernel sees it
            mutant = LAYOUTS[form.layout](shape, params, tuple(parts))
            linear(torch.zeros(1, shape[1], dtype=form.tensors()[0].dtype), mutant)
        except (ValueError, TypeError, IndexError, KeyError, RuntimeError):
            return "refused"  # load names the tensor
        if mutant.damage() is not None:
            return "refused"
        compare(mutant, rng)
        same = all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(parts, form.tensors(), strict=True))
        return "identical" if same and (shape, params) == (form.shape, form.params) else "valid"


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@contextmanager
def fuzzer(seed: int) -> Iterator[Fuzzer]:
    """In a folder in memory, if there is one: a mutation writes a file."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        yield Fuzzer(Path(folder), seed)


def watched(fuzz: Fuzzer, begin: int, count: int) -> list[str]:
    """The outcome of each mutation, made in child processes: what kills one is counted and the next child goes on."""
    shared = mmap.mmap(-1, count + 1)  # the outcome of each, 0 while it runs
    at = 0
    while at < count:
        child = os.fork()
        if child == 0:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            for i in range(at, count):
                try:
                    shared[i] = 1 + OUTCOMES.index(fuzz.one(begin + i))
                except Exception:
                    shared[i] = 1 + OUTCOMES.index("wrong")
                    sys.stderr.write(f"mutation {begin + i} ({fuzz.kind(begin + i)}): {traceback.format_exc()}\n")
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            if grown > MOST_KIB:
                sys.stderr.write(f"memory grew by {grown} KiB\n")
            sys.stderr.flush()
            os._exit(grown > MOST_KIB)
        _, status = os.waitpid(child, 0)
        at = next((i for i in range(at, count) if shared[i] == 0), count)
        if at < count:
            sys.stderr.write(f"mutation {begin + at} ({fuzz.kind(begin + at)}) ended the process: status {status}\n")
            shared[at] = 1 + OUTCOMES.index("crashed")
            at += 1
        elif status:
            raise SystemExit("more memory than a mutation may take")
    return [OUTCOMES[shared[i] - 1] for i in range(count)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--begin", type=int, default=0, help="number of the first mutation")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, help="CSV that gets a row for each kind")
    args = parser.parse_args()
    torch.set_num_threads(1)  # no threads, so that a fork is whole
    with fuzzer(args.seed) as fuzz:
        outcomes = watched(fuzz, args.begin, args.count)
        found = Counter((fuzz.kind(args.begin + i), outcome) for i, outcome in enumerate(outcomes))
    preloaded = os.environ.get("LD_PRELOAD", "")
    sanitizers = [name for name, library in (("address", "libasan"), ("undefined", "libubsan")) if library in preloaded]
    rows = [
        {
            "kind": kind, "sanitizer": "+".join(sanitizers) or "none", "seed": args.seed, "begin": args.begin,
            "mutations": sum(found[kind, outcome] for outcome in OUTCOMES),
            **{outcome: found[kind, outcome] for outcome in OUTCOMES},
        }
        for kind in (*FILES, WEIGHT)
    ]  # fmt: skip
    for row in rows:
        sys.stdout.write(", ".join(f"{row[key]} {key}" for key in ("kind", "mutations", *OUTCOMES)) + "\n")
    if args.output is not None:
        write_rows(args.output, [stamped(row) for row in rows], ("kind", "seed", "begin", "sanitizer"))
    return int(any(row["wrong"] or row["crashed"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
