"""QNN's execution provider for ONNX Runtime: its sessions, and context binaries for one HTP architecture each.

A context binary holds the graph as the Hexagon tensor processor (HTP) of one architecture runs it, compiled on the
host. Beside it lies a small ONNX file that wraps it in an ``EPContext`` operator. Tried with onnxruntime-qnn 2.7.0.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from portcall.targets.agent.errors import BadInput, CellFailed, UnsupportedError

PROVIDER = "QNNExecutionProvider"
DEFAULT_ARCHITECTURES = "73,75"
SOC_MODELS = {"68": 30, "69": 36, "73": 43, "75": 57, "79": 69, "81": 87}
"""HTP architecture -> the number of a chip with it: SM8350, SM8450, SM8550, SM8650, SM8750, SM8850.

The provider ignores an ``htp_arch`` that does not exist, and takes float16 only together with a chip's number.
Source: Qualcomm's table of supported Snapdragon devices, and ``soc_table.h`` of LiteRT.
"""
NO_FLOAT16 = ("68",)
"""Architectures whose contexts hold no float16: finalizing such a graph fails with QNN_COMMON_ERROR_MEM_ALLOC."""
BOUNDARY = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class Context:
    """A context binary as it was built: its wrapper, its own file, and what stayed outside.

    outside: "name (type)" of each operator that the processor does not run. boundary: the operators that quantize the
    inputs and dequantize the outputs, which run on the CPU by QNN's own default. partitions: EPContext operators.
    """

    architecture: str
    wrapper: str
    binaries: Tuple[str, ...]
    size_bytes: int
    seconds: float
    sdk: str
    partitions: int
    outside: Tuple[str, ...]
    boundary: Tuple[str, ...]

    @property
    def is_whole(self) -> bool:
        return self.partitions == 1 and not self.outside

    def to_json(self) -> Dict[str, Any]:
        return {
            "htp_arch": self.architecture,
            "soc_model": SOC_MODELS[self.architecture],
            "wrapper": self.wrapper,
            "binaries": list(self.binaries),
            "size_bytes": self.size_bytes,
            "seconds": round(self.seconds, 3),
            "qnn_sdk": self.sdk,
            "whole": self.is_whole,
            "partitions": self.partitions,
            "outside": list(self.outside),
            "boundary": list(self.boundary),
        }

    def note(self) -> str:
        """Return the sentence for the manifest."""
        built = f"context binary for HTP v{self.architecture}: {self.size_bytes} bytes, built in {self.seconds:.2f} s"
        if self.is_whole:
            return f"{built}, holds the whole graph"
        shown = ", ".join(self.outside[:20]) + (
            f" and {len(self.outside) - 20} more" if len(self.outside) > 20 else ""
        )
        return (
            f"{built}, does NOT hold the whole graph: {self.partitions} parts, {len(self.outside)} operators "
            f"outside them run on the CPU: {shown or 'none'}"
        )


def architectures(text: str, float16: bool) -> List[str]:
    """Return the HTP architectures of "73,75" or "v73,v75". Raises BadInput for unknown ones.

    float16: for a graph that computes in it, which the oldest ones do not.
    """
    wanted = list(dict.fromkeys(part.strip().lower().lstrip("v") for part in text.split(",")))
    unknown = [w for w in wanted if w not in SOC_MODELS]
    if unknown:
        raise BadInput(f"no HTP architecture {unknown[0]!r}", f"There are: {', '.join(SOC_MODELS)}")
    for name in NO_FLOAT16:
        if float16 and name in wanted:
            raise BadInput(
                f"HTP v{name} does not compute in float16", "Export int8 for it, or leave it out of htp_arch"
            )
    return wanted


def provider_options(architecture: str) -> Dict[str, str]:
    """Return the options of the provider for HTP *architecture*; what has no Q/DQ computes in float16."""
    import onnxruntime_qnn

    options = {
        "backend_path": str(onnxruntime_qnn.get_qnn_htp_path()),
        "htp_arch": architecture,
        "soc_model": str(SOC_MODELS[architecture]),
        "htp_graph_finalization_optimization_mode": "3",
    }
    if architecture not in NO_FLOAT16:
        options["enable_htp_fp16_precision"] = "1"
    return options


def devices() -> Sequence[Any]:
    """Return ONNX Runtime's devices of the QNN provider, its library registered once per process."""
    import onnxruntime as ort
    import onnxruntime_qnn

    found = [d for d in ort.get_ep_devices() if d.ep_name == PROVIDER]
    if not found:
        ort.register_execution_provider_library(PROVIDER, str(onnxruntime_qnn.get_library_path()))
        found = [d for d in ort.get_ep_devices() if d.ep_name == PROVIDER]
    if not found:
        raise CellFailed(
            "QNN's execution provider shows no device", "pip install 'portcall[qnn]' --force-reinstall"
        )
    return found[:1]


def open_session(path: Path, options: Any, provider: Mapping[str, str]) -> Any:
    """Return an InferenceSession on QNN. Raises CellFailed where the provider refuses its options or the graph."""
    import onnxruntime as ort

    options.add_provider_for_devices(devices(), dict(provider))
    try:
        # Without enable_fallback=0 a provider that fails is replaced by the CPU's, silently.
        session = ort.InferenceSession(str(path), options, enable_fallback=0)
    except Exception as error:  # ONNX Runtime raises kinds of its own, which are no public classes
        raise CellFailed(
            f"QNN refuses {path.name}: {str(error).splitlines()[0]}", "See the log for what QNN says of it"
        ) from error
    if PROVIDER not in session.get_providers():
        raise CellFailed(f"{path.name} did not load on QNN", "See the log for what QNN says of it")
    return session


def build_context(model: Path, architecture: str, provider: Optional[Mapping[str, str]] = None) -> Context:
    """Compile *model* for HTP *architecture*; write ``model_vNN.onnx`` and its binary beside it; return what it holds.

    provider: its options, where they are not those of ``provider_options``. Raises UnsupportedError where QNN took
    nothing of the graph: then ONNX Runtime makes a session all the same, without a context file. CellFailed where QNN
    refuses the graph or the wrapper names a file that is not there.
    """
    import onnx
    import onnxruntime as ort

    wrapper = model.with_name(f"model_v{architecture}.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("ep.context_enable", "1")
    options.add_session_config_entry("ep.context_file_path", str(wrapper))
    options.add_session_config_entry("ep.context_embed_mode", "0")
    start = time.perf_counter()
    session = open_session(model, options, provider or provider_options(architecture))
    seconds = time.perf_counter() - start
    del session
    if not wrapper.is_file():
        nodes = onnx.load(str(model), load_external_data=False).graph.node
        shown = ", ".join(f"{n.name} ({n.op_type})" for n in nodes[:5])
        raise UnsupportedError(
            f"QNN wrote no context for HTP v{architecture}: it runs none of the {len(nodes)} operators ({shown}, ...)",
            "Give the model fixed shapes (--shape) and operators that QNN has; see the log for its reasons",
        )
    return read_context(wrapper, architecture, seconds)


def read_context(wrapper: Path, architecture: str, seconds: float) -> Context:
    """Read a wrapper and check that the files it names are there. Raises CellFailed where one is not."""
    import onnx

    from portcall.exporters._operands import attribute

    graph = onnx.load(str(wrapper), load_external_data=False).graph
    contexts = [n for n in graph.node if n.op_type == "EPContext"]
    names = [attribute(n, "ep_cache_context", b"") for n in contexts]
    binaries = tuple(dict.fromkeys(name.decode() for name in names if name))
    for name in binaries:
        file = wrapper.parent / name
        if Path(name).name != name or not file.is_file() or not file.stat().st_size:
            raise CellFailed(
                f"{wrapper.name} names the context {name!r}, which is not there",
                "See the log; is the disk full?",
            )
    if not contexts or not binaries:
        raise CellFailed(
            f"{wrapper.name} wraps no context binary", "See the log for what QNN says of the graph"
        )
    inputs, outputs = {v.name for v in graph.input}, {v.name for v in graph.output}
    boundary: List[str] = []
    outside: List[str] = []
    for node in graph.node:
        if node.op_type == "EPContext":
            continue
        at_edge = bool(inputs & set(node.input)) or bool(outputs & set(node.output))
        is_boundary = node.op_type in BOUNDARY and at_edge
        (boundary if is_boundary else outside).append(f"{node.name} ({node.op_type})")
    sdk = attribute(contexts[0], "ep_sdk_version", b"").decode()
    size = sum((wrapper.parent / name).stat().st_size for name in binaries)
    return Context(
        architecture,
        wrapper.name,
        binaries,
        size,
        seconds,
        sdk,
        len(contexts),
        tuple(outside),
        tuple(boundary),
    )
