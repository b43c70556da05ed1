"""Named parts of a task's modules become optimiser groups; everything else is frozen, and a typo is refused.

A frozen module stays in eval mode, so that its dropout and statistics stay still too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from imagine.errors import ConfigError
from train.config import unknown_name
from train.muon import MuonAdamW

Parts = dict[str, list[nn.Parameter]]


def choose(offered: Mapping[str, Sequence[nn.Parameter]], rates: Mapping[str, float], stage: str) -> Parts:
    """The parts that `rates` names; ConfigError for a part that is unknown, empty or overlaps another."""
    chosen: Parts = {}
    owner: dict[int, str] = {}
    for name in rates:
        if name not in offered:
            raise ConfigError(f"stage {stage}: {unknown_name('part', name, sorted(offered))}.")
        if not offered[name]:
            raise ConfigError(f"stage {stage}: the part {name} holds no parameters with these settings; leave it out.")
        for parameter in offered[name]:
            other = owner.setdefault(id(parameter), name)
            if other != name:
                raise ConfigError(f"stage {stage}: parts {other} and {name} share parameters; train one of them.")
        chosen[name] = list(dict.fromkeys(offered[name]))
    return chosen


def named(modules: Mapping[str, nn.Module], chosen: Parts) -> dict[str, nn.Parameter]:
    """The chosen parameters by path (module name first), in the modules' own order."""
    wanted = {id(parameter) for parameters in chosen.values() for parameter in parameters}
    found = {
        f"{module}.{path}": parameter
        for module, network in modules.items()
        for path, parameter in network.named_parameters()
        if id(parameter) in wanted
    }
    assert len({id(parameter) for parameter in found.values()}) == len(wanted), "a part holds parameters of no module"
    return found


def freeze_all_but(modules: Mapping[str, nn.Module], chosen: Parts) -> list[str]:
    """Let only the chosen parameters have gradients; the names of the modules that train."""
    for network in modules.values():
        network.requires_grad_(False)
    for parameters in chosen.values():
        for parameter in parameters:
            parameter.requires_grad_(True)
    return [name for name, network in modules.items() if any(p.requires_grad for p in network.parameters())]


def train_mode(modules: Mapping[str, nn.Module], training: Sequence[str]) -> None:
    """Modules named in `training` in train mode, the others in eval mode; none named: all in eval mode."""
    for name, network in modules.items():
        network.train(name in training)


def optimiser(
    chosen: Parts, rates: Mapping[str, float], betas: tuple[float, float], weight_decay: float, muon: Sequence[str] = ()
) -> torch.optim.Optimizer:
    """Two groups per part: matrices decay; gains, biases and scalars (fewer than 2 axes) do not.

    Fused AdamW; the matrices of the parts named in `muon` are left to Muon.
    """
    groups: list[dict[str, Any]] = []
    for part, parameters in chosen.items():
        for decays in (True, False):
            members = [parameter for parameter in parameters if (parameter.ndim >= 2) == decays]
            if members:
                rate, decay = rates[part], weight_decay if decays else 0.0
                groups.append({"params": members, "part": part, "rate": rate, "lr": rate, "weight_decay": decay})
    if not muon:
        return torch.optim.AdamW(groups, betas=betas, fused=True)
    for group in groups:
        group["muon"] = group["part"] in muon and group["params"][0].ndim >= 2
    return MuonAdamW(groups, betas)


def set_rates(optimiser: torch.optim.Optimizer, factor: float) -> None:
    """Every group's learning rate is its part's rate times `factor`."""
    for group in optimiser.param_groups:
        group["lr"] = group["rate"] * factor


def sizes(chosen: Parts) -> dict[str, int]:
    """Number of trained parameters per part."""
    return {part: sum(parameter.numel() for parameter in parameters) for part, parameters in chosen.items()}
