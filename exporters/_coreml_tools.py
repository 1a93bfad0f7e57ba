"""coremltools without its noise: a quick import, no progress bars, its errors kept, packages with the same bytes."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import uuid
import warnings
from pathlib import Path
from typing import Any, Iterator, List

_NEVER_NEEDED = ("tensorflow", "sklearn", "xgboost", "libsvm", "torchao", "transformers")
"""What coremltools imports to convert from, where it is there: 7 s and 950 MB with these, 2 s and 420 MB without."""


def coremltools() -> Any:
    """Return the module ``coremltools``, imported without its messages and without what is not needed of it."""
    if "coremltools" not in sys.modules:
        hidden = [name for name in _NEVER_NEEDED if name not in sys.modules]
        modules: Any = sys.modules
        try:
            modules.update({name: None for name in hidden})
            with quiet():
                import coremltools
        finally:
            for name in hidden:
                sys.modules.pop(name, None)
    import coremltools

    return coremltools


@contextlib.contextmanager
def quiet() -> Iterator[List[str]]:
    """Let nothing be printed, logged or warned; yield the messages of errors that coremltools logs meanwhile."""
    errors: List[str] = []
    logger = logging.getLogger("coremltools")
    handler = _Keep(errors)
    was, propagate, level = logging.root.manager.disable, logger.propagate, logger.level
    others, logger.handlers = logger.handlers, [handler]
    logger.propagate = False
    logger.setLevel(logging.WARNING)
    logging.disable(logging.INFO)
    torch_logger = logging.getLogger("torch")
    torch_level = torch_logger.level
    torch_logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield errors
    finally:
        logging.disable(was)
        logger.handlers, logger.propagate = others, propagate
        logger.setLevel(level)
        torch_logger.setLevel(torch_level)


class _Keep(logging.Handler):
    def __init__(self, messages: List[str]) -> None:
        super().__init__(logging.ERROR)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())


def save(model: Any, package: Path) -> None:
    """Write *model* as a package whose bytes depend on the model alone: no date, no random identifiers."""
    metadata = model.user_defined_metadata
    for key in [k for k in metadata if k.endswith("conversion_date")]:
        del metadata[key]
    with quiet():
        model.save(str(package))
    manifest = package / "Manifest.json"
    content = json.loads(manifest.read_text())
    entries = content["itemInfoEntries"]
    fixed = {
        key: str(uuid.uuid5(uuid.NAMESPACE_URL, entry["path"])).upper() for key, entry in entries.items()
    }
    content["itemInfoEntries"] = {fixed[key]: entry for key, entry in sorted(entries.items(), key=_path)}
    content["rootModelIdentifier"] = fixed[content["rootModelIdentifier"]]
    manifest.write_text(json.dumps(content, indent=4, sort_keys=True) + "\n")


def _path(item: Any) -> str:
    return str(item[1]["path"])


def files_of(package: Path) -> List[str]:
    """Return the files of a package, relative to the folder that it lies in, with "/" between the parts."""
    root = package.parent
    return sorted(p.relative_to(root).as_posix() for p in package.rglob("*") if p.is_file())
