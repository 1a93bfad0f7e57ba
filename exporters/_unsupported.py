"""An operator that a converter does not know, by name, with the line of the user's model that made it."""

from __future__ import annotations

import re
from typing import Any, Iterator, Optional, Sequence, Tuple

from portcall.targets.agent.errors import UnsupportedError

REPLACEMENTS: Sequence[Tuple[str, str]] = (
    (r"fft|stft|spectrogram", "Compute the transform outside the model, or as a product with a constant matrix"),
    (r"linalg|svd|eig|cholesky|lu_|qr|solve|inverse|det", "Compute the decomposition outside the model"),
    (r"nms|nonmaxsup|roi_|deform", "End the model before the post-processing, and do that outside"),
    (r"nonzero|unique|masked_select|index_put|bincount|histc", "Replace it by torch.where with fixed shapes"),
    (r"special_|digamma|lgamma|igamma|bessel", "Approximate it by exp, log, erf or a polynomial"),
    (r"multinomial|bernoulli|rand|normal_|uniform|dropout", "Draw random numbers outside, and make them an input"),
    (r"scaled_dot_product|attention", "Write it as two products with a softmax between them"),
    (r"grid_sample|grid_sampler|affine_grid", "Replace it by torch.nn.functional.interpolate"),
    (r"complex|view_as_real|polar|angle", "Keep the real and the imaginary part as two tensors"),
    (r"cumsum|cumprod|logcumsumexp", "Write it as a product with a constant triangular matrix"),
    (r"sort|topk|kthvalue|median|mode", "Sort outside the model, or use max or argmax"),
)  # fmt: skip
DEFAULT = "Write it with other operators, or compute it outside the model"


def replacement_for(operator: str) -> str:
    """Return what to use instead of an operator, by its name."""
    return next((advice for pattern, advice in REPLACEMENTS if re.search(pattern, operator.lower())), DEFAULT)


def explain(error: BaseException, program: Any, target: str) -> Optional[UnsupportedError]:
    """Return the error to raise instead where a conversion of *program* ended at an operator, else None.

    program: the torch.export.ExportedProgram. target: what it was to become ("ONNX", "TFLite").
    """
    name = next((n for text in _texts(error) for n in _operators(text)), None)
    if name is None:
        return None
    where = _location(program, name)
    return UnsupportedError(
        f"{target} has no operator for torch's {name}{f' ({where})' if where else ''}", replacement_for(name)
    )


def _texts(error: Optional[BaseException]) -> Iterator[str]:
    """Yield what an error and those that caused it say, the first cause first."""
    if error is not None:
        yield from _texts(error.__cause__ or error.__context__)
        yield str(error)


def _operators(text: str) -> Iterator[str]:
    """Yield the names of the torch operators that a converter's message calls unknown."""
    patterns = (
        r"No ONNX function found for <OpOverload\(op='([\w.]+)'",
        r"Lowering not found: ([\w.]+?)(?:\.[a-zA-Z_]+)?(?:\s|$)",
        r"convert function for op '([\w.]+)' not implemented",
    )
    for pattern in patterns:
        yield from re.findall(pattern, text)


def _location(program: Any, name: str) -> str:
    """Return "file.py:12: the source line" of the first node of that operator, "" where it is not known.

    The operator may come into being only by a decomposition.
    """
    stem = name.rpartition(".")[2].lstrip("_")
    graphs = [program.graph]
    try:
        graphs.append(program.run_decompositions().graph)
    except Exception:  # a program that cannot be decomposed has the converter's error to tell
        return ""
    for node in (node for graph in graphs for node in graph.nodes):
        if stem not in str(node.target):
            continue
        trace = node.meta.get("stack_trace") or ""
        frames = re.findall(r'File "([^"]+)", line (\d+)[^\n]*\n\s*(\S[^\n]*)', trace)
        if frames:
            file, line, code = frames[-1]
            return f"{file.rpartition('/')[2]}:{line}: {code.strip()}"
    return ""
