"""save and load: a packed model as safetensors, and back into a model of the same architecture.

docs/formats.md is the specification. Nothing in a file is trusted or run: what it says is compared with the model, and
every packed weight is tried, before anything of the model is changed. It chooses no form; rmtkern.packing does.
"""

import copy
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rmtkern.errors import PackedModelError, short
from rmtkern.layouts import LAYOUTS
from rmtkern.layouts.base import PackedWeight
from rmtkern.layouts.pairs import rows_of
from rmtkern.nn import AbsorbedActivation, PackedGatedLinear, PackedLinear, PackedModule
from rmtkern.ops import ACTIVATIONS, linear
from rmtkern.packing import is_packed
from rmtkern.packing.attention import AttentionForward
from rmtkern.packing.dtype import DTYPES, CastRecord, cast_record, resume_cast_
from rmtkern.packing.gated import GatedPair, fuse, fused, part
from rmtkern.packing.lent import LendingLinear
from rmtkern.packing.mlp import Chain, MlpForward
from rmtkern.packing.multihead import PackedMultihead, linears_of, reason_to_keep
from rmtkern.packing.norm import NormForward
from rmtkern.packing.normed import LeavingForward
from rmtkern.packing.sites import KernelForward, enable
from rmtkern.places import place_
from rmtkern.shards import as_bytes, locate, read_metadata, read_tensors, shard_of, target_of, write
from rmtkern.shrink_plan import ShrinkPlan
from rmtkern.storage import check_tensors, replacing
from rmtkern.token_merging import merge_tokens_, merging_of, unmerge_tokens_

__all__ = ["load", "save"]

FORMAT, FORMAT_VERSION = "rmtkern packed model", 1
Record = dict[str, Any]


class _Plan(Protocol):
    def to_json(self) -> str: ...


def _form_record(form: PackedWeight, tokens: int) -> Record:
    return {"layout": form.layout, "params": form.params, "tokens": tokens}


def _linear_record(module: PackedModule) -> Record:
    forms = module.forms
    return {
        "features": list(forms[0].shape),
        "bias": module.bias is not None,
        "activation": module.activation,
        "requires_grad": list(module.requires_grad),
        "forms": [_form_record(form, tokens) for form, tokens in zip(forms, module.tokens, strict=True)],
    }


def _pair_record(model: nn.Module, pair: GatedPair) -> Record:
    module = model.get_submodule(pair.paths[0])
    if not isinstance(module, PackedGatedLinear):
        raise PackedModelError(
            f"{pair.paths[0]} runs a pair but holds none; call rmtkern.unpack_(model) and pack again"
        )
    names = {key: list(getattr(pair, key)) for key in ("head", "linears", "tail")}
    return {**_linear_record(module), **names, "stacked": pair.stacked, "outputs": module.out_features}


def _chain_record(chain: Chain) -> Record:
    return {"order": list(chain.order), "linears": list(chain.linears), "activation": chain.activation}


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    plan: _Plan | None = None,
    shrunk: ShrinkPlan | None = None,
    *,
    max_shard_size: int | str | None = None,
) -> None:
    """Write a packed model as safetensors; complete or not at all, and a crash leaves old files whole.

    Its tensors have the model's own names; a packed linear's parts are `<name>.weight.<part>`. What is packed how
    stands in the metadata. The layouts do not depend on the machine.

    Args:
        model: what `pack_` changed; it may be on any device.
        path: of the file, if it ends in ".safetensors", such as "vit.safetensors"; else of a folder, which is made and
            gets "model.safetensors" and, of a transformers model, "config.json", as save_pretrained lays them out;
            `load_pretrained` builds and loads it; from_pretrained refuses it with that advice, as it knows no packed
            weights. Files are written beside it first, then renamed.
        plan: of `prune_`, to travel along; read it with `rmtkern.load_plan`.
        shrunk: of `shrink_`, so that `load` makes the model as small; without it the file loads only into a model that
            is.
        max_shard_size: bytes, or a text such as "5GB": a model with more of them becomes several files and an index,
            "vit.safetensors.index.json". Default: one file.

    Raises:
        TypeError: `model` is not a module, or `max_shard_size` no size.
        ValueError: nothing of the model is packed, something in its state is no tensor or none that safetensors holds
            (quantised layers have both), `path` is a file without the ending, or a size that is none.
        OSError: a file cannot be written.
    """
    from rmtkern import __version__  # not above: the package imports this file

    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    target, most = target_of(path), None if max_shard_size is None else as_bytes(max_shard_size)
    names = {module: name for name, module in model.named_modules()}
    linears = {name: _linear_record(module) for module, name in names.items() if isinstance(module, PackedLinear)}
    pairs = {name: _pair_record(model, pair) for name, pair in fused(model).items()}
    sites = {key: [names[site.module] for site in kind.of(model)] for key, kind in _SITES.items()}
    mlps = {
        names[site.module]: _chain_record(site.chain)
        for site in KernelForward.of(model)
        if isinstance(site, MlpForward)
    }
    cast = cast_record(model)
    if not linears and not pairs and not any(sites.values()) and cast is None:
        raise ValueError(
            "the model is not packed, so there is nothing that state_dict does not hold; call rmtkern.pack_(model,"
            " example) first, or where that left every layer dense, write model.state_dict() with safetensors"
        )
    merging = merging_of(model)
    record = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "rmtkern": __version__,
        "linears": linears,
        "pairs": pairs,
        "lent": [name for module, name in names.items() if isinstance(module, LendingLinear)],
        "multiheads": [name for module, name in names.items() if isinstance(module, PackedMultihead)],
        "absorbed": [name for module, name in names.items() if isinstance(module, AbsorbedActivation)],
        **sites,
        "mlps": mlps,
        "normed": {
            names[site.module]: part(names[site.parent], site.child)
            for site in KernelForward.of(model)
            if isinstance(site, LeavingForward)
        },
        "cast": None
        if cast is None
        else {"inside": _name(cast.inside), "outside": _name(cast.outside), "names": list(cast.names)},
        "plan": None if plan is None else json.loads(plan.to_json()),
        "shrunk": None if shrunk is None else json.loads(shrunk.to_json()),
        "merging": None if merging is None else {key: getattr(merging, key) for key in _MERGING},
    }
    state = model.state_dict()
    check_tensors(state, target)
    record["checksums"] = {name: _checksum(tensor) for name, tensor in state.items()}
    if target == Path(path):
        write(state, target, _metadata(record), most)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with _config_beside(model, target, None if cast is None else cast.outside):
        write(state, target, _metadata(record), most)


@contextmanager
def _config_beside(model: nn.Module, target: Path, outside: torch.dtype | None) -> Iterator[None]:
    """Put a transformers model's config.json beside its weights when these are there.

    `transformers_weights` is where from_pretrained looks for the name of the weights: it refuses the advice that stands
    there and shows it, where it would otherwise call packed weights unexpected and leave random ones in the model.
    """
    config = getattr(model, "config", None)
    if config is None or not callable(getattr(config, "to_json_string", None)):
        yield
        return
    config = copy.deepcopy(config)
    config.architectures = [type(model).__name__]
    advice = "packed by rmtkern, load with rmtkern.load_pretrained(folder)"
    record = {**json.loads(config.to_json_string()), "transformers_weights": advice}
    dtype = outside or next((value.dtype for value in model.parameters() if value.is_floating_point()), None)
    if dtype is not None:
        record["torch_dtype" if "torch_dtype" in record else "dtype"] = _name(dtype)
    with replacing(target.with_name("config.json")) as temporary:
        temporary.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        yield


def _checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    if tensor.numel() == 0:
        return 0
    return zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _metadata(record: Record) -> dict[str, str]:
    text = json.dumps(record, allow_nan=False)
    return {"rmtkern": text, "rmtkern.crc32": str(zlib.crc32(text.encode()))}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_NAMES = {_name(dtype): dtype for dtype in DTYPES}
_MERGING = {"r": int, "protected": int, "restore": bool}
"""What a file says of how the model merges tokens."""
_SITES: dict[str, type[KernelForward]] = {"attention": AttentionForward, "norms": NormForward}


class _Damaged(ValueError):
    """What is wrong with a file, without its name."""


def _expect(holds: bool, what: str, expected: str, got: object) -> None:
    if not holds:
        raise _Damaged(f"{what}: expected {expected}, got {short(got)}")


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _record(path: Path) -> Record:
    """What a file says, its own shape checked."""
    metadata = read_metadata(path)
    text = metadata.get("rmtkern")
    if text is None:
        raise _Damaged("it has no rmtkern metadata; give a file that rmtkern.save wrote")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Damaged(f"its metadata is not complete JSON ({short(str(error))})") from error
    _expect(isinstance(record, dict), "metadata", "an object", record)
    if record.get("format") != FORMAT:
        raise _Damaged(
            "it holds no packed model (a dense one loads with model.load_state_dict); give a file that rmtkern.save"
            " wrote"
        )
    version = record.get("version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise _Damaged(f"it has format version {short(version)}, this rmtkern reads {FORMAT_VERSION}; update rmtkern")
    if metadata.get("rmtkern.crc32") != str(zlib.crc32(text.encode())):
        raise _Damaged("its metadata differs from its checksum; copy the file again")
    for key in ("mlps", "normed"):
        record.setdefault(key, {})  # the first files have none
    for key in ("linears", "pairs", "mlps", "normed", "checksums"):
        _expect(isinstance(record.get(key), dict), key, "an object", record.get(key))
    for key in ("norms", "multiheads", "lent"):
        record.setdefault(key, [])  # nor these
    for key in ("absorbed", "multiheads", "lent", *_SITES):
        _expect(_is_names(record.get(key)), key, "names", record.get(key))
    return record


LINEAR = {"features", "bias", "activation", "requires_grad", "forms"}
PAIR = LINEAR | {"head", "linears", "tail", "stacked", "outputs"}


def _checked_linear(name: str, record: Any, keys: set[str] = LINEAR) -> Record:
    _expect(isinstance(record, dict) and set(record) == keys, name, f"an object of {', '.join(sorted(keys))}", record)
    features, forms, grad = (record[key] for key in ("features", "forms", "requires_grad"))
    _expect(
        isinstance(features, list) and len(features) == 2 and all(type(n) is int and n >= 1 for n in features),
        f"{name}.features", "two positive integers", features,
    )  # fmt: skip
    _expect(type(record["bias"]) is bool, f"{name}.bias", "true or false", record["bias"])
    counts = (2,) if keys is LINEAR else (2, 4)
    _expect(
        isinstance(grad, list) and len(grad) in counts and all(type(g) is bool for g in grad),
        f"{name}.requires_grad", "two booleans for each linear", grad,
    )  # fmt: skip
    activation = record["activation"]
    _expect(
        activation is None or (isinstance(activation, str) and activation in ACTIVATIONS),
        f"{name}.activation", "a known activation or null", activation,
    )  # fmt: skip
    _expect(isinstance(forms, list) and bool(forms), f"{name}.forms", "a list", forms)
    for form in forms or ():
        fits = isinstance(form, dict) and isinstance(form.get("layout"), str) and form["layout"] in LAYOUTS
        _expect(fits, f"{name}.forms", f"a layout of {', '.join(LAYOUTS)}", form)
        params, tokens = form.get("params"), form.get("tokens")
        _expect(
            isinstance(params, dict) and all(type(value) is int and 0 <= value < 2**31 for value in params.values()),
            f"{name}.params", "integers", params,
        )  # fmt: skip
        _expect(type(tokens) is int and 1 <= tokens < 2**31, f"{name}.tokens", "a positive integer", tokens)
    return record


def _checked_pair(name: str, record: Any) -> Record:
    record = _checked_linear(name, record, PAIR)
    for key in ("head", "linears", "tail"):
        _expect(_is_names(record[key]), f"{name}.{key}", "names", record[key])
    stacked, outputs = record["stacked"], record["outputs"]
    known = stacked is None or stacked in ("gate", "up")
    _expect(known, f"{name}.stacked", "'gate', 'up' or null", stacked)
    _expect(type(outputs) is int and outputs >= 1, f"{name}.outputs", "a positive integer", outputs)
    count = 1 if stacked else 2
    _expect(len(record["linears"]) == count, f"{name}.linears", f"{count} names", record["linears"])
    _expect(len(record["requires_grad"]) == 2 * count, f"{name}.requires_grad", "two for each linear", record)
    return record


def _checked_chain(model: nn.Module, name: str, entry: Any, record: Record) -> Chain:
    known = isinstance(entry, dict) and set(entry) == {"order", "linears", "activation"}
    _expect(known, name, "an object of activation, linears, order", entry)
    order, linears, activation = entry["order"], entry["linears"], entry["activation"]
    _expect(_is_names(order) and len(set(order)) == len(order), f"{name}.order", "different names", order)
    _expect(_is_names(linears) and len(linears) == 2, f"{name}.linears", "2 names", linears)
    _expect(activation is None or isinstance(activation, str), f"{name}.activation", "a name or null", activation)
    if not {child for child, _ in _module(model, name).named_children()} >= set(order):
        raise _Damaged(f"{name or 'the module'} has other parts in the model; give the model that was packed")
    between = order[order.index(linears[0]) + 1 :] if linears[0] in order else []
    between = between[: between.index(linears[1])] if linears[1] in between else None
    if between is None or (activation is not None and activation not in between):
        raise _Damaged(f"{name}.order: expected {short([linears[0], activation, linears[1]])} one after the other")
    chain = Chain(name, tuple(order), (linears[0], linears[1]), activation)
    packed = [record["linears"].get(path) for path in chain.paths]
    if any(linear is None for linear in packed) or packed[0]["features"][0] != packed[1]["features"][1]:
        raise _Damaged(f"{name} runs {' and '.join(chain.paths)}, which are not two packed linears that fit")
    if activation is not None and part(name, activation) not in record["absorbed"]:
        raise _Damaged(f"{part(name, activation)} is not absorbed, but {name} takes it for that")
    return chain


@dataclass
class _Forms:
    """The packed forms of a record, tried on one token, by token count; its bias; and the keys of its tensors."""

    by_tokens: dict[int, PackedWeight]
    bias: Tensor | None
    keys: set[str]

    @property
    def arguments(self) -> dict[str, Any]:
        """What a packed module takes of them, besides the first form."""
        (tokens, _), *others = self.by_tokens.items()
        return {"tokens": tokens, "others": dict(others) or None}

    @property
    def first(self) -> PackedWeight:
        return next(iter(self.by_tokens.values()))


def _forms(name: str, record: Record, tensors: Mapping[str, Tensor]) -> _Forms:
    keys: set[str] = set()

    def take(key: str) -> Tensor:
        if key not in tensors:
            raise _Damaged(f"{key} is missing")
        keys.add(key)
        return tensors[key]

    bias = take(f"{name}.bias") if record["bias"] else None
    shape = (record["features"][0], record["features"][1])
    forms: dict[int, PackedWeight] = {}
    for index, form in enumerate(record["forms"]):
        kind = LAYOUTS[form["layout"]]
        prefix = f"{name}.weight" if index == 0 else f"{name}.others.{index - 1}"
        parts = tuple(take(f"{prefix}.{key}") for key in kind.parts)
        values = [tensor for tensor in parts if tensor.is_floating_point()]
        dtype = values[0].dtype if values else None
        _expect(dtype in kind.dtypes, prefix, f"values of {', '.join(map(str, kind.dtypes))}", dtype)
        for tensor in values:
            if not bool(torch.isfinite(tensor).all()):
                raise _Damaged(f"{prefix} has NaN or Inf entries")
        if bias is not None:
            fits = bias.dtype == dtype and bias.shape == shape[:1]
            _expect(fits, f"{name}.bias", f"{dtype} [{shape[0]}]", f"{bias.dtype} {list(bias.shape)}")
        try:
            packed = kind(shape, form["params"], parts)
            linear(torch.zeros(1, shape[1], dtype=dtype), packed)  # refuses parts of a wrong shape and damaged ones
        except (ValueError, TypeError, IndexError, KeyError, RuntimeError) as error:
            raise _Damaged(f"{prefix}: {error}") from error
        if (damage := packed.damage()) is not None:
            raise _Damaged(f"{prefix}: {damage}; copy the file again")
        if form["tokens"] in forms:
            raise _Damaged(f"{name}.tokens: {form['tokens']} stands there twice")
        forms[form["tokens"]] = packed
    return _Forms(forms, bias, keys)


def _cast_of(record: Record) -> CastRecord | None:
    cast = record.get("cast")
    if cast is None:
        return None
    known = isinstance(cast, dict) and {cast.get("inside"), cast.get("outside")} <= {*_NAMES}
    _expect(known and _is_names(cast.get("names")), "cast", "two dtypes and names", cast)
    return CastRecord(_NAMES[cast["inside"]], _NAMES[cast["outside"]], tuple(cast["names"]))


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise _Damaged(f"the model has no module {short(name)}; give the model that was packed") from error


def _taken_apart(model: nn.Module, name: str, linears: Mapping[str, object]) -> PackedMultihead:
    module = _module(model, name)
    reason = reason_to_keep(module) if name else "it is the model itself"
    if reason is not None or not isinstance(module, nn.MultiheadAttention):
        raise _Damaged(f"{short(name)} cannot be taken apart in the model ({reason}); give the model that was packed")
    if not any(child in linears for child in linears_of(name)):
        raise _Damaged(f"{name} is taken apart and none of its linears is packed")
    return PackedMultihead(module)


class _Loaded:
    """What a file turns a model into, built and checked without touching the model."""

    def __init__(self, model: nn.Module, path: Path, record: Record, mmap: bool) -> None:
        tensors = read_tensors(path, mmap=mmap)
        for key, tensor in tensors.items():
            if record["checksums"].get(key) != _checksum(tensor):
                shard = shard_of(path, key)
                where = "" if shard is None else f" in {shard}"
                raise _Damaged(f"{key} differs from its checksum{where}; copy the file again")
        self.cast = _cast_of(record)
        self.apart = {name: _taken_apart(model, name, record["linears"]) for name in record["multiheads"]}
        self.swaps: dict[str, nn.Module] = dict(self.apart)
        used: set[str] = set()
        replaced: set[str] = set()
        for name, entry in record["linears"].items():
            entry = _checked_linear(name, entry)
            module = self._linear(model, name)
            wanted = (list(module.weight.shape), module.bias is not None) if isinstance(module, nn.Linear) else None
            if wanted != (entry["features"], entry["bias"]):
                found = f"{entry['features']} {'with' if entry['bias'] else 'without'} a bias"
                have = type(module).__name__ if wanted is None else f"nn.Linear {wanted[0]}"
                raise _Damaged(f"{name} is {found} in the file and {have} in the model; give the model that was packed")
            forms = _forms(name, entry, tensors)
            self.swaps[name] = (LendingLinear if name in record["lent"] else PackedLinear)(
                forms.first, forms.bias, entry["activation"], requires_grad=tuple(entry["requires_grad"]),
                **forms.arguments,
            )  # fmt: skip
            used |= forms.keys
            replaced |= {f"{name}.weight", f"{name}.bias"}
        if unknown := [name for name in record["lent"] if name not in record["linears"]]:
            raise _Damaged(f"{short(unknown[0])} lends its weight and is no packed linear")
        self.pairs = [self._pair(model, name, entry, tensors, used) for name, entry in record["pairs"].items()]
        replaced |= {f"{path}.{key}" for pair in self.pairs for path in pair.paths for key in ("weight", "bias")}
        for name in record["absorbed"]:
            module = _module(model, name)
            if module.state_dict() or next(module.children(), None) is not None:
                raise _Damaged(f"{name} is no activation in the model; give the model that was packed")
            self.swaps[name] = AbsorbedActivation(module).eval()
        for name in record["norms"]:
            if not isinstance(_module(model, name), nn.LayerNorm):
                raise _Damaged(f"{name} is no nn.LayerNorm in the model; give the model that was packed")
        self.forwards: list[KernelForward] = [
            kind(self.apart.get(name) or _module(model, name)) for key, kind in _SITES.items() for name in record[key]
        ]
        self.forwards += [
            MlpForward(_module(model, name), _checked_chain(model, name, entry, record))
            for name, entry in record["mlps"].items()
        ]
        self.forwards += [self._leaving(model, name, path, record) for name, path in record["normed"].items()]
        self.state = {key: tensor for key, tensor in tensors.items() if key not in used}
        self._check_rest(model, replaced)

    def _leaving(self, model: nn.Module, name: str, path: Any, record: Record) -> LeavingForward:
        """The LayerNorm of a file that leaves its rows to a linear."""
        known = isinstance(path, str) and path in record["linears"] and path not in record["lent"]
        _expect(known and name in record["norms"], f"normed.{name}", "a LayerNorm of norms and a linear", path)
        norm, columns = _module(model, name), record["linears"][path]["features"][1]
        if not isinstance(norm, nn.LayerNorm) or norm.normalized_shape != (columns,):
            raise _Damaged(f"{name} does not normalise the {columns} columns of {path}; give the model that was packed")
        parent, _, child = path.rpartition(".")
        if parent in self.apart:
            raise _Damaged(f"{name} leaves its rows to {path}, which is in an nn.MultiheadAttention")
        return LeavingForward(norm, _module(model, parent) if parent else model, child)

    def _linear(self, model: nn.Module, name: str) -> nn.Module:
        """What a linear of the file is in the model, whose nn.MultiheadAttentions may be taken apart."""
        parent, _, child = name.rpartition(".")
        if parent in self.apart and name in linears_of(parent):
            linear: nn.Module = getattr(self.apart[parent], child)
            return linear
        if isinstance(_module(model, parent), nn.MultiheadAttention):
            raise _Damaged(f"{name} is in an nn.MultiheadAttention that the file does not take apart")
        return _module(model, name)

    def _pair(
        self, model: nn.Module, name: str, entry: Any, tensors: Mapping[str, Tensor], used: set[str]
    ) -> GatedPair:
        entry = _checked_pair(name, entry)
        module, outputs, stacked = _module(model, name), entry["outputs"], entry["stacked"]
        children = dict(module.named_children())
        names = {key: tuple(entry[key]) for key in ("head", "linears", "tail")}
        pair = GatedPair(name, **names, activation=entry["activation"], stacked=stacked)
        if not set(children) >= {child for group in names.values() for child in group}:
            raise _Damaged(f"{name} has other parts in the model; give the model that was packed")
        rows, columns = entry["features"]
        wanted = ([2 * outputs if stacked else outputs, columns], entry["bias"])
        for child in pair.linears:
            inside = children[child]
            have = (list(inside.weight.shape), inside.bias is not None) if isinstance(inside, nn.Linear) else None
            if have != wanted or rows != rows_of(outputs):
                raise _Damaged(f"{part(name, child)} is another linear in the model; give the model that was packed")
        forms = _forms(pair.paths[0], entry, tensors)
        used |= forms.keys
        self.swaps |= pair.slots(
            PackedGatedLinear(
                forms.first, forms.bias, entry["activation"], features=outputs, stacked=stacked,
                requires_grad=tuple(entry["requires_grad"]), **forms.arguments,
            )
        )  # fmt: skip
        return pair

    def _check_rest(self, model: nn.Module, replaced: set[str]) -> None:
        """The tensors that are not packed must be the model's."""
        renamed = {
            f"{name}.{old}": f"{name}.{new}" for name in self.apart
            for old, new in (("in_proj_weight", "in_proj.weight"), ("in_proj_bias", "in_proj.bias"))
        }  # fmt: skip
        state = {renamed.get(name, name): tensor for name, tensor in model.state_dict().items()}
        have = {name: tensor for name, tensor in state.items() if name not in replaced}
        casts = () if self.cast is None else {renamed.get(name, name) for name in self.cast.names}
        missing = [name for name in have if name not in self.state]
        more = [name for name in self.state if name not in have]
        if missing or more:
            raise _Damaged(
                f"{len(missing)} tensors of the model are missing ({', '.join(missing[:3])}) and {len(more)} are"
                f" unknown to it ({', '.join(map(short, more[:3]))}); give the model that was packed"
            )
        for name, tensor in have.items():
            _expect(self.state[name].shape == tensor.shape, name, str(list(tensor.shape)), list(self.state[name].shape))
            dtype = self.cast.inside if self.cast is not None and name in casts else tensor.dtype
            _expect(self.state[name].dtype == dtype, name, str(dtype), self.state[name].dtype)


def _as_small_(model: nn.Module, record: Record) -> Callable[[], None] | None:
    """Cut a model as the one in the file was; what takes it back, or None if that was not cut."""
    if record.get("shrunk") is None:
        return None
    try:
        return ShrinkPlan.from_json(json.dumps(record["shrunk"])).apply_(model)
    except ValueError as error:
        raise _Damaged(str(error)) from error


def _as_merged_(model: nn.Module, record: Record) -> bool:
    """Let a model merge tokens as the one in the file; whether it did not before."""
    wanted, have = record.get("merging"), merging_of(model)
    if wanted is not None:
        known = isinstance(wanted, dict) and set(wanted) == set(_MERGING)
        fits = known and all(type(wanted[key]) is kind and wanted[key] >= 0 for key, kind in _MERGING.items())
        _expect(fits, "merging", "r, protected and restore", wanted)
    if have is not None:
        if wanted != {key: getattr(have, key) for key in _MERGING}:
            theirs = "merges none" if wanted is None else f"{wanted['r']} (protected: {wanted['protected']})"
            raise _Damaged(
                f"the model merges {have.r} tokens (protected: {have.protected}) and the one in the file {theirs}; "
                "call rmtkern.unmerge_tokens_(model) first"
            )
        return False
    if wanted is None:
        return False
    try:
        merge_tokens_(model, wanted["r"], protected=wanted["protected"], restore=wanted["restore"])
    except ValueError as error:
        raise _Damaged(f"{error}; give the model that was packed") from error
    return True


def _tied(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Where each parameter stands that stands in several places, as an embedding does that is the head's weight too."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, key))
    return [found for found in places.values() if len(found) > 1]


def _refuse_empty_buffers(model: nn.Module) -> None:
    state = model.state_dict()
    empty = [name for name, buffer in model.named_buffers() if buffer.device.type == "meta" and name not in state]
    if empty:
        raise PackedModelError(
            f"the buffers {', '.join(empty[:3])} are on the meta device and not in any state_dict, so no file holds"
            " them; build the model with its buffers on the CPU"
        )


def load(path: str | os.PathLike[str], model: nn.Module, *, mmap: bool = True) -> nn.Module:
    """Turn a model into the packed one that `save` wrote.

    What was fastest was measured on the machine that packed it: where that is another one, `unpack_` and `pack_`
    measure again. In memory the packed model takes what its file does, and a few tensors twice (docs/benchmarks.md,
    Memory).

    Args:
        path: of the file, of the index of its shards, or of the folder that `save` wrote.
        model: the same architecture (as it was before `shrink_` and `merge_tokens_`), not packed, changed in place; its
            weights do not matter, so it may be built on the meta device, and no dense weight is made for its packed
            linears.
        mmap: map the file into memory instead of reading it: tensors that need no other place stay there, and
            processes that load the same file share them. False copies all of them, which a file needs that somebody
            may change in place (`save` never does).

    Returns:
        `model`, in eval mode; parameters that were one are one again, where the file holds equal values for them.

    Raises:
        TypeError: `model` is not a module.
        ValueError: no such file, a damaged or foreign one, shards that do not belong together, or a file of another
            model; it names the tensor. Nothing of the model was changed.
        PackedModelError: the model is packed already, or buffers that the file does not hold are on the meta device.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if is_packed(model):
        raise PackedModelError("the model is packed already; call rmtkern.unpack_(model) first, or build a new one")
    source = locate(path)
    take_back, merged = None, False
    try:
        record = _record(source)
        take_back = _as_small_(model, record)
        merged = _as_merged_(model, record)
        loaded = _Loaded(model, source, record, mmap)
        _refuse_empty_buffers(model)
    except BaseException as error:
        if merged:
            unmerge_tokens_(model)
        if take_back is not None:
            take_back()
        if isinstance(error, _Damaged):
            raise ValueError(f"{source}: {error}") from error
        raise
    tied = _tied(model)
    place_(model, loaded.swaps)
    model.load_state_dict(loaded.state, strict=False, assign=True)
    standing = set(model.modules())
    for places in tied:  # a file holds one tensor for each name
        values = [(module._parameters, key) for module, key in places if module in standing]
        for parameters, key in values[1:]:
            first = values[0][0][values[0][1]]
            if torch.equal(parameters[key], first):  # type: ignore[arg-type]
                parameters[key] = first
    if loaded.cast is not None:
        resume_cast_(model, loaded.cast)
    fuse(model, loaded.pairs)
    enable(loaded.forwards)
    return model.eval()
