"""A classifier cut behind one of its stages: what lies before is frozen and runs once, what follows is trained."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_balancemix.core.evaluation import evaluation_mode

_LISTS = ("blocks", "stages", "layers", "layer")
_NUMBERED = re.compile(r"(layer|stage|s)\d+")


def stages_of(model: PreTrainedModel) -> list[str]:
    """Names of a classifier's stages in their order, as `get_submodule` takes them; none where it has no such list.

    They are the entries of the outermost list of its backbone that is called blocks, stages, layers or layer, or the
    modules layer1, layer2, ... (ResNet) or s1, s2, ... (RegNet).
    """
    backbone = model.base_model
    root = "" if backbone is model else f"{model.base_model_prefix}."
    for name, module in sorted(backbone.named_modules(), key=lambda named: len(named[0].split(".")) * bool(named[0])):
        path = f"{root}{name}." if name else root
        children = dict(module.named_children())
        for called in _LISTS:
            entries = children.get(called)
            if isinstance(entries, nn.ModuleList | nn.Sequential) and len(entries) > 1:
                return [f"{path}{called}.{i}" for i in range(len(entries))]
        numbered = [f"{path}{child}" for child in children if _NUMBERED.fullmatch(child)]
        if len(numbered) > 1:
            return numbered
    return []


@dataclass(frozen=True)
class Cut:
    """Where a classifier is cut; made by :func:`cut_behind`."""

    stage: str
    """The last stage before the cut."""
    skipped: tuple[str, ...]
    """The modules that have run when it is reached."""
    frozen: frozenset[str]
    """The parameters and buffers that its output depends on."""

    def open(self, model: PreTrainedModel) -> None:
        """Let `pixel_values` be the stage's output: what has made it is passed by, and its parameters stand still.

        The model keeps all its weights, so that it is saved and loaded as the whole that it is.
        """
        for name in self.skipped:
            model.get_submodule(name).forward = _first
        for module in self._around(model):
            if hasattr(module, "_pos_embed"):  # of timm's ViTs, a method
                module._pos_embed = _first
        self._set_trained(model, trained=False)

    def close(self, model: PreTrainedModel) -> None:
        """Undo :meth:`open`: `pixel_values` are images again."""
        for name in self.skipped:
            vars(model.get_submodule(name)).pop("forward", None)
        for module in self._around(model):
            vars(module).pop("_pos_embed", None)
        self._set_trained(model, trained=True)

    def _around(self, model: nn.Module) -> Iterator[nn.Module]:
        parts = self.stage.split(".")
        return (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts)))

    def _set_trained(self, model: nn.Module, *, trained: bool) -> None:
        for name, parameter in model.named_parameters():
            if name in self.frozen:
                parameter.requires_grad_(trained)


def _first(*args: Any, **kwargs: Any) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def cut_behind(model: PreTrainedModel, num_stages: int, image_size: int) -> Cut:
    """The cut behind the first stages of a classifier, once it is known that the parts give what the whole does.

    Args:
        model: An image classifier of transformers, of timm or ours, with all weights trainable. It stays as it is.
        num_stages: N, how many stages lie before the cut.
        image_size: Pixels a side of the images.

    Raises:
        ValueError: The model has no stages or fewer than N, or its parts do not give what the whole does.
    """
    config = getattr(model.config, "backbone_config", model.config)
    kind = getattr(config, "architecture", None) or type(model).__name__  # timm's name
    works = "timm's EfficientNets, ResNets, ConvNeXts and ViTs, and transformers' ResNet, ConvNeXT and ViT, do"
    stages = stages_of(model)
    if not stages:
        raise ValueError(f"{kind} has no list of stages, of which frozen_stages freezes the first; {works}; use one.")
    if not 1 <= num_stages <= len(stages):
        raise ValueError(
            f"frozen_stages is {num_stages}; it must be 1 to {len(stages)}, the number of stages of {kind}; change it."
        )
    try:
        return _checked_cut(model, stages[num_stages - 1], image_size)
    except Exception as error:  # a model that is given what it was not made for raises what it likes
        where = f"behind its stage {num_stages} ({textwrap.shorten(str(error), 200)})"
        raise ValueError(f"{kind} cannot be cut {where}; {works}; use one.") from error


def _checked_cut(model: PreTrainedModel, stage: str, image_size: int) -> Cut:
    images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def used(output: Tensor) -> set[str]:
        gradients = torch.autograd.grad(output.sum(), list(parameters.values()), allow_unused=True)
        return {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}

    with evaluation_mode(model), torch.enable_grad():
        whole = model(pixel_values=images).logits
        activations, ran = _until(model, stage, images)
        skipped = tuple(name for name in ran if name.rpartition(".")[0] not in ran)
        inside = tuple(f"{name}." for name in skipped)
        before = used(activations) | {name for name in parameters if name.startswith(inside)}
        buffers = {name for name, _ in model.named_buffers() if name.startswith(inside)}
        cut = Cut(stage, skipped, frozenset(before | buffers))
        cut.open(model)
        try:
            cut._set_trained(model, trained=True)  # so that the use of what is to be frozen is seen
            logits = model(pixel_values=activations.detach()).logits
            shared = sorted(used(logits) & before)
        finally:
            cut.close(model)
    if shared:
        raise ValueError(f"{shared[0]} is used on both sides of it")
    if not torch.allclose(logits, whole, rtol=1e-4, atol=1e-5):
        raise ValueError("its parts do not give what the whole does")
    return cut


def activations_of(model: PreTrainedModel, stage: str) -> Callable[[Tensor], Tensor]:
    """The output of a stage in half precision, in evaluation mode and without gradients.

    Returns:
        A function from normalised images `(B, 3, S, S)` to maps `(B, C, H, W)`, or tokens `(B, T, C)`, float16; it
        raises a ValueError where they are beyond what half precision holds.
    """
    model.eval()

    def activations(images: Tensor) -> Tensor:
        with torch.no_grad():
            output, _ = _until(model, stage, images)
        half = output.half()
        if not half.isfinite().all():
            raise ValueError(
                f"the output of the stage {stage} reaches {output.abs().max():g}; it must be less than 65,504, which "
                "half precision holds; choose another number of frozen_stages."
            )
        return half

    return activations


class _Reached(Exception):  # noqa: N818, it is no error
    pass


def _until(model: nn.Module, stage: str, images: Tensor) -> tuple[Tensor, list[str]]:
    """A stage's output, and the names of all modules that have run by then; what follows does not run."""
    ran: list[str] = []
    outputs: list[Tensor] = []

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            ran.append(name)
            if name == stage:
                outputs.append(output)
                raise _Reached

        return record

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        with suppress(_Reached):
            model(pixel_values=images)
    finally:
        for handle in handles:
            handle.remove()
    if not outputs or not isinstance(outputs[0], Tensor):
        raise ValueError(f"{stage} gives no tensor")
    return outputs[0], ran
