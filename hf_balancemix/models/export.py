"""Models as ONNX files, for runtimes without PyTorch."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hf_balancemix.files import whole_file
from hf_balancemix.models.peft_models import merged_copy

logger = logging.getLogger(__name__)

_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_TOLERANCE = 1e-4


class _Logits(nn.Module):
    """A classifier of transformers as a function from tensor to tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).logits


def export_onnx(model: nn.Module, path: str | os.PathLike[str], image_size: int) -> Path:
    """Write the model as one ONNX file that takes any batch size and, where the architecture does, any image size.

    Convolutional networks take any size; most transformers take that of training only. Which it is, is logged.

    Its input `pixel_values` is `(batch, 3, height, width)` float32, normalised as the image processor does; its output
    `logits` is `(batch, K)` float32, from which a sigmoid makes probabilities. What is exported is a copy of the model
    in evaluation mode and float32. Before the file appears, its logits are compared in onnxruntime with those of
    torch, to 1e-4, at another batch size (and image size) than it was traced at.

    Args:
        model: An image classifier of transformers; the adapters of a `peft.PeftModel` are merged into it.
        path: The file, `.onnx`; one that exists is replaced by a whole one.
        image_size: Pixels a side of the images that the model was trained on.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        ValueError: The architecture cannot be exported, or not rightly; the message says why.
        OSError: The file cannot be written.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"ONNX export needs {' and '.join(missing)}: pip install 'hf_balancemix[onnx]' (or {' '.join(_NEEDED)})."
        )
    model = merged_copy(getattr(model, "_orig_mod", model))  # out of torch.compile's wrapper
    model.__dict__.pop("forward", None)  # accelerate's wrapper for mixed precision, which is about the original
    logits = _Logits(model).float().cpu().eval()
    with whole_file(path) as temporary:
        for dynamic in (True, False):
            dynamic_axes = {0: "batch"} | ({2: "height", 3: "width"} if dynamic else {})
            try:
                with torch.no_grad():
                    program = torch.onnx.export(
                        logits,
                        (torch.zeros(2, 3, image_size, image_size),),  # a batch of 1 would be taken for a constant
                        dynamo=True,
                        input_names=["pixel_values"],
                        output_names=["logits"],
                        dynamic_shapes=(dynamic_axes,),
                        verbose=False,
                    )
                program.save(temporary, external_data=False)
                _compare(temporary, logits, image_size + 40 if dynamic else image_size)
                break
            except Exception as error:  # torch, onnxscript and onnxruntime raise what they like
                problem = error
                logger.debug("Export for %s failed.", "any size" if dynamic else "one size", exc_info=True)
        else:
            first_line = (str(problem).strip().splitlines() or ["no reason given"])[0]
            raise ValueError(
                f"{type(model).__name__} cannot be exported to ONNX ({type(problem).__name__}: {first_line}); "
                "use another architecture, or a newer torch and onnxscript."
            ) from problem
    logger.info("Wrote %s, for %s.", path, "any image size" if dynamic else f"images of {image_size} x {image_size}")
    return Path(path)


def _compare(file: Path, logits: _Logits, image_size: int) -> None:
    """Raises a ValueError where onnxruntime and torch differ, on three images of noise."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised, too
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    pixels = torch.randn(3, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = logits(pixels).numpy()
    found = session.run(["logits"], {"pixel_values": pixels.numpy()})[0]
    if found.shape != expected.shape or not np.abs(found - expected).max() <= _TOLERANCE:
        raise ValueError(f"its logits differ from those of torch by {np.abs(found - expected).max():.2g}")
