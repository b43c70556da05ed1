"""Turn the trained parts of a task into optimiser groups, and freeze everything else.

A frozen module stays in eval mode, so that its dropout is off and its statistics do not change.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from imagine.errors import ConfigError
from imagine.settings import unknown_name
from train.run.checkpoint import gather_full, is_sharded, sharded_like
from train.run.muon import MuonAdamW, updates_of

Parts = dict[str, list[nn.Parameter]]
_LARGE_ENOUGH = 4096  # values in a parameter from which bitsandbytes stores its moments in 8 bits
_BLOCK = 256  # values that share one float as their scale in bitsandbytes


def choose(offered: Mapping[str, Sequence[nn.Parameter]], rates: Mapping[str, float], stage: str) -> Parts:
    """Return the parts named in `rates`; ConfigError for a part that is unknown, empty or overlaps another."""
    chosen: Parts = {}
    owner: dict[int, str] = {}
    for name in rates:
        if name not in offered:
            raise ConfigError(f"stage {stage}: {unknown_name('part', name, sorted(offered))}.")
        if not offered[name]:
            raise ConfigError(f"stage {stage}: the part {name} has no parameters with these settings; leave it out.")
        for parameter in offered[name]:
            other = owner.setdefault(id(parameter), name)
            if other != name:
                raise ConfigError(f"stage {stage}: parts {other} and {name} share parameters; train one of them.")
        chosen[name] = list(dict.fromkeys(offered[name]))
    return chosen


def named(modules: Mapping[str, nn.Module], chosen: Parts) -> dict[str, nn.Parameter]:
    """Return the chosen parameters by path (module name first), in the modules' order.

    A parameter that several modules hold, as LoRA inside a denoiser, belongs to the last of them.
    """
    owner = _owners(modules)
    wanted = {id(parameter) for parameters in chosen.values() for parameter in parameters}
    found = {
        f"{module}.{path}": parameter
        for module, network in modules.items()
        for path, parameter in network.named_parameters()
        if id(parameter) in wanted and owner[id(parameter)] == module
    }
    assert len({id(parameter) for parameter in found.values()}) == len(wanted), "a part holds parameters of no module"
    return found


def parameters_at(modules: Mapping[str, nn.Module], paths: Iterable[str]) -> dict[str, nn.Parameter]:
    """Return the current parameters at these paths (module name first)."""
    found = {f"{module}.{path}": p for module, network in modules.items() for path, p in network.named_parameters()}
    return {path: found[path] for path in paths}


def freeze_all_but(modules: Mapping[str, nn.Module], chosen: Parts) -> list[str]:
    """Require gradients for the chosen parameters only; return the names of the modules that train."""
    for network in modules.values():
        network.requires_grad_(False)
    for parameters in chosen.values():
        for parameter in parameters:
            parameter.requires_grad_(True)
    owner = _owners(modules)
    return [
        name
        for name, network in modules.items()
        if any(p.requires_grad and owner[id(p)] == name for p in network.parameters())
    ]


def _owners(modules: Mapping[str, nn.Module]) -> dict[int, str]:
    """Return the name of the module that each parameter belongs to, by the parameter's id."""
    return {id(parameter): name for name, network in modules.items() for parameter in network.parameters()}


def train_mode(modules: Mapping[str, nn.Module], training: Sequence[str]) -> None:
    """Set the modules named in `training` to train mode and all others to eval mode."""
    for name, network in modules.items():
        network.train(name in training)


@contextmanager
def unsharded(modules: Iterable[nn.Module], keeps_full: bool) -> Iterator[None]:
    """Within the block, sharded modules have full parameters and can be used without communication.

    Every process must enter. A process with `keeps_full` False only contributes its shards; its modules do not change.
    """
    network = nn.ModuleList(modules)
    sharded = [(m, n, p) for m in network.modules() for n, p in m.named_parameters(recurse=False) if is_sharded(p)]
    full: dict[nn.Parameter, nn.Parameter] = {}
    for parameter in dict.fromkeys(parameter for _, _, parameter in sharded):
        tensor = gather_full(parameter.detach())
        if keeps_full:
            full[parameter] = nn.Parameter(tensor, parameter.requires_grad)
    units = [
        module for module in network.modules() if keeps_full and hasattr(module, "set_requires_gradient_sync")
    ]  # FSDP's
    hooks = [(unit._forward_pre_hooks, unit._forward_hooks) for unit in units]  # they would wait for other processes
    owners = {id(module): module for module, _, _ in sharded if keeps_full}.values()
    loaders = [owner._load_state_dict_post_hooks for owner in owners]  # they would expect shards
    try:
        for unit in units:
            unit._forward_pre_hooks, unit._forward_hooks = OrderedDict(), OrderedDict()
        for owner in owners:
            owner._load_state_dict_post_hooks = OrderedDict()
        for module, name, parameter in sharded:
            setattr(module, name, full.get(parameter, parameter))
        yield
    finally:
        for module, name, parameter in sharded:
            setattr(module, name, parameter)
        for unit, (before, after) in zip(units, hooks, strict=True):
            unit._forward_pre_hooks, unit._forward_hooks = before, after
        for owner, after in zip(owners, loaders, strict=True):
            owner._load_state_dict_post_hooks = after


def optimiser(
    chosen: Parts,
    rates: Mapping[str, float],
    betas: tuple[float, float],
    weight_decay: float,
    muon: Sequence[str] = (),
    kind: str = "adamw",
) -> torch.optim.Optimizer:
    """Return an optimiser with two groups per part: matrices with weight decay; gains, biases and scalars without.

    The latter have fewer than 2 axes. It is fused AdamW, or bitsandbytes' AdamW if `kind` is "adamw8bit". Muon trains
    the matrices of the parts in `muon`.
    """
    groups: list[dict[str, Any]] = []
    for part, parameters in chosen.items():
        for decays in (True, False):
            members = [parameter for parameter in parameters if (parameter.ndim >= 2) == decays]
            if members:
                rate, decay = rates[part], weight_decay if decays else 0.0
                groups.append({"params": members, "part": part, "rate": rate, "lr": rate, "weight_decay": decay})
    if kind == "adamw8bit":
        return _adamw8bit(groups, betas)
    if not muon:
        return torch.optim.AdamW(groups, betas=betas, fused=True)
    for group in groups:
        group["muon"] = group["part"] in muon and group["params"][0].ndim >= 2
    return _DistributedMuonAdamW(groups, betas)


class _DistributedMuonAdamW(MuonAdamW):
    """Muon for several processes: each orthogonalises a share of the matrices and sends it to the others.

    Sharded matrices are gathered first: on the shards themselves the iterations would be wrong.
    """

    def orthogonalised(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        full = [gather_full(matrix) if is_sharded(matrix) else matrix for matrix in matrices]
        updates = updates_of(full)
        pairs = zip(matrices, updates, strict=True)
        return [sharded_like(update, matrix) if is_sharded(matrix) else update for matrix, update in pairs]


def _adamw8bit(groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.Optimizer:
    """Return AdamW with 8-bit moments; ConfigError if bitsandbytes is missing or does not support this device."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ConfigError(
            "optimiser adamw8bit needs bitsandbytes: run `pip install bitsandbytes`, or use optimiser adamw."
        ) from None
    device = groups[0]["params"][0].device
    trial = nn.Parameter(torch.zeros(_LARGE_ENOUGH, device=device))
    trial.grad = torch.zeros_like(trial)
    try:
        AdamW8bit([trial]).step()
    except Exception as error:  # bitsandbytes raises different errors on devices without kernels
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"optimiser adamw8bit does not work on {device} ({type(error).__name__}: {reason}); use optimiser adamw."
        ) from None
    optimiser: torch.optim.Optimizer = AdamW8bit(groups, betas=betas)
    return optimiser


def bytes_per_state_value(parameter: nn.Parameter, kind: str) -> float:
    """Return the bytes per value of this parameter for each of its optimiser states."""
    return 1 + 4 / _BLOCK if kind == "adamw8bit" and parameter.numel() >= _LARGE_ENOUGH else 4


def set_rates(optimiser: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to its part's rate times `factor`."""
    for group in optimiser.param_groups:
        group["lr"] = group["rate"] * factor


def sizes(chosen: Parts) -> dict[str, int]:
    """Return the number of trained parameters per part."""
    return {part: sum(parameter.numel() for parameter in parameters) for part, parameters in chosen.items()}
