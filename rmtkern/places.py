"""Modules in the places of others. It knows no kind of module."""

from collections.abc import Mapping

from torch import nn

__all__ = ["place_"]


def place_(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules where their names say.

    Args:
        model: changed in place.
        modules: module name -> what stands there from now on.
    """
    for name, module in modules.items():
        parent, _, key = name.rpartition(".")
        model.get_submodule(parent)._modules[key] = module
