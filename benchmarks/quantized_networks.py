"""Three small quantization-aware trained networks on scikit-learn's digits, one per way that such models come.

``write(folder)`` trains them by seed and leaves ``pt2e.pt2`` (torchao pt2e), ``fx.pt`` (torch.ao FX: its factory is
``benchmarks.quantized_networks:fx``), ``qdq.onnx`` (an ONNX file with Q/DQ as other tools write it) and the labelled
``evaluation.npz``. The factory finds ``fx.pt`` in PORTCALL_QUANTIZED_NETWORKS.
"""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

FOLDER = "PORTCALL_QUANTIZED_NETWORKS"
TRAINING, EVALUATED = 1200, 597
BATCH = {0: torch.export.Dim.DYNAMIC}
Arrays = tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]


class Network(nn.Module):
    """Convolution, depthwise one, shortcut, pooling, a padded convolution with stride 2, mean, product."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.deep = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Linear(16, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image)
        x = self.relu(self.body(self.depthwise(x)) + x)
        x = self.deep(self.pool(x))
        x = nn.functional.adaptive_avg_pool2d(x, 1)
        return self.head(torch.flatten(x, 1))  # type: ignore[no-any-return]  # nn.Module returns Any


def digits() -> Arrays:
    """Return images float32[n, 1, 8, 8] from -1 to 1 and their labels, in an order drawn by seed."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = (data.images[:, None] / 8.0 - 1.0).astype(np.float32)
    return images[order], data.target[order].astype(np.int64)


def train(model: Any, steps: int, rate: float) -> Any:
    """Train *model* in place on the first 1200 digits; return it."""
    images, labels = (a[:TRAINING] for a in digits())
    optimizer = torch.optim.Adam(model.parameters(), rate)
    rng = np.random.default_rng(1)
    for _ in range(steps):
        chosen = rng.integers(0, TRAINING, 64)
        wanted = torch.from_numpy(labels[chosen])
        loss = nn.functional.cross_entropy(model(torch.from_numpy(images[chosen])), wanted)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not type it
        optimizer.step()
    return model


def trained(steps: int) -> Network:
    torch.manual_seed(0)
    return train(Network().train(), steps, 3e-3)  # type: ignore[no-any-return]  # what went in


def examples() -> tuple[torch.Tensor, ...]:
    return (torch.from_numpy(digits()[0][:2]),)


def pt2e(network: Network, steps: int) -> Any:
    """Return *network* trained on with torchao's pt2e and converted, as an ExportedProgram."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization.pt2e import move_exported_model_to_eval, move_exported_model_to_train
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
        from torchao.testing.pt2e._xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )

        config = get_symmetric_quantization_config(is_per_channel=True, is_qat=True)
        exported = torch.export.export(network.train(), examples(), dynamic_shapes=(BATCH,)).module()
        model = prepare_qat_pt2e(exported, XNNPACKQuantizer().set_global(config))
        train(move_exported_model_to_train(model), steps, 1e-3)
        model = convert_pt2e(move_exported_model_to_eval(model))
        return torch.export.export(model, examples(), dynamic_shapes=(BATCH,))


def fx_prepared(network: Network) -> Any:
    """Return *network* prepared by torch.ao FX for quantization-aware training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import get_default_qat_qconfig_mapping
        from torch.ao.quantization.quantize_fx import prepare_qat_fx

        return prepare_qat_fx(network.train(), get_default_qat_qconfig_mapping("fbgemm"), examples())


def fx() -> tuple[Any, ...]:
    """Factory: the converted FX network whose training state is in ``fx.pt``."""
    from torch.ao.quantization.quantize_fx import convert_fx

    model = fx_prepared(Network())
    model(*examples())  # observers take their shapes from a first run
    model.load_state_dict(torch.load(Path(os.environ[FOLDER]) / "fx.pt"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return convert_fx(model.eval()), examples(), (BATCH,)


class FakeQuantized(nn.Module):
    """The folded network with torch's own fake quantization: uint8 activations, int8 weights per channel."""

    STAGES = ("stem", "depthwise", "body", "deep")

    def __init__(self, network: Network) -> None:
        super().__init__()
        for name in self.STAGES:
            stage = getattr(network.eval(), name)
            self.add_module(name, torch.nn.utils.fusion.fuse_conv_bn_eval(stage[0], stage[1]))
        self.head = copy.deepcopy(network.head)
        self.ends = {n: [0.0, 0.0] for n in ("image", *self.STAGES, "sum", "mean", "output")}

    def parameters_of(self, name: str) -> tuple[float, int]:
        """Return scale and zero point of an activation (uint8)."""
        low, high = self.ends[name]
        scale = float(np.float32((high - low) / 255))
        return scale, round(-low / scale)

    def weight_scales(self, layer: Any) -> torch.Tensor:
        scales: torch.Tensor = layer.weight.detach().abs().flatten(1).amax(1) / 127
        return scales

    def activation(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if self.training:  # a moving maximum, as observers keep
            low, high = self.ends[name]
            x_low, x_high = (float(v) for v in x.detach().aminmax())
            self.ends[name] = [min(low * 0.99, x_low, 0.0), max(high * 0.99, x_high)]
        found: torch.Tensor = torch.fake_quantize_per_tensor_affine(x, *self.parameters_of(name), 0, 255)
        return found

    def weight(self, layer: Any) -> torch.Tensor:
        scales = self.weight_scales(layer)
        zeros = torch.zeros(len(scales), dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(layer.weight, scales, zeros, 0, -128, 127)

    def stage(self, name: str, x: torch.Tensor) -> torch.Tensor:
        layer = getattr(self, name)
        x = nn.functional.conv2d(
            x, self.weight(layer), layer.bias, layer.stride, layer.padding, 1, layer.groups
        )
        return self.activation(name, x if name == "body" else torch.relu(x))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stage("stem", self.activation("image", image))
        x = self.activation("sum", torch.relu(self.stage("body", self.stage("depthwise", x)) + x))
        x = self.stage("deep", nn.functional.max_pool2d(x, 2))
        x = self.activation("mean", x.mean((2, 3)))
        return self.activation("output", nn.functional.linear(x, self.weight(self.head), self.head.bias))


def qdq_onnx(network: Network, steps: int, path: Path) -> FakeQuantized:
    """Train *network* on with fake quantization and write it as ONNX: float weights before their pair, float bias."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = train(FakeQuantized(network).train(), steps, 1e-3).eval()
    nodes: list[Any] = []
    initializers: list[Any] = []

    def constant(name: str, array: Any) -> str:
        initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def pair(x: str, name: str, scale: Any, zero: Any, output: str = "", **axis: int) -> str:
        parameters = [constant(f"{name}.scale", scale), constant(f"{name}.zero_point", zero)]
        output = output or f"{name}.dequantized"
        nodes.append(helper.make_node("QuantizeLinear", [x, *parameters], [f"{name}.q"], f"{name}.Q", **axis))
        nodes.append(
            helper.make_node("DequantizeLinear", [f"{name}.q", *parameters], [output], f"{name}.DQ", **axis)
        )
        return output

    def activation(x: str, name: str, output: str = "") -> str:
        scale, zero = model.parameters_of(name)
        return pair(x, f"{name}.activation", np.float32(scale), np.uint8(zero), output)

    def weighted(x: str, name: str, kind: str, **attributes: Any) -> str:
        layer = getattr(model, name)
        scales = model.weight_scales(layer).numpy().astype(np.float32)
        weight = constant(f"{name}.weight", layer.weight.detach().numpy())
        weight = pair(weight, f"{name}.weight", scales, np.zeros(len(scales), np.int8), axis=0)
        bias = constant(f"{name}.bias", layer.bias.detach().numpy())
        nodes.append(helper.make_node(kind, [x, weight, bias], [f"{name}.out"], name, **attributes))
        return f"{name}.out"

    def plain(kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [f"{name}.out"], name, **attributes))
        return f"{name}.out"

    same = {"pads": [1, 1, 1, 1], "kernel_shape": [3, 3]}
    image = activation("image", "image")
    stem = activation(plain("Relu", [weighted(image, "stem", "Conv", **same)], "stem relu"), "stem")
    x = weighted(stem, "depthwise", "Conv", group=8, **same)
    x = activation(plain("Relu", [x], "depthwise relu"), "depthwise")
    x = activation(weighted(x, "body", "Conv", **same), "body")
    x = activation(plain("Relu", [plain("Add", [x, stem], "add")], "sum relu"), "sum")
    x = plain("MaxPool", [x], "pool", kernel_shape=[2, 2], strides=[2, 2])
    x = weighted(x, "deep", "Conv", strides=[2, 2], **same)
    x = activation(plain("Relu", [x], "deep relu"), "deep")
    x = activation(plain("ReduceMean", [x], "mean", axes=[2, 3], keepdims=0), "mean")
    activation(weighted(x, "head", "Gemm", transB=1), "output", "logits")
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        initializers,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(made)
    onnx.save(made, str(path))
    return model  # type: ignore[no-any-return]  # train returns what it was given


def write(folder: Path, steps: int = 600) -> None:
    """Train all three, *steps* in float and a third of them fake-quantized, and write them into *folder*."""
    torch.set_num_threads(1)
    network = trained(steps)
    torch.export.save(pt2e(copy.deepcopy(network), steps // 3), folder / "pt2e.pt2")
    torch.save(train(fx_prepared(copy.deepcopy(network)), steps // 3, 1e-3).state_dict(), folder / "fx.pt")
    qdq_onnx(copy.deepcopy(network), steps // 3, folder / "qdq.onnx")
    images, labels = digits()
    held = slice(TRAINING, TRAINING + EVALUATED)
    np.savez(folder / "evaluation.npz", image=images[held, None], labels=labels[held])


def sources(folder: Path) -> dict[str, str]:
    """Return the three models of ``write`` as portcall takes them."""
    return {
        "pt2e": str(folder / "pt2e.pt2"),
        "fx": "benchmarks.quantized_networks:fx",
        "onnx": str(folder / "qdq.onnx"),
    }
