"""How timm, transformers and torchvision Vision Transformers name and fuse their weights: the only file that knows.

It turns a module into a list of named matrices with a role each; it must not know what is done with them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rmtkern.errors import PackedModelError

__all__ = [
    "ATTENTION_WORDS",
    "GROUPS",
    "HEAD_COUNTS",
    "HEAD_WIDTHS",
    "ROLES",
    "PrunableWeight",
    "block_name",
    "check_values",
    "layer_type",
    "prunable_weights",
    "weights_of_state",
]

GROUPS: dict[str, tuple[str, ...]] = {
    "attn": ("qkv", "q", "k", "v", "attn_out"),
    "mlp": ("mlp_in", "mlp_gate", "mlp_out"),
    "other": ("embed", "head", "linear", "conv"),
}
"""Layer types and their roles; a group's name may be given wherever a role may."""

ROLES: tuple[str, ...] = tuple(role for roles in GROUPS.values() for role in roles)
"""What a weight does in its model."""

# The tables: the last word of a module's path decides where it can, else the nearest word that names a context.
# Names of all three libraries stand side by side; a word means the same in each.
_PROJECTIONS: dict[str, str] = {
    **dict.fromkeys(
        ("qkv", "qkv_proj", "to_qkv", "in_proj", "Wqkv", "query_key_value", "kv", "kv_proj", "to_kv"), "qkv"
    ),
    **dict.fromkeys(("q", "q_proj", "query", "to_q"), "q"),
    **dict.fromkeys(("k", "k_proj", "key", "to_k"), "k"),
    **dict.fromkeys(("v", "v_proj", "value", "to_v"), "v"),
}
_ATTENTION_OUT = ("proj", "out_proj", "o_proj", "to_out", "merge", "dense", "proj_out", "wo")
_MLP: dict[str, str] = {
    **dict.fromkeys(("fc1", "fc1_x", "up_proj", "w12", "lin1", "linear1", "ln1", "c_fc"), "mlp_in"),
    **dict.fromkeys(("fc1_g", "gate_proj", "w0"), "mlp_gate"),
    **dict.fromkeys(("fc2", "down_proj", "lin2", "linear2", "ln2"), "mlp_out"),
}
HEAD_COUNTS: tuple[str, ...] = ("num_heads", "num_attention_heads", "n_heads", "heads", "nhead")
"""Attributes of attention modules that hold the number of heads."""

HEAD_WIDTHS: tuple[str, ...] = ("attn_dim", "all_head_size", "inner_dim", "attention_dim")
"""Attributes of attention modules that hold the number of heads times their size."""

ATTENTION_WORDS = ("attn", "attention")
"""What the name or the class of an attention module contains."""
_MLP_WORDS = ("mlp", "ffn", "feed_forward", "feedforward", "intermediate")
_EMBED_WORDS = ("patch_embed", "patch_embedding", "patch_embeddings", "stem", "embeddings")
_HEAD_WORDS = ("head", "heads", "classifier", "head_dist", "fc", "cls_classifier", "distillation_classifier",
               "visual_projection")  # fmt: skip
_NEITHER = ("cpb_mlp", "se", "squeeze_excitation", "pos_embed", "downsample", "rel_pos", "pooler",
            "lora_a", "lora_b")  # fmt: skip  # small and special
_MULTIHEAD = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_LONGEST_NAME = 1000
_TABLES = ("embedding", "embeddings", "wte", "wpe", "embed_tokens")  # modules that look rows up
_WRAPPERS = ("linear", "conv", "ln", "c", "base_layer")  # in a norm (LeViT) or in LoRA (PEFT): the word before decides


@dataclass(frozen=True, eq=False)
class PrunableWeight:
    """One weight of a model, seen as a matrix.

    Args:
        name: the parameter's dotted name, such as "blocks.0.mlp.fc1.weight".
        role: one of ROLES.
        parameter: the live parameter; Linear [N, K], Conv2d [Cout, Cin / groups, kh, kw], or transposed (see `kind`).
        kind: "linear", "conv", or "transposed" for a parameter stored as [K, N].
        groups: groups of a convolution; 1 otherwise.
        tied: further names of the same parameter.
    """

    name: str
    role: str
    parameter: nn.Parameter
    kind: Literal["linear", "conv", "transposed"] = "linear"
    groups: int = 1
    tied: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the matrix."""
        first, *rest = self.parameter.shape
        if self.kind == "transposed":
            return rest[0], first
        return first, self.parameter.numel() // max(first, 1)

    @property
    def depthwise(self) -> bool:
        """Whether each input channel has filters of its own; then no spectral edge says anything."""
        return self.kind == "conv" and self.groups > 1 and self.parameter.shape[1] == 1

    def as_matrix(self) -> Tensor:
        """The weight [N, K], detached: a view of the parameter wherever its memory allows one."""
        data = self.parameter.detach()
        return data.t() if self.kind == "transposed" else data.reshape(self.shape)

    def to_parameter(self, matrix: Tensor) -> Tensor:
        """A matrix [N, K] in the parameter's own shape."""
        return matrix.t() if self.kind == "transposed" else matrix.reshape(self.parameter.shape)

    def blocks(self) -> dict[str, slice]:
        """Rows of the matrix that are one matrix mathematically: everything, or one block for each group.

        Returns:
            Label -> rows; the label is `name`, or "name[group 3]". A depthwise weight is one block.
        """
        rows = self.shape[0]
        if self.groups == 1 or self.depthwise:
            return {self.name: slice(0, rows)}
        return _equal_blocks(self.name, rows, [f"group {i}" for i in range(self.groups)])

    def split(self) -> dict[str, slice]:
        """Like `blocks`, with a fused qkv [3K, K] as q, k, v and a fused kv [2K, K] as k, v."""
        rows, columns = self.shape
        if self.role == "qkv" and self.kind != "conv" and rows in (2 * columns, 3 * columns):
            return _equal_blocks(self.name, rows, ["q", "k", "v"][-(rows // columns) :])
        return self.blocks()


def _equal_blocks(name: str, rows: int, labels: Sequence[str]) -> dict[str, slice]:
    size = rows // len(labels)
    return {f"{name}[{label}]": slice(i * size, (i + 1) * size) for i, label in enumerate(labels)}


def layer_type(role: str) -> str:
    """The group of a role: "attn", "mlp" or "other"."""
    return next(group for group, roles in GROUPS.items() if role in roles)


def block_name(name: str) -> str:
    """The block that a weight belongs to: its path up to the last number before attention or MLP begins.

    Args:
        name: of the parameter, such as "blocks.3.mlp.fc1.weight" or "encoder.layers.encoder_layer_3.mlp.0.weight".

    Returns:
        Such as "blocks.3" or "encoder.layers.encoder_layer_3"; "" where nothing before the layer itself is numbered.
    """
    words = name.split(".")[:-2]
    end = 0
    for at, word in enumerate(words, 1):
        if any(part in word.lower() for part in (*ATTENTION_WORDS, *_MLP_WORDS)):
            break
        if word.rpartition("_")[2].isdecimal():
            end = at
    return ".".join(words[:end])


def prunable_weights(
    model: nn.Module, targets: str | Iterable[str] | None = None, ignore: str | Iterable[str] = ()
) -> list[PrunableWeight]:
    """The weights of a model that can be pruned, by role.

    Handles nn.Linear, nn.Conv2d, nn.MultiheadAttention (in_proj_weight or q/k/v_proj_weight, and out_proj) and the
    Conv1D of transformers. A parameter used under several names is listed once.

    Args:
        model: any module.
        targets: "all", roles, groups ("attn", "mlp", "other") or globs over parameter names. None: every attention
            and MLP projection; in a model without any, every Linear and Conv2d but the embedding and the classifier
            (the last weight, if no name tells which it is and there is more than one).
        ignore: roles, groups or globs to leave out.

    Returns:
        In the order of the model's modules; empty only if the model has nothing prunable.

    Raises:
        TypeError: `model` is not a module.
        ValueError: a target matches nothing, a glob in `ignore` matches nothing, or a weight is parametrised or lazy.
        PackedModelError: the model is packed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    weights = _name_the_embedding(_list(model))
    dropped = {weight.name for weight in weights for word in _words(ignore) if _matches(weight, word)}
    for word in _words(ignore):
        if word not in (*ROLES, *GROUPS, "all") and not any(_matches(weight, word) for weight in weights):
            raise ValueError(f"ignore={word!r} matches no weight; {_what_exists(weights)}")
    if targets is None:
        chosen = _default(weights)
    else:
        chosen = []
        for word in _words(targets):
            found = [weight for weight in weights if _matches(weight, word)]
            if not found and weights:
                raise ValueError(f"target {word!r} matches no weight; {_what_exists(weights)}")
            chosen += found
    names = {weight.name for weight in chosen} - dropped
    return [weight for weight in weights if weight.name in names]


def _words(words: str | Iterable[str]) -> tuple[str, ...]:
    return (words,) if isinstance(words, str) else tuple(words)


def _matches(weight: PrunableWeight, word: str) -> bool:
    if word == "all" or word == weight.role or weight.role in GROUPS.get(word, ()):
        return True
    names = (weight.name, *weight.tied)
    return any(fnmatchcase(name, word) or fnmatchcase(name.rpartition(".")[0], word) for name in names)


def _what_exists(weights: Sequence[PrunableWeight]) -> str:
    roles = ", ".join(dict.fromkeys(weight.role for weight in weights))
    names = ", ".join(weight.name for weight in weights[:4]) + (", ..." if len(weights) > 4 else "")
    return f"this model has the roles {roles} and the weights {names}"


def _default(weights: list[PrunableWeight]) -> list[PrunableWeight]:
    projections = [weight for weight in weights if layer_type(weight.role) != "other"]
    if projections:
        return projections
    plain = [weight for weight in weights if weight.role in ("linear", "conv")]
    has_head = any(weight.role == "head" for weight in weights)
    return plain if has_head or len(plain) == 1 else plain[:-1]


def _name_the_embedding(weights: list[PrunableWeight]) -> list[PrunableWeight]:
    """Give the role "embed" to the first convolution of a transformer that no name marks, as in torchvision's Swin."""
    first = next((i for i, weight in enumerate(weights) if weight.kind == "conv"), None)
    has_projections = any(layer_type(weight.role) != "other" for weight in weights)
    if first != 0 or not has_projections or weights[0].role != "conv":
        return weights
    start = weights[0]
    return [PrunableWeight(start.name, "embed", start.parameter, start.kind, start.groups, start.tied), *weights[1:]]


def weights_of_state(state: Mapping[str, Tensor]) -> list[PrunableWeight]:
    """The weights in a checkpoint whose model is not at hand; what each one does is told by names alone.

    Args:
        state: name -> tensor, as a state dict has it. Matrices and convolutions called `weight` count, and the
            projections of nn.MultiheadAttention; lookup tables do not, as far as names tell. A convolution with one
            input channel is taken for a depthwise one.

    Returns:
        In the order of `state`, with parameters that share its memory. Names of more than 1,000 characters, which no
        model has, are left out.
    """
    found: list[tuple[str, Tensor, Literal["linear", "conv"], int]] = []
    modules: dict[str, nn.Module] = {"": nn.Module()}
    for name, tensor in state.items():
        path, _, own = name.rpartition(".")
        words = path.split(".")
        stub, kind = _stub(words[-1], own, tensor)
        if stub is None or len(name) > _LONGEST_NAME:
            continue
        for end in range(1, len(words)):
            modules.setdefault(".".join(words[:end]), nn.Module())
        modules[path] = stub
        found.append((name, tensor, kind, getattr(stub, "groups", 1)))
    weights = []
    for name, tensor, kind, groups in found:
        parameter = nn.Parameter(tensor, requires_grad=False)
        weights.append(PrunableWeight(name, _role(name, parameter, kind, modules), parameter, kind, groups))
    return _name_the_embedding(weights)


def _stub(last: str, own: str, tensor: Tensor) -> tuple[nn.Module | None, Literal["linear", "conv"]]:
    """A module of the class that a tensor seems to belong to, without memory; None if it seems no weight."""
    if not tensor.is_floating_point() or 0 in tensor.shape:
        return None, "linear"
    if own in _MULTIHEAD and tensor.ndim == 2:
        return nn.MultiheadAttention(1, 1, device="meta"), "linear"
    if own == "weight" and tensor.ndim == 2 and not last.endswith(_TABLES):
        return nn.Linear(1, 1, device="meta"), "linear"
    if own == "weight" and tensor.ndim == 4:
        groups = tensor.shape[0] if tensor.shape[1] == 1 else 1
        return nn.Conv2d(groups, groups, 1, groups=groups, device="meta"), "conv"
    return None, "linear"


def _list(model: nn.Module) -> list[PrunableWeight]:
    found: dict[int, PrunableWeight] = {}
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if type(module).__name__ in ("PackedLinear", "LendingLinear", "PackedGatedLinear"):
            raise PackedModelError(
                f"{path or 'the model'} is packed, and a packed weight cannot be analysed or pruned; "
                "call rmtkern.unpack_(model) first"
            )
        for name, parameter, kind, groups in _parameters(path, module):
            earlier = found.get(id(parameter))
            if earlier is not None:
                tied = (*earlier.tied, name)
                found[id(parameter)] = PrunableWeight(
                    earlier.name, earlier.role, parameter, earlier.kind, earlier.groups, tied
                )
            elif parameter.numel():
                role = _role(name, parameter, kind, modules)
                found[id(parameter)] = PrunableWeight(name, role, parameter, kind, groups)
    return list(found.values())


_Found = tuple[str, nn.Parameter, Literal["linear", "conv", "transposed"], int]


def _parameters(path: str, module: nn.Module) -> Iterator[_Found]:
    """The weights a module owns directly: (name, parameter, kind, groups)."""
    dot = f"{path}." if path else ""
    if isinstance(module, nn.MultiheadAttention):
        for name in _MULTIHEAD:
            parameter = getattr(module, name, None)
            if isinstance(parameter, nn.Parameter):
                yield dot + name, parameter, "linear", 1
        return
    names = {kind.__name__ for kind in type(module).__mro__}  # fully_shard makes subclasses
    transposed = "Conv1D" in names and hasattr(module, "nf")  # of transformers: y = x W + b
    if not (isinstance(module, nn.Linear | nn.Conv2d) or transposed):
        return
    parameter = module._parameters.get("weight")
    if parameter is not None and is_lazy(parameter):
        raise ValueError(f"{dot}weight has no values before the model ran (a lazy module); run it once on an example")
    if parameter is None:
        raise ValueError(
            f"{dot}weight is not a plain parameter (parametrised, or masked by torch.nn.utils.prune); make it one "
            "first, with torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.prune.remove"
        )
    if isinstance(module, nn.Conv2d):
        yield f"{dot}weight", parameter, "conv", module.groups
    else:
        yield f"{dot}weight", parameter, "transposed" if transposed else "linear", 1


def _role(name: str, parameter: Tensor, kind: str, modules: Mapping[str, nn.Module]) -> str:
    """The role of a parameter, from the words of its path, the last one first."""
    path, _, own = name.rpartition(".")
    words = path.split(".") if path else []
    owner = modules[path]
    if isinstance(owner, nn.MultiheadAttention):
        return "qkv" if own == "in_proj_weight" else own[0]
    if path and isinstance(modules[path.rpartition(".")[0]], nn.MultiheadAttention):
        return "attn_out"
    other = "conv" if kind == "conv" else "linear"
    if isinstance(owner, nn.Conv2d) and owner.groups > 1 and parameter.shape[1] == 1:
        return other  # depthwise: a local filter, whatever it is part of
    context, at = _context(words, modules)
    last = _last_word(words)
    if context == "attn":
        if last in _PROJECTIONS:
            return _PROJECTIONS[last]
        inside = words[at + 1 :]
        return "attn_out" if last in _ATTENTION_OUT or (len(inside) == 1 and inside[0].isdigit()) else other
    if context == "mlp":
        return _MLP.get(last) or _mlp_by_shape(".".join(words[: at + 1]), owner, parameter, modules)
    if context == "neither":
        return other
    if last == "dense" and "output" in words:  # transformers before version 5: layer.0.output.dense
        return "mlp_out"
    if any(word in _HEAD_WORDS for word in words):
        return "head"
    if words[:1] == ["conv_proj"] or any(word.rstrip("0123456789") in _EMBED_WORDS for word in words):
        return "embed"
    return _PROJECTIONS.get(last, other) if len(last) > 1 else other


def _last_word(words: Sequence[str]) -> str:
    return next((word for word in reversed(words) if word not in _WRAPPERS), words[-1] if words else "")


def _context(words: Sequence[str], modules: Mapping[str, nn.Module]) -> tuple[str, int]:
    """The nearest word or class on the path that says attention, MLP or neither, and where it stands."""
    for at in range(len(words) - 1, -1, -1):
        word = words[at].lower()
        if word in _NEITHER:
            return "neither", at
        cls = "" if at == len(words) - 1 else type(modules[".".join(words[: at + 1])]).__name__.lower()
        if "classifier" in cls:
            return "", -1
        if any(part in word or part in cls for part in _MLP_WORDS):
            return "mlp", at
        if any(part in word or part in cls for part in ATTENTION_WORDS):
            return "attn", at
    return "", -1


def _mlp_by_shape(container: str, owner: nn.Module, parameter: Tensor, modules: Mapping[str, nn.Module]) -> str:
    """In or out, for MLP layers with a number or an unknown word for a name: by shape, or by order if square."""
    rows, columns = parameter.shape[:2]
    if rows != columns:
        return "mlp_in" if rows > columns else "mlp_out"
    inside = [module for path, module in modules.items()
              if path.startswith(f"{container}.") and isinstance(module, nn.Linear | nn.Conv2d)]  # fmt: skip
    return "mlp_out" if len(inside) > 1 and owner is inside[-1] else "mlp_in"


def check_values(weights: Iterable[PrunableWeight]) -> None:
    """Refuse weights that cannot be pruned or analysed: meta tensors, other dtypes than floats, NaN or Inf.

    Raises:
        ValueError: names the weight.
    """
    for weight in weights:
        data = weight.parameter
        if data.is_meta:
            raise ValueError(f"{weight.name} is a meta tensor without values; load the checkpoint first")
        if data.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise ValueError(f"{weight.name} has dtype {data.dtype}; expected float32, float16, bfloat16 or float64")
        if not bool(torch.isfinite(data.detach()).all()):
            raise ValueError(f"{weight.name} has NaN or Inf entries; repair the checkpoint before pruning")
