"""Exports that the tests of all backends share: every model is exported once per test session."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.exporters.contract")

from tests.exporters.contract import BackendContract, Exports, Model  # noqa: E402  # after the rewrite is registered


@pytest.fixture(scope="session")
def models(
    tmp_path_factory: pytest.TempPathFactory, tiny_onnx: Path, identity_onnx: Path
) -> dict[str, Model]:
    """One model of each source format: "image" (factory), "two_inputs" (.pt2), "onnx", and "copy" for null."""
    import numpy as np
    import torch

    import tests.models

    folder = tmp_path_factory.mktemp("sources with a space")
    module, examples, dynamic = tests.models.two_inputs()
    torch.export.save(torch.export.export(module, (), examples, dynamic_shapes=dynamic), folder / "two.pt2")
    rng = np.random.default_rng(1)
    np.savez(folder / "tiny.npz", x=rng.standard_normal((24, 3, 16, 16)).astype(np.float32))
    np.savez(folder / "copy.npz", x=rng.standard_normal((24, 4)).astype(np.float32))
    few = ("fp32", "int8")
    return {
        "image": Model("torch", "tests.models:tiny_cnn", "tests.models:tiny_cnn_data", None),
        "two_inputs": Model("pt2", str(folder / "two.pt2"), "tests.models:two_inputs_data", few),
        "onnx": Model("onnx", str(tiny_onnx), str(folder / "tiny.npz"), few),
        "copy": Model("onnx", str(identity_onnx), str(folder / "copy.npz"), few),
    }


@pytest.fixture(scope="session")
def exports(
    request: pytest.FixtureRequest, models: dict[str, Model], tmp_path_factory: pytest.TempPathFactory
) -> Exports:
    """Export lazily, for the backends that the collected tests are about."""
    backends: set[str] = set()
    for item in request.session.items:
        if isinstance(item, pytest.Function):
            contract = isinstance(item.cls, type) and issubclass(item.cls, BackendContract)
            backends.update([item.cls.name] if contract else getattr(item.module, "BACKENDS", ()))
    return Exports(models, sorted(backends), tmp_path_factory.mktemp("all artifacts"))
