"""DATA in a folder: ``.npy`` files, or images with a named preprocessing. One file is loaded at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from portcall.calibration._rows import (
    LABELS,
    Array,
    Label,
    Row,
    check_labels,
    check_names,
    label_of,
    listed,
)
from portcall.calibration.preprocess import (
    PREPROCESSINGS,
    get_preprocessing,
    image_layout,
    load_image,
    require_pillow,
)
from portcall.targets.agent.contract import TensorSpec
from portcall.targets.agent.errors import BadInput

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
_LABELS_FILE = f"{LABELS}.npy"


@dataclass(frozen=True, slots=True)
class FolderReader:
    """Rows of a folder: per row, the file of each input (relative to *root*)."""

    root: Path
    files: Mapping[str, Sequence[Path]]
    labels: Sequence[Label] | None
    load: Callable[[Path], Array]

    def count(self) -> int:
        return len(next(iter(self.files.values())))

    def labelled(self) -> bool:
        return self.labels is not None

    def rows(self, start: int, stop: int | None) -> Iterator[Row]:
        for index in range(self.count())[start:stop]:
            paths = {name: files[index] for name, files in self.files.items()}
            arrays = {name: self.load(self.root / path) for name, path in paths.items()}
            label = None if self.labels is None else self.labels[index]
            yield Row(arrays, label, f"sample {index} ({next(iter(paths.values())).name})")


def open_folder(root: Path, inputs: Sequence[TensorSpec], preprocess: str | None) -> FolderReader:
    """Return the reader of a folder, by what it holds. Raises BadInput if it is neither .npy nor images."""
    files = _list_files(root)
    arrays = [f for f in files if f.suffix.lower() == ".npy" and f != Path(_LABELS_FILE)]
    images = [f for f in files if f.suffix.lower() in IMAGE_SUFFIXES]
    if arrays and images:
        raise BadInput(
            f"{root} holds both arrays ({arrays[0]}) and images ({images[0]})", "Keep one kind in one folder"
        )
    if images:
        return _images(root, images, inputs, preprocess)
    if not arrays:
        raise BadInput(
            f"{root} holds no samples: no .npy file and no image ({', '.join(IMAGE_SUFFIXES)})",
            "Put one sample in each file",
        )
    if preprocess is not None:
        raise BadInput(
            f"preprocessing {preprocess!r} is for folders of images, and {root} holds .npy files",
            "Leave the preprocessing out; arrays are used as they are",
        )
    return _arrays(root, arrays, inputs)


def _list_files(root: Path) -> list[Path]:
    """Return all .npy and image files below *root*, relative to it and sorted. Hidden ones are left out."""

    def fail(error: OSError) -> None:
        raise BadInput(f"{error.filename} cannot be listed: {error.strerror}", "Make it readable") from error

    files: list[Path] = []
    seen: set[str] = set()
    # Not Path.rglob: it would leave out the linked folders that subsets of a data set are made of.
    for folder, subfolders, names in os.walk(root, onerror=fail, followlinks=True):
        seen.add(os.path.realpath(folder))
        subfolders[:] = [
            n for n in subfolders if n[0] != "." and os.path.realpath(Path(folder, n)) not in seen
        ]
        files += [
            Path(folder, n).relative_to(root)
            for n in names
            if n[0] != "." and Path(n).suffix.lower() in (".npy", *IMAGE_SUFFIXES)
        ]
    return sorted(files)


def _arrays(root: Path, files: Sequence[Path], inputs: Sequence[TensorSpec]) -> FolderReader:
    top = [f for f in files if len(f.parts) == 1]
    nested = [f for f in files if len(f.parts) == 2]
    if deep := [f for f in files if len(f.parts) > 2]:
        raise BadInput(f"{root} holds {deep[0]}, more than one folder down", "Use one subfolder per input")
    if top and nested:
        raise BadInput(
            f"{root} holds .npy files both at the top ({top[0]}) and in subfolders ({nested[0]})",
            "Use the top for a model with one input, subfolders named by the inputs otherwise",
        )
    if top:
        if len(inputs) > 1:
            raise BadInput(
                f"{root} holds .npy files at the top, but the model has {len(inputs)} inputs: "
                + ", ".join(t.name for t in inputs),
                "Use one subfolder per input, named by it, with equally named files",
            )
        by_input = {inputs[0].name: top}
    else:
        by_input = {}
        for file in nested:
            by_input.setdefault(file.parts[0], []).append(file)
        check_names(str(root), inputs, by_input)
        _check_same_names(root, by_input)
    count = len(next(iter(by_input.values())))
    return FolderReader(root, by_input, _read_labels(root, count), _load_npy)


def _check_same_names(root: Path, by_input: Mapping[str, Sequence[Path]]) -> None:
    (first, files), *rest = by_input.items()
    names = {f.name for f in files}
    for other, others in rest:
        if different := names ^ {f.name for f in others}:
            raise BadInput(
                f"the inputs in {root} have different files: {first} has {len(files)}, "
                f"{other} has {len(others)}; only in one of them: {listed(different)}",
                "Give every input's subfolder equally named files",
            )


def _images(
    root: Path, files: Sequence[Path], inputs: Sequence[TensorSpec], name: str | None
) -> FolderReader:
    if name is None:
        raise BadInput(
            f"{root} holds images, and no preprocessing was named; there are: {', '.join(PREPROCESSINGS)}",
            "Name the one that the model was trained with (--preprocess NAME)",
        )
    recipe = get_preprocessing(name)
    if len(inputs) != 1:
        raise BadInput(
            f"a folder of images serves a model with one input; this one has {len(inputs)}: "
            + ", ".join(t.name for t in inputs),
            "Use an .npz keyed by input name",
        )
    layout = image_layout(inputs[0], recipe)
    require_pillow()
    labels = _read_labels(root, len(files)) or _class_labels(root, files)
    return FolderReader(root, {inputs[0].name: files}, labels, lambda path: load_image(path, recipe, layout))


def _class_labels(root: Path, files: Sequence[Path]) -> list[int] | None:
    """Return the alphabetical index of each file's subfolder, where the subfolders are classes.

    They are if there are at least two and every image lies in one. An empty one counts: it is a class too.
    """
    classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(classes) < 2 or any(len(f.parts) != 2 for f in files):
        return None
    index = {name: i for i, name in enumerate(classes)}
    return [index[f.parts[0]] for f in files]


def _read_labels(root: Path, count: int) -> Sequence[Label] | None:
    path = root / _LABELS_FILE
    if not path.is_file():
        return None
    labels = _load_npy(path)
    check_labels(str(path), labels.shape, labels.dtype, count)
    return [label_of(np.asarray(row)) for row in labels]


def _load_npy(path: Path) -> Array:
    try:
        with path.open("rb") as file:
            array: Array = npy.read_array(file, allow_pickle=False)
    except (ValueError, OSError, EOFError, MemoryError) as e:
        if "Object arrays" in str(e):
            raise BadInput(
                f"{path} is an object array (a pickle), which is never loaded", "Store numbers"
            ) from e
        raise BadInput(f"{path} cannot be read as .npy: {e}", "Write the file again with numpy.save") from e
    if array.dtype.kind not in "biufc":
        raise BadInput(f"{path} holds {array.dtype}, not numbers", "Store numbers")
    return np.asarray(array)
