"""What can be seen on a module of somebody who wrapped it."""

from __future__ import annotations

from torch import nn

__all__ = ["differences", "traces"]

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def traces(model: nn.Module) -> dict[str, object]:
    """Attributes, hooks and modes of every module and hooks of every parameter, by a name that says where."""
    found: dict[str, object] = {}
    for name, module in model.named_modules():
        found[f"class of {name!r}"] = type(module)
        found[f"attributes of {name!r}"] = sorted(vars(module))
        found[f"mode of {name!r}"] = module.training
        for hooks in _HOOKS:
            found[f"{hooks} of {name!r}"] = len(getattr(module, hooks, None) or ())
    for name, parameter in model.named_parameters():
        found[f"hooks of parameter {name!r}"] = (
            len(parameter._backward_hooks or ()),
            len(getattr(parameter, "_post_accumulate_grad_hooks", None) or ()),
        )
        found[f"requires_grad of {name!r}"] = parameter.requires_grad
    found["state dict"] = list(model.state_dict())
    return found


def differences(before: dict[str, object], after: dict[str, object]) -> tuple[str, ...]:
    """Where two traces differ."""
    return tuple(sorted(name for name in {*before, *after} if before.get(name) != after.get(name)))
