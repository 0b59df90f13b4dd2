"""SpectralLinear: a linear whose weight is low rank plus sparse, y = x (B A + S)ᵀ + b, trainable; and the way back.

It knows neither why a weight was divided nor how it is stored for speed.
"""

from collections.abc import Mapping
from typing import Self

from torch import Tensor, nn
from torch.nn import functional as F

from rmtkern.places import place_

__all__ = ["SpectralLinear", "divide_as_", "merge_factors_", "spectral_linears"]

_FACTOR = ".factor_a"


class SpectralLinear(nn.Linear):
    """y = x Sᵀ + (x Aᵀ) Bᵀ + b. `weight` is S, so that masks, pruning and fine-tuning see the sparse part.

    Its parameters are `weight` [N, K], `factor_a` [R, K], `factor_b` [N, R] and, if it has one, `bias` [N].

    Args:
        source: whose bias and mode it takes over.
        b: [N, R], 1 <= R <= min(N, K).
        a: [R, K].
        s: [N, K].

    Raises:
        ValueError: shapes that do not fit.
    """

    factor_a: nn.Parameter
    factor_b: nn.Parameter

    def __init__(self, source: nn.Linear, b: Tensor, a: Tensor, s: Tensor) -> None:
        shape, rank = (source.out_features, source.in_features), a.shape[0]
        if tuple(s.shape) != shape or tuple(a.shape) != (rank, shape[1]) or tuple(b.shape) != (shape[0], rank):
            raise ValueError(
                f"expected factors [{shape[0]}, R] and [R, {shape[1]}] and a rest {list(shape)}, got "
                f"{list(b.shape)}, {list(a.shape)} and {list(s.shape)}"
            )
        if not 1 <= rank <= min(shape):
            raise ValueError(f"expected a rank of 1 to {min(shape)} for a weight {list(shape)}, got {rank}")
        super().__init__(source.in_features, source.out_features, bias=source.bias is not None, device="meta")
        trained = source.weight.requires_grad
        self.weight = nn.Parameter(s, trained)
        self.factor_a, self.factor_b = nn.Parameter(a, trained), nn.Parameter(b, trained)
        if source.bias is not None:
            self.bias = source.bias
        self.train(source.training)

    @classmethod
    def of(cls, source: nn.Linear, b: Tensor, a: Tensor) -> Self:
        """A linear divided into given factors and what they leave, in its dtype.

        Args:
            source: not changed; the bias is shared.
            b: [N, R], any float dtype.
            a: [R, K].
        """
        dtype = source.weight.dtype
        b, a = b.detach().to(dtype).contiguous(), a.detach().to(dtype).contiguous()
        rest = source.weight.detach().double() - b.double() @ a.double()
        return cls(source, b, a, rest.to(dtype))

    @property
    def rank(self) -> int:
        """R."""
        return self.factor_a.shape[0]

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return F.linear(input, self.weight, self.bias) + F.linear(F.linear(input, self.factor_a), self.factor_b)

    def merged(self) -> nn.Linear:
        """A plain linear with the weight B A + S, summed in float64 and rounded once; the bias is shared."""
        whole = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        product = self.factor_b.detach().double() @ self.factor_a.detach().double()
        value = (product + self.weight.detach().double()).to(self.weight.dtype)
        whole.weight = nn.Parameter(value, self.weight.requires_grad)
        if self.bias is not None:
            whole.bias = self.bias
        return whole.train(self.training)

    def extra_repr(self) -> str:
        """As nn.Linear, with the rank."""
        return f"{super().extra_repr()}, rank={self.rank}"


def spectral_linears(model: nn.Module) -> dict[str, SpectralLinear]:
    """The low-rank plus sparse linears of a model, by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SpectralLinear)}


def merge_factors_(model: nn.Module) -> int:
    """Turn every low-rank plus sparse linear that `prune_(pattern="spectral")` left into a plain one, in place.

    The model computes the same up to one rounding of each weight; the weights are dense then, and keep no zeros. For
    code that reads weights by name: other libraries, `certify`, the dense checkpoint of the original architecture.

    Args:
        model: changed in place; new parameters, so make optimizers afterwards.

    Returns:
        How many there were.

    Raises:
        TypeError: not a module.
        ValueError: the model itself is such a linear, which cannot be swapped in place; call its `merged()`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, SpectralLinear):
        raise ValueError("model: a lone SpectralLinear cannot be swapped in place; use linear = module.merged()")
    found = spectral_linears(model)
    place_(model, {name: module.merged() for name, module in found.items()})
    return len(found)


def divide_as_(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """Give a model the low-rank plus sparse linears that a state dict has, so that it can be loaded.

    Args:
        model: changed in place where the state dict has factors and the model a plain nn.Linear.
        state: name -> tensor.

    Returns:
        Module name -> what stood there, for `place_`; other factors and shapes are left to whoever loads.
    """
    before: dict[str, nn.Module] = {}
    modules = dict(model.named_modules())
    for name in [key.removesuffix(_FACTOR) for key in state if key.endswith(_FACTOR)]:
        module, a, b = modules.get(name), state[f"{name}{_FACTOR}"], state.get(f"{name}.factor_b")
        if type(module) is not nn.Linear or b is None or a.ndim != 2 or b.ndim != 2:
            continue
        if a.shape[1] == module.in_features and b.shape == (module.out_features, a.shape[0]):
            weight = module.weight.detach()
            blank = SpectralLinear(module, weight.new_zeros(b.shape), weight.new_zeros(a.shape), weight.clone())
            before[name] = module
            place_(model, {name: blank})
    return before
