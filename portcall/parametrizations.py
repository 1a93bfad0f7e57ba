"""Torch parametrizations of a module's weights, folded on a copy: what is exported then holds plain weights.

torch.nn.utils.prune, torch.nn.utils.parametrize (parametrizations.weight_norm, orthogonal, your own), and the older
torch.nn.utils.weight_norm and spectral_norm.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SHOWN = 5


def fold(module: torch.nn.Module) -> tuple[torch.nn.Module, tuple[str, ...]]:
    """Return a copy of *module* (in eval mode) with plain weights, and a note per kind of what was folded.

    A module without parametrizations is returned as it is.
    """
    import torch

    if not _hooked(module) and not torch.nn.utils.parametrize.is_parametrized(module):
        return module, ()
    folded = _copied(module)
    done: dict[str, list[str]] = {}
    for path, part in folded.named_modules():
        for hook, tensor in _hooks_of(part):
            done.setdefault(_kind(hook), []).append(_joined(path, tensor))
            _remove(part, hook, tensor)
    for path, part in list(folded.named_modules()):
        if not torch.nn.utils.parametrize.is_parametrized(part):
            continue
        held: Any = part.parametrizations
        # torch takes the property off the class, which a deep copy shares with the module that it came from.
        kind = type(part)
        part.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
        for tensor in list(held):
            kinds = " and ".join(type(p).__name__.lstrip("_") for p in held[tensor])
            done.setdefault(f"parametrization {kinds}", []).append(_joined(path, tensor))
            torch.nn.utils.parametrize.remove_parametrizations(part, tensor, leave_parametrized=True)
    return folded, tuple(f"folded {how} of {_shown(names)} into plain weights" for how, names in done.items())


def training_parts(module: torch.nn.Module) -> list[str]:
    """Return the names of the submodules that are in training mode although *module* may be in eval mode.

    Of a traced graph only those count that compute something else then: torch.ao's conversion leaves the flags of its
    own modules as they come.
    """
    import torch

    traced = isinstance(module, torch.fx.GraphModule)
    kinds = (torch.nn.modules.batchnorm._NormBase, torch.nn.modules.dropout._DropoutNd)
    return [
        f"{name} ({type(part).__name__})"
        for name, part in module.named_modules()
        if part.training and (not traced or isinstance(part, kinds))
    ]


def _hooked(module: torch.nn.Module) -> bool:
    return any(True for part in module.modules() for _ in _hooks_of(part))


def _hooks_of(part: torch.nn.Module) -> list[tuple[Any, str]]:
    """Return the hooks of *part* that compute a weight before each run, with the name of that weight."""
    from torch.nn.utils.prune import BasePruningMethod
    from torch.nn.utils.spectral_norm import SpectralNorm
    from torch.nn.utils.weight_norm import WeightNorm

    found: list[tuple[Any, str]] = []
    for hook in part._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            found.append((hook, str(hook._tensor_name)))
        elif isinstance(hook, SpectralNorm | WeightNorm):
            found.append((hook, str(hook.name)))
    return found


def _kind(hook: Any) -> str:
    from torch.nn.utils.prune import BasePruningMethod

    if isinstance(hook, BasePruningMethod):
        return "torch.nn.utils.prune"
    return "weight_norm" if type(hook).__name__ == "WeightNorm" else "spectral_norm"


def _remove(part: torch.nn.Module, hook: Any, tensor: str) -> None:
    from torch.nn.utils import prune, remove_spectral_norm, remove_weight_norm

    if isinstance(hook, prune.BasePruningMethod):
        prune.remove(part, tensor)  # type: ignore[no-untyped-call]  # torch types it not
    elif type(hook).__name__ == "WeightNorm":
        remove_weight_norm(part, tensor)
    else:
        remove_spectral_norm(part, tensor)


def _copied(module: torch.nn.Module) -> torch.nn.Module:
    """Return a deep copy. What a hook computed is no leaf, which torch refuses to copy: it is detached, the next run
    computes it again."""
    import torch

    for part in module.modules():
        for _, tensor in _hooks_of(part):
            value = part.__dict__.get(tensor)
            if isinstance(value, torch.Tensor):
                part.__dict__[tensor] = value.detach()
    return copy.deepcopy(module)


def _joined(path: str, tensor: str) -> str:
    return f"{path}.{tensor}" if path else tensor


def _shown(names: list[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest
