"""DATA of all four kinds: what samples come out, what is refused in which words, and constant memory.

Long because every kind is held to the same list of faults.
"""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portcall.calibration.data import Data, open_data, survey
from portcall.calibration.preprocess import PREPROCESSINGS
from portcall.targets.agent.contract import TensorSpec
from portcall.targets.agent.errors import BadInput, UnavailableError

X = TensorSpec("x", ("batch", 3, 4), "float32")
IDS = TensorSpec("ids", ("batch", "seq"), "int64")
IMAGE = TensorSpec("image", (1, 3, 224, 224), "float32")


def sha256(data: Any) -> tuple[str, int]:
    found = survey(data)
    return found.sha256, found.n


def values(*shape: int, dtype: str = "float32") -> Any:
    return np.arange(np.prod(shape), dtype=dtype).reshape(shape)


def npz(path: Path, **arrays: Any) -> str:
    np.savez_compressed(path / "data.npz", **arrays)
    return str(path / "data.npz")


def refused(match: list[str], *args: Any, **kwargs: Any) -> BadInput:
    """Open (and, if that works, iterate) DATA; return the error after checking the parts of its message."""
    with pytest.raises(BadInput) as caught:
        list(open_data(*args, **kwargs))
    for part in match:
        assert part in str(caught.value)
    assert caught.value.fix
    return caught.value


# .npz


def test_npz_yields_rows_with_a_batch_axis_several_times(tmp_path: Path) -> None:
    stored = values(5, 3, 4)
    data = open_data(npz(tmp_path, x=stored, labels=[4, 3, 2, 1, 0]), [X])
    for _ in range(2):
        samples = list(data)
        assert [s.index for s in samples] == [0, 1, 2, 3, 4]
        assert [s.label for s in samples] == [4, 3, 2, 1, 0]
        for sample, row in zip(samples, stored, strict=True):
            assert sample.inputs["x"].shape == (1, 3, 4) and sample.inputs["x"].dtype == np.float32
            np.testing.assert_array_equal(sample.inputs["x"][0], row)
            assert sample.inputs["x"].flags.writeable
    assert data.count() == 5 and data.has_labels() and data.spec.endswith("data.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_of_several_inputs_is_read_in_lockstep(tmp_path: Path, save: Callable[..., None]) -> None:
    ids = values(4, 7, dtype="int32")
    save(tmp_path / "d.npz", ids=ids, x=values(4, 1, 3, 4).astype(">f8"), **{"reference/out": values(9)})
    samples = list(open_data(str(tmp_path / "d.npz"), [X, IDS]))
    assert [s.inputs["ids"].tolist() for s in samples] == [[row] for row in ids.tolist()]
    assert all(s.inputs["ids"].dtype == np.int64 and s.label is None for s in samples)
    assert samples[2].inputs["x"].dtype == np.float32 and samples[2].inputs["x"][0, 0, 0] == 24


def test_slices_keep_the_index_and_nest(tmp_path: Path) -> None:
    data = open_data(npz(tmp_path, x=values(10, 3, 4), labels=np.arange(10)), [X])
    view = data.with_slice(2, 8)
    assert [s.index for s in view] == [s.label for s in view] == [2, 3, 4, 5, 6, 7]
    assert view.count() == 6 and view.has_labels()
    assert [s.index for s in view.with_slice(4, None)] == [6, 7]
    assert [s.index for s in view.with_slice(4, 100)] == [6, 7]
    assert [s.index for s in data.with_slice(9, None)] == [9]
    for empty in (data.with_slice(3, 3), data.with_slice(20, None), view.with_slice(7, 9)):
        assert list(empty) == [] and empty.count() == 0
    with pytest.raises(ValueError, match="0 <= start <= stop"):
        data.with_slice(3, 2)


def test_a_fixed_batch_groups_rows_with_their_labels_and_drops_the_tail(tmp_path: Path) -> None:
    spec = TensorSpec("x", (4, 3), "float32")
    table = TensorSpec("table", (2, 2), "float32")
    for stored in (values(10, 3), values(10, 1, 3)):
        tables = np.broadcast_to(values(2, 2), (10, 2, 2))
        data = open_data(npz(tmp_path, x=stored, table=tables, labels=np.arange(10)), [spec, table])
        samples = list(data)
        assert data.count() == len(samples) == 2 and data.has_labels()
        assert [np.asarray(s.label).tolist() for s in samples] == [[0, 1, 2, 3], [4, 5, 6, 7]]
        np.testing.assert_array_equal(samples[1].inputs["x"], values(10, 3)[4:8])
        np.testing.assert_array_equal(samples[1].inputs["table"], values(2, 2))
        assert [s.index for s in data.with_slice(1, None)] == [1]
    refused(["only one value of input table", "sample 0 to sample 3"],
            npz(tmp_path, x=values(8, 3), table=values(8, 2, 2)), [spec, table])  # fmt: skip
    own_axis = list(open_data(npz(tmp_path, x=values(2, 4, 3)), [spec]))
    assert [s.inputs["x"].shape for s in own_axis] == [(4, 3), (4, 3)]
    refused(["holds 3 samples", "takes 4 at once"], npz(tmp_path, x=values(3, 3)), [spec])
    two = [spec, TensorSpec("y", (2, 3), "float32")]
    refused(["different fixed batches: x 4, y 2"], npz(tmp_path, x=values(8, 3), y=values(8, 3)), two)


def test_scalar_inputs(tmp_path: Path) -> None:
    lengths, rate = TensorSpec("n", ("batch",), "int64"), TensorSpec("rate", (), "float32")
    samples = list(open_data(npz(tmp_path, n=np.arange(3), rate=values(3)), [lengths, rate]))
    assert samples[2].inputs["n"].tolist() == [2] and samples[2].inputs["rate"].shape == ()


def test_an_empty_axis_is_a_legal_shape(tmp_path: Path) -> None:
    past = TensorSpec("past", (1, 2, "seq", 4), "float32")
    data = open_data(npz(tmp_path, past=values(3, 1, 2, 0, 4), i=np.zeros((3, 0), "i4")), [
        past, TensorSpec("i", (1, "n"), "int64")])  # fmt: skip
    assert [s.inputs["past"].shape for s in data] == [(1, 2, 0, 4)] * 3


@pytest.mark.parametrize(
    ("arrays", "parts"),
    [
        (
            {"X_in": values(2, 3, 4)},
            ["no data for input 'x'", "inputs are: x", "holds: X_in", "Rename 'X_in' to 'x'"],
        ),
        (
            {"x": values(2, 3, 4), "label": [1, 2]},
            ["'label'", "no input of the model", "Did you mean 'labels'?"],
        ),
        (
            {"x": values(2, 3, 5)},
            ["sample 0", "'x' has shape [3, 5]", "x: float32[batch, 3, 4]", "as [3, 4]"],
        ),
        ({"x": values(3, 4)}, ["sample 0", "shape [4]"]),
        ({"x": values(2, 3, 4, dtype="uint8")}, ["'x' is uint8", "x: float32", "folder of images"]),
        ({"x": values(0, 3, 4)}, ["holds no samples"]),
        ({"x": np.float32(1)}, ["'x'", "without a sample axis"]),
        ({"x": np.array([None, 1])}, ["object array", "never loaded"]),
        ({"x": np.array(["a"])}, ["holds <U1, not numbers"]),
        ({"x": np.asfortranarray(values(2, 3, 4))}, ["Fortran order", "ascontiguousarray"]),
        ({"x": values(2, 3, 4), "labels": [1, 2, 3]}, ["labels", "shape [3]", "2 samples"]),
        ({"x": values(2, 3, 4), "labels": ["a", "b"]}, ["labels", "not numbers"]),
        ({"x": np.full((2, 3, 4), 1e300)}, ["sample 0", "beyond float32"]),
    ],
)
def test_npz_refusals(tmp_path: Path, arrays: dict[str, Any], parts: list[str]) -> None:
    np.savez(tmp_path / "data.npz", **arrays, allow_pickle=True)
    refused(parts, str(tmp_path / "data.npz"), [X])


@pytest.mark.parametrize(
    ("labels", "parts"),
    [([0.5, 1], ["labels", "float64", "not integers"]), (values(2, 3, 3, dtype="int64"), ["shape (3, 3)"])],
)
def test_labels_that_are_no_classes_are_for_a_metric_alone(
    tmp_path: Path, labels: Any, parts: list[str]
) -> None:
    data = open_data(npz(tmp_path, x=values(2, 3, 4), labels=labels), [X])
    for found, given in zip(data, labels, strict=True):
        assert found.label is not None
        np.testing.assert_array_equal(found.label, given)
    with pytest.raises(BadInput) as caught:
        data.check_classes()
    assert all(p in str(caught.value) for p in [*parts, "sample 0", "--metric"]), str(caught.value)


def test_different_counts_are_refused(tmp_path: Path) -> None:
    refused(
        ["different numbers of samples: ids 2, x 3"],
        npz(tmp_path, x=values(3, 3, 4), ids=[[1], [2]]),
        [X, IDS],
    )


def test_missing_among_several_names_the_nearest(tmp_path: Path) -> None:
    two = [IDS, TensorSpec("attention_mask", ("batch", "seq"), "int64")]
    refused(["'attention_mask'", "inputs are: ids, attention_mask", "Rename 'attn_mask'"],
            npz(tmp_path, ids=[[1]], attn_mask=[[1]]), two)  # fmt: skip


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_names_sample_input_and_place(tmp_path: Path, bad: float) -> None:
    stored = values(5, 3, 4)
    stored[3, 1, 2] = bad
    data = open_data(npz(tmp_path, x=stored), [X])
    with pytest.raises(
        BadInput, match=r"sample 3 of input 'x' holds NaN or infinity: 1 of 12 .* at \[1, 2\]"
    ):
        list(data)


def test_integers_convert_only_if_they_fit(tmp_path: Path) -> None:
    small = TensorSpec("ids", ("batch", "seq"), "int8")
    samples = list(open_data(npz(tmp_path, ids=np.array([[-128, 127]], "int64")), [small]))
    assert samples[0].inputs["ids"].dtype == np.int8 and samples[0].inputs["ids"].tolist() == [[-128, 127]]
    refused(
        ["values from -1 to 200", "do not fit int8 (-128 to 127)"], npz(tmp_path, ids=[[-1, 200]]), [small]
    )
    refused(["'ids' is float32", "int64", "astype('int64')"], npz(tmp_path, ids=values(2, 3)), [IDS])
    refused(["'ids' is bool"], npz(tmp_path, ids=np.ones((2, 3), bool)), [IDS])
    half = [TensorSpec("x", ("batch", 3), "float16")]
    refused(["'x' is float32", "astype('float16')"], npz(tmp_path, x=values(2, 3)), half)


def test_corrupt_npz(tmp_path: Path) -> None:
    path = Path(npz(tmp_path, x=np.random.default_rng(0).random((50, 3, 4))))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(["data.npz is not an .npz file, or was cut off", "numpy.savez"], str(path), [X])
    np.savez(path, x=np.ones((50, 3, 4), np.float32))
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2 & ~3] ^= 1  # one bit of one number: only the checksum can tell
    path.write_bytes(damaged)
    refused(["'x' in", "cannot be read: BadZipFile: Bad CRC-32"], str(path), [X])
    damaged = bytearray(whole)
    damaged[100:140] = b"\xff" * 40  # not even deflate any more
    path.write_bytes(damaged)
    refused(["'x' in", "cannot be read: error: Error -3 while decompressing"], str(path), [X])
    path.write_text("sepal,petal\n1,2\n")
    refused(["is not an .npz file"], str(path), [X])
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<a/>")
    refused(["is not an .npz file", "'word/document.xml'"], str(path), [X])
    header = b"\x93NUMPY\x01\x00\x46\x00{'descr': '<f4', 'fortran_order': False, 'shape': (9, 3, 4), }".ljust(
        80
    )
    for content, part in ((header, "promises 512 bytes and it has 80"), (b"text", "magic string")):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", content)
        refused(["'x' in", part], str(path), [X])


def test_names_in_an_npz_are_keys_only(tmp_path: Path) -> None:
    outside = TensorSpec("../x", ("batch", 3, 4), "float32")
    folder = tmp_path / "inner"
    folder.mkdir()
    data = open_data(npz(folder, **{"../x": values(2, 3, 4)}), [outside])
    assert data.count() == len(list(data)) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["inner"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_memory_does_not_grow_with_the_samples(tmp_path: Path, save: Callable[..., None]) -> None:
    spec = TensorSpec("x", ("batch", 128, 128), "float32")  # 64 KiB per sample
    peaks = {}
    for n in (50, 500):
        save(tmp_path / f"{n}.npz", x=np.random.default_rng(0).random((n, 128, 128), np.float32))
        tracemalloc.start()
        assert sum(1 for _ in open_data(str(tmp_path / f"{n}.npz"), [spec])) == n
        peaks[n] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[500] < 1.1 * peaks[50] and peaks[500] < 10 * 65536


# folders of .npy


def folder(root: Path, **arrays: Any) -> str:
    for name, array in arrays.items():
        path = root / f"{name.replace('__', '/')}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array)
    return str(root)


def test_npy_folder_of_one_input_is_sorted_by_name(tmp_path: Path) -> None:
    spec = folder(
        tmp_path, b=values(1, 3, 4) + 1, a=values(3, 4), c=np.asfortranarray(values(3, 4)), labels=[2, 0, 1]
    )
    (tmp_path / "._a.npy").write_text("what macOS leaves behind")
    data = open_data(spec, [X])
    assert [(s.inputs["x"].shape, s.inputs["x"][0, 0, 0], s.label) for s in data] == [
        ((1, 3, 4), 0, 2), ((1, 3, 4), 1, 0), ((1, 3, 4), 0, 1)]  # fmt: skip
    assert data.count() == 3 and data.has_labels()
    assert [s.label for s in data.with_slice(1, 2)] == [0]


def test_npy_folder_of_several_inputs(tmp_path: Path) -> None:
    spec = folder(tmp_path, x__0=values(3, 4), x__1=values(3, 4), ids__0=[1, 2], ids__1=[3])
    samples = list(open_data(spec, [X, IDS]))
    assert [s.inputs["ids"].tolist() for s in samples] == [[[1, 2]], [[3]]]
    refused(["different files: ids has 2, x has 3", "only in one of them: 2.npy"],
            folder(tmp_path, x__2=values(3, 4)), [X, IDS])  # fmt: skip


@pytest.mark.parametrize(
    ("arrays", "specs", "parts"),
    [
        ({"a": values(3, 4)}, [X, IDS], ["at the top", "2 inputs: x, ids", "subfolder per input"]),
        ({"y__a": values(3, 4)}, [X], ["no data for input 'x'", "holds: y", "Rename 'y' to 'x'"]),
        (
            {"a": values(3, 4), "x__a": values(3, 4)},
            [X],
            ["both at the top (a.npy) and in subfolders (x/a.npy)"],
        ),
        ({"x__y__a": values(3, 4)}, [X], ["x/y/a.npy", "more than one folder down"]),
        ({"labels": [1]}, [X], ["holds no samples", ".png"]),
        ({"a": values(3, 4), "labels": [1, 2]}, [X], ["labels.npy", "shape [2]", "1 samples"]),
        ({"a": values(3, 4), "b": values(4, 3)}, [X], ["sample 1 (b.npy) of input 'x' has shape [4, 3]"]),
        ({"a": np.array([None])}, [X], ["a.npy is an object array"]),
        ({"a": np.array(["s"])}, [X], ["a.npy holds <U1"]),
    ],
)
def test_npy_folder_refusals(
    tmp_path: Path, arrays: dict[str, Any], specs: list[TensorSpec], parts: list[str]
) -> None:
    refused(parts, folder(tmp_path, **arrays), specs)


def test_corrupt_npy(tmp_path: Path) -> None:
    path = Path(folder(tmp_path, a=values(3, 4))) / "a.npy"
    path.write_bytes(path.read_bytes()[:-8])
    refused(["a.npy cannot be read as .npy"], str(tmp_path), [X])
    path.write_text("text")
    refused(["a.npy cannot be read as .npy"], str(tmp_path), [X])


def test_preprocess_is_refused_for_arrays(tmp_path: Path) -> None:
    refused(["'unit' is for folders of images"], folder(tmp_path, a=values(3, 4)), [X], preprocess="unit")
    refused(["'unit' is for folders of images"], npz(tmp_path, x=values(2, 3, 4)), [X], preprocess="unit")


# folders of images


def picture(path: Path, pixels: Any, **options: Any) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed: pip install 'portcall[images]'")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.fromarray(pixels).save(path, **options)


def noise(*shape: int) -> Any:
    return np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)


def only_image(root: Path, spec: TensorSpec, name: str) -> Any:
    (sample,) = open_data(str(root), [spec], preprocess=name)
    return sample.inputs["image"]


def test_class_folders_give_labels(tmp_path: Path) -> None:
    for i, name in enumerate(["dog/2.png", "dog/1.jpg", "cat/9.bmp", "cat-b/a.webp", "cat/3.JPEG"]):
        picture(tmp_path / name, np.full((9, 9, 3), i, np.uint8))
    (tmp_path / "bird").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    data = open_data(str(tmp_path), [TensorSpec("image", ("n", 3, 4, 4), "float32")], preprocess="raw")
    assert [s.label for s in data] == [1, 1, 2, 3, 3]
    assert data.count() == 5 and data.has_labels()
    assert [round(float(s.inputs["image"].mean())) for s in data] == [4, 2, 3, 1, 0]


def test_linked_class_folders_are_followed_once(tmp_path: Path) -> None:
    picture(tmp_path / "store" / "a.png", noise(8, 8, 3))
    root = tmp_path / "subset"
    picture(root / "cat" / "b.png", noise(8, 8, 3))
    (root / "dog").symlink_to(tmp_path / "store")
    (root / "dog" / "loop").symlink_to(root)
    data = open_data(str(root), [IMAGE], preprocess="unit")
    assert [s.label for s in data] == [0, 1]


def test_one_subfolder_or_a_flat_folder_has_no_labels_unless_stored(tmp_path: Path) -> None:
    picture(tmp_path / "all" / "a.png", noise(8, 8, 3))
    assert not open_data(str(tmp_path), [IMAGE], preprocess="unit").has_labels()
    picture(tmp_path / "b.png", noise(8, 8, 3))
    assert [s.label for s in open_data(str(tmp_path), [IMAGE], preprocess="unit")] == [None, None]
    folder(tmp_path, labels=[7, 5])
    assert [s.label for s in open_data(str(tmp_path), [IMAGE], preprocess="unit")] == [7, 5]


@pytest.mark.parametrize("name", ["imagenet", "imagenet-bicubic"])
def test_imagenet_of_a_256_image_is_its_centre(tmp_path: Path, name: str) -> None:
    pixels = noise(256, 256, 3)
    picture(tmp_path / "a.png", pixels)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    expected = (pixels[16:240, 16:240] / 255 - mean) / std
    nchw = only_image(tmp_path, IMAGE, name)
    np.testing.assert_allclose(nchw[0].transpose(1, 2, 0), expected, atol=1e-5)
    nhwc = only_image(tmp_path, TensorSpec("image", (1, 224, 224, 3), "float32"), name)
    np.testing.assert_array_equal(nhwc[0], nchw[0].transpose(1, 2, 0))


def test_imagenet_resizes_the_short_side_of_a_wide_image(tmp_path: Path) -> None:
    ramp = np.repeat(np.arange(0, 250, dtype=np.uint8)[None, :, None], 100, 0).repeat(
        3, 2
    )  # 250 wide, 100 high
    picture(tmp_path / "a.png", ramp)
    image = only_image(tmp_path, IMAGE, "imagenet")
    left, right = (image[0, 0, 100, [0, -1]] * 0.229 + 0.485) * 255
    # Resized to 640 x 256; the crop spans columns 208 to 432, that is 81.25 to 168.75 of the source.
    assert left == pytest.approx(81, abs=1) and right == pytest.approx(168, abs=1)


def test_efficientnet_lite_crops_with_padding_32_first(tmp_path: Path) -> None:
    pixels = noise(256, 300, 3)
    picture(tmp_path / "a.png", pixels)
    expected = (pixels[16:240, 38:262].astype(np.float32) - 127) / 128
    np.testing.assert_array_equal(
        only_image(tmp_path, IMAGE, "efficientnet-lite")[0].transpose(1, 2, 0), expected
    )
    picture(tmp_path / "a.png", noise(1, 5, 3))  # too small to cut: still one sample
    assert only_image(tmp_path, IMAGE, "efficientnet-lite").shape == (1, 3, 224, 224)


@pytest.mark.parametrize(
    ("name", "function"),
    [("unit", lambda p: p / 255), ("symmetric", lambda p: p / 127.5 - 1), ("raw", lambda p: p)],
)
def test_stretching_preprocessings(tmp_path: Path, name: str, function: Callable[[Any], Any]) -> None:
    pixels = noise(24, 40, 3)
    picture(tmp_path / "a.png", pixels)
    spec = TensorSpec("image", ("n", 24, 40, 3), "float32")
    np.testing.assert_allclose(
        only_image(tmp_path, spec, name)[0], function(pixels.astype(np.float64)), atol=1e-6
    )


def test_uint8_half_grey_and_dynamic_inputs(tmp_path: Path) -> None:
    pixels = noise(28, 28)
    picture(tmp_path / "a.png", pixels)
    grey = only_image(tmp_path, TensorSpec("image", (1, 28, 28, 1), "uint8"), "raw")
    assert grey.dtype == np.uint8
    np.testing.assert_array_equal(grey[0, :, :, 0], pixels)
    assert only_image(tmp_path, TensorSpec("image", (1, 1, 28, 28), "float16"), "unit").dtype == np.float16
    assert only_image(tmp_path, TensorSpec("image", ("n", 3, "h", "w"), "float32"), "unit").shape == (
        1,
        3,
        224,
        224,
    )


def test_a_fixed_batch_groups_images(tmp_path: Path) -> None:
    for i in range(5):
        picture(tmp_path / f"{i}.png", noise(8, 8, 3))
    data = open_data(str(tmp_path), [TensorSpec("image", (2, 3, 8, 8), "float32")], preprocess="unit")
    assert [s.inputs["image"].shape for s in data] == [(2, 3, 8, 8)] * 2 and data.count() == 2


def test_alpha_and_palette_images_are_read_as_rgb(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", noise(8, 8, 4))
    image = pytest.importorskip("PIL.Image")
    palette = image.fromarray(noise(8, 8, 3)).quantize(8)
    palette.save(tmp_path / "b.png", transparency=b"\x00\xff")
    assert len(list(open_data(str(tmp_path), [IMAGE], preprocess="unit"))) == 2


def test_image_refusals(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", noise(8, 8, 3))
    root = str(tmp_path)
    refused(["no preprocessing was named", *PREPROCESSINGS], root, [IMAGE])
    refused(["no preprocessing 'imagnet'", *PREPROCESSINGS, "Did you mean 'imagenet'?"],
            root, [IMAGE], preprocess="imagnet")  # fmt: skip
    refused(["one input; this one has 2: image, ids"], root, [IMAGE, IDS], preprocess="unit")
    refused(["does not take images", "none has"], root, [X], preprocess="unit")
    both = TensorSpec("image", (1, 3, 8, 3), "float32")
    refused(["does not take images", "more than one has"], root, [both], preprocess="unit")
    eight_bit = TensorSpec("image", (1, 3, 8, 8), "uint8")
    refused(["'imagenet' yields floats", "uint8", "Use raw"], root, [eight_bit], preprocess="imagenet")
    grey = TensorSpec("image", (1, 1, 8, 8), "float32")
    refused(["'imagenet' is for 3 channels"], root, [grey], preprocess="imagenet")
    (tmp_path / "b.png").write_text("text")
    refused(["b.png cannot be read as an image"], root, [IMAGE], preprocess="unit")
    picture(tmp_path / "b.png", noise(8, 8).astype(np.uint16) * 257)
    refused(["b.png has I;16 pixels"], root, [IMAGE], preprocess="unit")
    folder(tmp_path, array=values(3))
    refused(["both arrays (array.npy) and images (a.png)"], root, [IMAGE], preprocess="unit")


def test_missing_pillow_prints_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UnavailableError, match=r"pip install 'portcall\[images\]'"):
        open_data(str(tmp_path), [IMAGE], preprocess="unit")


# callables


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Write a module into the current folder and return its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)

    def write(code: str) -> str:
        name = f"user_data_{len(list(tmp_path.glob('*.py')))}"
        (tmp_path / f"{name}.py").write_text(f"import numpy as np\n{code}\n")
        sys.path_importer_cache.pop(str(tmp_path), None)
        return name

    yield write
    for name in set(sys.modules) - before:
        if name.startswith("user_data_"):
            del sys.modules[name]


def test_callable_is_called_anew_for_every_pass(module: Callable[[str], str], tmp_path: Path) -> None:
    name = module(
        "buffer = np.zeros((3, 4))\n"
        "def samples():\n"
        "    for i in range(4):\n"
        "        buffer[:] = i\n"
        "        yield {'x': buffer, 'label': np.int64(i)}\n"
        "class Set:\n"
        "    @staticmethod\n"
        "    def load():\n"
        "        return [{'x': np.ones((1, 3, 4), 'float32'), 'labels': 3}]\n"
    )
    data = open_data(f"{name}:samples", [X])
    assert sys.path[-1] == str(tmp_path)
    for _ in range(2):
        samples = list(data)
        assert [s.label for s in samples] == [0, 1, 2, 3]
        assert [s.inputs["x"].mean() for s in samples] == [
            0,
            1,
            2,
            3,
        ]  # though the callable reuses its buffer
    assert data.count() == 4 and data.has_labels()
    assert [s.index for s in data.with_slice(1, 3)] == [1, 2] and data.with_slice(1, 3).count() == 2
    assert [s.label for s in open_data(f"{name}:Set.load", [X])] == [3]
    batched = open_data(f"{name}:samples", [TensorSpec("x", (2, 3, 4), "float32")])
    assert [s.inputs["x"][:, 0, 0].tolist() for s in batched] == [[0, 1], [2, 3]]
    assert [np.asarray(s.label).tolist() for s in batched] == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ("def f(): yield {'x': 1 / 0}", ["raised ZeroDivisionError at sample 0: division by zero"]),
        ("def f(a): pass", ["raised TypeError at sample 0", "missing 1 required"]),
        ("def f(): return None", ["raised TypeError", "not iterable"]),
        ("def f(): return {'x': [1]}", ["returned a single dict"]),
        ("def f(): return [[1, 2]]", ["sample 0 of", "is a list, not a dict"]),
        ("def f(): return []", ["holds no samples"]),
        (
            "def f(): yield {'y': np.ones((3, 4))}",
            ["sample 0 of", "no data for input 'x'", "Rename 'y' to 'x'"],
        ),
        ("def f(): yield {'x': [[1], [2, 3]]}", ["'x' in sample 0", "is no array"]),
        ("def f(): yield {'x': 'text'}", ["'x' in sample 0", "holds <U4, not numbers"]),
        ("def f(): yield {'x': np.ones((3, 5))}", ["sample 0 of input 'x' has shape [3, 5]"]),
        ("def f(): yield {'x': np.ones((3, 4)), 'label': 'cat'}", ["'labels' in sample 0", "not numbers"]),
        (
            "def f(): yield from ({'x': np.ones((3, 4)), 'label': n} for n in (1, None))",
            ["sample 1 of", "has no label"],
        ),
        ("f = 3", ["is a int, not callable"]),
        ("def ff(): pass", ["has no 'f'", "Did you mean 'ff'?"]),
        ("import no_such_module_xyz", ["cannot import", "ModuleNotFoundError", "no_such_module_xyz"]),
        ("raise SystemExit(3)", ["cannot import", "SystemExit: 3"]),
    ],
)
def test_callable_refusals(module: Callable[[str], str], body: str, parts: list[str]) -> None:
    name = module(body)
    error = refused([name, *parts] if "sample 0 of input" not in parts[0] else parts, f"{name}:f", [X])
    if "raised" in parts[0] or "cannot import" in parts[0]:
        assert error.__cause__ is not None


def test_a_later_fault_of_a_callable_names_its_sample(module: Callable[[str], str]) -> None:
    name = module(
        "def f():\n    for i in range(3):\n        yield {'x': np.full((3, 4), 1.0 if i < 2 else np.nan)}"
    )
    refused(["sample 2 of input 'x' holds NaN"], f"{name}:f", [X])
    assert open_data(f"{name}:f", [X]).with_slice(0, 2).count() == 2


def test_counting_an_empty_callable_is_refused(module: Callable[[str], str]) -> None:
    with pytest.raises(BadInput, match="holds no samples"):
        open_data(f"{module('def f(): return []')}:f", [X]).count()


def test_a_missing_module_is_named(module: Callable[[str], str]) -> None:
    refused(["cannot import 'no_such_module_xyz'", "ModuleNotFoundError"], "no_such_module_xyz:f", [X])


# all kinds


def test_unknown_kinds_list_the_four(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kinds = ["an .npz", "a folder of .npy", "a folder of images", "package.module:callable"]
    refused(["there is no file or folder missing.npz", *kinds], "missing.npz", [X])
    refused(["there is no file or folder a/b", *kinds], "a/b", [X])
    refused(["'imagenet' is no kind of data", *kinds], "imagenet", [X])
    np.save("one.npy", values(3, 4))
    refused(["one.npy is a single .npy file", "x=array"], "one.npy", [X])


def test_models_that_no_data_fits(tmp_path: Path) -> None:
    spec = npz(tmp_path, x=values(2, 3, 4))
    refused(["has no inputs"], spec, [])
    refused(["an input named 'labels'", "Rename the input"], spec, [TensorSpec("labels", (1,), "int64")])
    refused(["no_such_dtype", "NumPy does not know"], spec, [TensorSpec("x", (1,), "no_such_dtype")])
    refused(["does not hold numbers"], spec, [TensorSpec("x", (1,), "object")])


def test_hash_covers_content_and_not_storage(tmp_path: Path) -> None:
    stored = values(4, 3, 4)
    first = open_data(npz(tmp_path, x=stored), [X])
    digest, n = sha256(first)
    assert n == 4 and len(digest) == 64 and sha256(first) == (digest, 4)
    as_folder = folder(tmp_path / "f", **{f"s{i}": row for i, row in enumerate(stored)})
    assert sha256(open_data(as_folder, [X])) == (digest, 4)
    assert sha256(open_data(npz(tmp_path, x=stored.astype(">f8")), [X])) == (digest, 4)
    assert sha256(open_data(npz(tmp_path, x=stored[::-1]), [X]))[0] != digest
    parts: list[Data] = [first.with_slice(0, 3), first.with_slice(0, 0)]
    assert [sha256(p)[1] for p in parts] == [3, 0] and len({digest, *(sha256(p)[0] for p in parts)}) == 3
    renamed = TensorSpec("y", X.shape, X.dtype)
    assert sha256(open_data(npz(tmp_path, y=stored), [renamed]))[0] != digest


def test_preprocessings_are_json() -> None:
    entry = PREPROCESSINGS["imagenet"].to_json()
    assert entry["name"] == "imagenet" and entry["mean"] == [0.485, 0.456, 0.406] and entry["scale"] == 255.0


def test_importing_data_loads_numpy_only() -> None:
    code = (
        "import sys, numpy, portcall; before = set(sys.modules); import portcall.calibration.data\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "assert new <= {'portcall', 'numpy'}, new"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
