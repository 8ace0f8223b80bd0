"""Real tiny image files and parquet files, through `load_images`."""

import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features
from transformers import HfArgumentParser

from freqgate_dit.training.data import DataConfig, _in_threads, describe, load_images
from freqgate_dit.training.decoding import Room, check_image, decode_image
from freqgate_dit.training.image_sources import FolderReader, TableReader


ROOT = Path(__file__).resolve().parent.parent


def picture(seed, size=(12, 10)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path)


@pytest.fixture
def folder(tmp_path):
    """Three classes of 5, 7 and 6 images, created in no order."""
    root = tmp_path / "photos"
    for number, (name, count) in enumerate((("wild", 7), ("cat", 5), ("dog", 6))):
        for index in np.random.default_rng(number).permutation(count):
            write(root / name / f"{index:02d}.png", 100 * number + index)
    return root


def write_parquet(path, columns, features=None):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict(columns)
    for name, feature in (features or {"image": datasets.Image()}).items():
        data = data.cast_column(name, feature)
    data.to_parquet(str(path))
    return str(path)


def rows(names):
    return [{"bytes": encoded(picture(index)), "path": name} for index, name in enumerate(names)]


def load(dataset, **options):
    return load_images(DataConfig(dataset=str(dataset), resolution=8, **options))


@contextmanager
def as_no_root():
    """Root may read and write everywhere."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


# The held-out rule


def test_last_n_sorted_per_class_are_held_out(folder):
    train, heldout = load(folder, heldout_per_class=2)
    assert train.class_names == heldout.class_names == ("cat", "dog", "wild")
    expected = {name: sorted(f"{name}/{file}" for file in os.listdir(folder / name)) for name in train.class_names}
    assert train.names == [name for files in expected.values() for name in files[:-2]]
    assert heldout.names == [name for files in expected.values() for name in files[-2:]]
    for part in (train, heldout):
        assert [part.class_names[label] for label in part.labels] == [name.split("/")[0] for name in part.names]
        assert part.labels.dtype == torch.int64


def test_fraction_rule_holds_out_at_least_one_and_leaves_one(folder):
    write(folder / "lone" / "only.png")
    train, heldout = load(folder)
    assert torch.bincount(train.labels).tolist() == [4, 5, 1, 6]
    assert torch.bincount(heldout.labels, minlength=4).tolist() == [1, 1, 0, 1]
    train, heldout = load(folder, heldout_fraction=0.0)
    assert (len(train), len(heldout)) == (19, 0)
    assert heldout.images([]).shape == (0, 3, 8, 8)


def test_balance_cuts_only_the_training_part_to_its_first_images(folder):
    full, _ = load(folder, heldout_per_class=2)
    train, heldout = load(folder, heldout_per_class=2, balance_classes=True)
    assert torch.bincount(train.labels).tolist() == [3, 3, 3]
    assert torch.bincount(heldout.labels).tolist() == [2, 2, 2]
    for label in range(3):
        first = [name for name, of in zip(full.names, full.labels) if of == label][:3]
        assert [name for name, of in zip(train.names, train.labels) if of == label] == first


def test_held_out_rule_that_empties_a_class_is_refused(folder):
    with pytest.raises(ValueError, match=r"heldout_per_class=5 leaves class 'cat' \(5 images\).*less than 5"):
        load(folder, heldout_per_class=5)


def test_copies_of_training_images_are_not_held_out(folder):
    before, heldout = load(folder, heldout_per_class=2)
    shutil.copy(folder / "cat" / "00.png", folder / "cat" / "99.png")
    with pytest.warns(
        UserWarning, match="1 of 6 held-out images are, byte for byte, training ones.*: cat/99.png"
    ) as told:
        train, left = load(folder, heldout_per_class=2)
    assert len(told) == 1
    assert train.names == ["cat/00.png", "cat/01.png", "cat/02.png", "cat/03.png", *before.names[3:]]
    assert left.names == ["cat/04.png", *heldout.names[2:]] and left.labels.tolist() == [0, 1, 1, 2, 2]


def test_copies_on_one_side_stay(folder):
    shutil.copy(folder / "cat" / "00.png", folder / "cat" / "000.png")
    shutil.copy(folder / "dog" / "05.png", folder / "dog" / "06.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train, heldout = load(folder, heldout_per_class=2)
    assert "cat/000.png" in train.names and "dog/05.png" in heldout.names and len(train) + len(heldout) == 20


def test_an_image_in_two_classes_is_told_and_not_held_out_of_one(folder):
    shutil.copy(folder / "cat" / "00.png", folder / "dog" / "99.png")
    shutil.copy(folder / "cat" / "01.png", folder / "wild" / "000.png")
    with pytest.warns(UserWarning) as told:
        train, heldout = load(folder, heldout_per_class=2)
    two, copies = (str(warning.message) for warning in told)
    assert "4 images" in two and "in two classes" in two
    assert all(name in two for name in ("cat/00.png", "cat/01.png", "dog/99.png", "wild/000.png"))
    assert "1 of 6 held-out images" in copies and "dog/99.png" in copies
    assert "dog/99.png" not in heldout.names and {"cat/01.png", "wild/000.png"} <= {*train.names}


def test_a_data_set_without_copies_keeps_its_fingerprints(tmp_path):
    """Else no run of an earlier version would go on."""
    for index, name in enumerate(("cat/1.png", "cat/2.png", "dog/1.png", "dog/10.png", "dog/2.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"P6 2 2 255\n" + bytes(range(index, index + 12)))  # the same in every Pillow
    assert [part.fingerprint[:12] for part in load(tmp_path)] == ["562eaba68ec3", "09a7c1953586"]


# Folders


def test_flat_folder_is_unconditional(tmp_path):
    for index in (2, 0, 1):
        write(tmp_path / f"{index}.png", index)
    train, heldout = load(tmp_path, heldout_per_class=1)
    assert train.class_names == () and train.labels is None and heldout.labels is None
    assert train.names == ["0.png", "1.png"] and heldout.names == ["2.png"]
    assert "unconditional" in describe(train, heldout)


def test_nested_uppercase_linked_and_hidden_files(tmp_path):
    root = tmp_path / "photos"
    for name in ("a/deep/er/1.PNG", "a/2.JPG", "b/3.jpeg", "b/4.webp", "b/5.BMP", "b/6.gif", "b/7.TIFF"):
        write(root / name)
    for name in ("a/.hidden.png", ".thumbnails/8.png", "b/.cache/9.png"):
        write(root / name)
    (root / "b" / "notes.txt").write_text("no image")
    (root / "b" / "circle").symlink_to(root / "b")
    (root / "c").symlink_to(root / "a")
    train, heldout = load(root, heldout_fraction=0.0)
    b = ["b/3.jpeg", "b/4.webp", "b/5.BMP", "b/6.gif", "b/7.TIFF"]
    assert train.names == ["a/2.JPG", "a/deep/er/1.PNG", *b, "c/2.JPG", "c/deep/er/1.PNG"]
    assert train.images(range(len(train))).shape == (9, 3, 8, 8)


def test_class_folder_without_images_is_left_out_with_a_warning(folder):
    (folder / "aardvark").mkdir()
    with pytest.warns(UserWarning, match="1 classes have no image and are left out: aardvark"):
        train, _ = load(folder)
    assert train.class_names == ("cat", "dog", "wild")
    assert train.labels.unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("wrapper", ["photos", "photos/of/mine"])
def test_classes_one_folder_further_down_are_told(tmp_path, wrapper):
    for name in ("cat", "dog"):
        for index in range(2):
            write(tmp_path / wrapper / name / f"{index}.png", index + len(name) * ord(name[0]))
    with pytest.warns(UserWarning, match="1 of 1 classes.*cat, dog") as told:
        train, _ = load(tmp_path)
    assert train.class_names == ("photos",)
    assert str(tmp_path / wrapper) in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(tmp_path / wrapper)[0].class_names == ("cat", "dog")


def test_classes_of_folders_are_told_and_folders_beside_images_are_not(folder):
    for index, name in enumerate(("siamese", "persian")):
        write(folder / "tiger" / name / "1.png", 500 + index)
        write(folder / "cat" / name / "1.png", 600 + index)
        write(folder / "dog" / "images" / f"{name}.png", 700 + index)
    with pytest.warns(UserWarning, match="1 of 4 classes.*'tiger': persian, siamese") as told:
        train, _ = load(folder)
    assert len(told) == 1 and train.class_names == ("cat", "dog", "tiger", "wild")


def loose_photos(root, count=6):
    for index in range(count):
        write(root / f"{index}.png", index)
    return [f"{index}.png" for index in range(count)]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
@pytest.mark.parametrize("labels", [["dog", "cat"], [10, 2]])
def test_labels_of_imagefolder_are_read(tmp_path, name, labels):
    """As `datasets` reads them."""
    datasets = pytest.importorskip("datasets")
    pandas = pytest.importorskip("pandas")
    names = loose_photos(tmp_path)
    table = pandas.DataFrame({"file_name": names, "text": "x", "label": labels * 3})
    save = {".csv": table.to_csv, ".parquet": table.to_parquet}.get(Path(name).suffix)
    if save is None:
        table.to_json(tmp_path / name, orient="records", lines=True)
    else:
        save(tmp_path / name, index=False)
    expected = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), split="train", cache_dir=tmp_path / ".hf")
    train, _ = load(tmp_path, heldout_fraction=0.0)
    of = dict(zip(train.names, (train.class_names[label] for label in train.labels)))
    assert train.class_names == tuple(map(str, sorted(labels)))
    assert of == {Path(row["image"].filename).name: str(row["label"]) for row in expected}
    assert load(tmp_path, label_column="text")[0].class_names == ("x",)
    with pytest.raises(ValueError, match="label_column='kind' is not a column.*text"):
        load(tmp_path, label_column="kind")


def test_metadata_without_a_label_is_told_and_class_folders_come_first(folder, tmp_path):
    pytest.importorskip("pandas")
    names = loose_photos(tmp_path / "loose")
    lines = "".join(json.dumps({"file_name": name, "kind": name[0]}) + "\n" for name in names)
    (tmp_path / "loose" / "metadata.jsonl").write_text(lines)
    with pytest.warns(UserWarning, match=r"without classes.*\['kind'\].*label_column"):
        train, _ = load(tmp_path / "loose")
    assert train.class_names == ()
    (tmp_path / "loose" / "metadata.jsonl").write_text('{"id": 1, "label": "x"}')
    with pytest.warns(UserWarning, match=r"metadata.jsonl is not read.*\['id', 'label'\] is called file_name"):
        assert load(tmp_path / "loose")[0].class_names == ()
    (folder / "metadata.csv").write_text("file_name,label\ncat/00.png,x\n")
    assert load(folder)[0].class_names == ("cat", "dog", "wild")
    with pytest.raises(ValueError, match="metadata.csv has no label for 17 of 18 images.*cat/01.png"):
        load(folder, label_column="label")
    everything = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.png"))
    lines = "".join(f"{name},{'' if name == 'dog/01.png' else 'x'}\n" for name in everything)
    (folder / "metadata.csv").write_text(f"file_name,label\n{lines}")
    with pytest.raises(ValueError, match="metadata.csv has no label for 1 of 18 images: dog/01.png"):
        load(folder, label_column="label")
    (folder / "metadata.csv").unlink()
    with pytest.raises(ValueError, match="label_column='label' has no effect.*metadata.csv"):
        load(folder, label_column="label")


def test_labels_of_edm_are_read(tmp_path):
    for index in range(4):
        write(tmp_path / f"0000{index % 2}" / f"img{index}.png", index)
    names = [f"0000{index % 2}/img{index}.png" for index in range(4)]
    file = tmp_path / "dataset.json"
    file.write_text(json.dumps({"labels": [[name, [7, 7, 3, 3][index]] for index, name in enumerate(names)]}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train, _ = load(tmp_path, heldout_fraction=0.0)
    assert train.class_names == ("3", "7") and train.labels.tolist() == [0, 0, 1, 1]
    assert train.names == [names[2], names[3], names[0], names[1]]
    file.write_text(json.dumps({"labels": None}))
    assert load(tmp_path)[0].class_names == ()
    for content, told in (
        ({"labels": [[names[0], 1]]}, "dataset.json has no label for 3 of 4 images"),
        ({"labels": [[name, [1, 0]] for name in names]}, r"integers or strings, but 00000/img0.png has \[1, 0\]"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=told):
            load(tmp_path)
    file.write_text("{")
    with pytest.raises(ValueError, match="dataset.json has the labels, and cannot be read"):
        load(tmp_path)
    for content in ({"made by": "another tool"}, {"labels": ["cat", "dog"]}, {"labels": {"0": "cat"}}, []):
        file.write_text(json.dumps(content))
        assert load(tmp_path)[0].class_names == ("00000", "00001")


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("place", ["photos", "photos/dog", "photos/dog/deeper"])
def test_folder_that_cannot_be_listed_is_an_error(place):
    with tempfile.TemporaryDirectory() as top:  # not in pytest's folder, which is its user's alone
        root = Path(top)
        for name in ("cat", "dog", "dog/deeper"):
            write(root / "photos" / name / "1.png", len(name))
        root.chmod(0o755)
        (root / place).chmod(0o311)
        with as_no_root(), pytest.raises(ValueError, match=f"{place}' cannot be listed .Permission denied"):
            load(root / "photos")
        (root / place).chmod(0o755)


def test_class_folder_that_is_a_link_to_nothing_is_an_error(folder):
    (folder / "tiger").symlink_to(folder / "not mounted")
    with pytest.raises(ValueError, match="tiger' is a link to nothing"):
        load(folder)


def test_classes_that_are_integers_are_in_their_order(tmp_path):
    for name in ("10", "2", "1"):
        for index in range(2):
            write(tmp_path / "numbers" / name / f"{index}.png", 2 * int(name) + index)
    (tmp_path / "numbers" / "notes").mkdir()
    with pytest.warns(UserWarning, match="left out: notes"):
        train, heldout = load(tmp_path / "numbers")
    assert train.class_names == ("1", "2", "10") and heldout.names == ["1/1.png", "2/1.png", "10/1.png"]
    (tmp_path / "numbers" / "notes").rmdir()
    (tmp_path / "numbers" / "1").rename(tmp_path / "numbers" / "one")
    assert load(tmp_path / "numbers")[0].class_names == ("10", "2", "one")
    table = write_parquet(tmp_path / "n.parquet", {"image": rows("abc"), "label": ["10", "2", "-1"]})
    assert load(table)[0].class_names == ("-1", "2", "10")


NFC, NFD = "caf\u00e9", "cafe\u0301"


def test_names_are_compared_in_one_unicode_form(tmp_path):
    for index in range(4):
        write(tmp_path / "nfc" / NFC / f"{index} {NFC}.png", index)
    shutil.copytree(tmp_path / "nfc" / NFC, tmp_path / "nfd" / NFD)
    expected = load(tmp_path / "nfc")
    for file in list((tmp_path / "nfd" / NFD).iterdir()):
        file.rename(file.with_name(file.name.replace(NFC, NFD)))
    found = load(tmp_path / "nfd")
    assert found[0].class_names == (NFC,) and fingerprints(found) == fingerprints(expected)
    assert torch.equal(found[0][0], expected[0][0])
    # Both in one folder, as a copy from another system leaves it.
    write(tmp_path / "nfd" / NFC / "4.png", 5)
    train, _ = load(tmp_path / "nfd", heldout_fraction=0.0)
    assert train.class_names == (NFC,) and len(train) == 5
    (tmp_path / "nfc" / NFC).rename(tmp_path / "nfc" / "pictures")
    labels = [[f"pictures/{index} {NFD}.png", [NFC, NFD][index % 2]] for index in range(4)]
    (tmp_path / "nfc" / "dataset.json").write_text(json.dumps({"labels": labels}))
    assert load(tmp_path / "nfc")[0].class_names == (NFC,)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are Unicode")
def test_names_that_are_no_utf8_do_not_end_a_run(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    for index in range(3):
        write(tmp_path / "photos" / name / f"{name}{index}.png", index)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in ("read", "from the index"):
            train, heldout = indexed(tmp_path / "photos", tmp_path / "cache")
    assert train.class_names == ("caf\\xe9",) and heldout.names == ["caf\\xe9/caf\\xe92.png"]
    (describe(train, heldout) + json.dumps(train.class_names, ensure_ascii=False)).encode("utf-8")
    assert train.images([0, 1]).shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"dataset=.*caf\\udce9.*no UTF-8"):
        load(tmp_path / "photos" / name)


def test_mixed_folder_is_refused(folder):
    write(folder / "stray.png")
    with pytest.raises(ValueError, match=r"mixes 1 loose images \(such as 'stray.png'\) with 3 subfolders"):
        load(folder)


def test_empty_and_missing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no image that Pillow reads, but nothing"):
        load(tmp_path)
    (tmp_path / "part.parquet").touch()
    with pytest.raises(ValueError, match="could not be loaded as a Hub data set"):
        load(tmp_path)
    with pytest.raises(ValueError, match="no such folder.*parquet.*Hub id like 'user/name'"):
        load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="matches no .parquet file"):
        load(tmp_path / "nothing*.parquet")
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        load(tmp_path / "part.parquet")
    (tmp_path / "photos.zip").touch()
    with pytest.raises(ValueError, match="unpack archives"):
        load(tmp_path / "photos.zip")


@pytest.mark.parametrize("name", ["train", "Test", "val", "validation", "training_set", "test-images", "val2017"])
def test_split_names_as_classes_are_refused(tmp_path, name):
    write(tmp_path / name / "cat" / "1.png")
    with pytest.raises(ValueError, match=f"classes named like splits.*{name}.*Pass the folder"):
        load(tmp_path)
    train, _ = load(tmp_path / name)
    assert train.class_names == ("cat",)


SUFFIXES = [
    ".jfif",
    ".jp2",
    ".j2k",
    ".ppm",
    ".tga",
    ".sgi",
    ".pcx",
    ".apng",
    ".ico",
    *[".avif"] * features.check("avif"),
]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_still_image_that_pillow_reads_is_read(folder, suffix):
    picture(300, (16, 16)).save(folder / "cat" / f"one more{suffix.upper()}", Image.registered_extensions()[suffix])
    train, heldout = load(folder)
    names = train.names + heldout.names
    assert len(names) == 19 and f"cat/one more{suffix.upper()}" in names


def test_what_is_no_still_image_is_left_out_and_counted(folder):
    others = ["a.pdf", "b.ps", "c.eps", "d.mpg", "e.mp4", "f.txt", "g.TXT", "h.h5", "i.svg", "j"]
    for name in others:
        (folder / "cat" / name).write_bytes(b"no image")
    (folder / "k.csv").touch()
    with pytest.warns(UserWarning, match="no images are left out: 2 .txt, ") as told:
        train, heldout = load(folder)
    message = str(told[0].message)
    assert len(train) + len(heldout) == 18 and len(told) == 1
    for count in ("1 .csv", "1 .pdf", "1 .ps", "1 .eps", "1 .mpg", "1 .mp4", "1 .h5", "1 .svg", "1 without a suffix"):
        assert count in message
    shutil.rmtree(folder / "dog")
    for file in folder.rglob("*.png"):
        file.rename(file.with_suffix(".nef"))
    with pytest.raises(ValueError, match="holds no image that Pillow reads, but 12 .nef, 2 .txt"):
        load(folder)


# Unreadable files


@pytest.mark.parametrize("damage", ["text", "empty", "cut.png", "cut.jpg", "cut.webp", "cut.gif"])
def test_unreadable_file_in_a_small_folder_is_an_error(folder, damage):
    bad = folder / "cat" / f"zz_{damage}" if "." in damage else folder / "cat" / "zz.png"
    data = {"text": b"not an image", "empty": b""}.get(damage)
    if data is None:
        data = encoded(picture(0, (64, 64)), {"jpg": "JPEG"}.get(damage[4:], damage[4:].upper()))
        data = data[: len(data) * 2 // 3]
    bad.write_bytes(data)
    with pytest.raises(ValueError, match=f"1 of 19 images cannot be read.*cat/{bad.name}"):
        load(folder)


def cut_behind_its_thumbnail():
    """A JPEG whose last bytes are missing, with the end mark of the thumbnail in what is left."""
    thumbnail = encoded(picture(1, (40, 40)), "JPEG")
    data = encoded(picture(2, (200, 200)), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + thumbnail)
    data = data[: len(thumbnail) + 2500]
    assert b"\xff\xd9" in data[-4096:]
    return data


def broken_exif():
    """A JPEG to be turned, whose unit of resolution is text."""
    exif = Image.Exif()
    exif[274], exif[296] = 6, 2
    return encoded(picture(3), "JPEG", exif=exif.tobytes().replace(b"\x01\x28\0\x03", b"\x01\x28\0\x02"))


@pytest.mark.parametrize("make", [cut_behind_its_thumbnail, broken_exif])
def test_what_does_not_decode_is_found_by_the_check_and_all_at_once(folder, make):
    data = make()
    with pytest.raises(Exception) as decoding:
        decode_image(data, 8)
    for name in ("x", "y"):
        (folder / "cat" / f"{name}.jpg").write_bytes(data)
    with pytest.raises(ValueError, match="2 of 20 images cannot be read.*cat/x.jpg.*cat/y.jpg") as refused:
        load(folder)
    assert type(decoding.value).__name__ in str(refused.value)


def test_check_passes_what_decodes_and_no_false_checksum():
    for image, format in (
        (picture(0, (300, 200)), "JPEG"),
        (picture(0).convert("CMYK"), "JPEG"),
        (picture(0), "WEBP"),
    ):
        check_image(encoded(image, format))
    with pytest.raises(SyntaxError, match="broken PNG file"):
        data = bytearray(encoded(picture(0)))
        data[-20] ^= 1  # decodes, but not to what was saved
        check_image(bytes(data))


@pytest.mark.parametrize(
    "pixels, told",
    [
        (np.arange(120, dtype=np.uint16).reshape(10, 12), "come out black"),
        (np.arange(120, dtype=np.uint16).reshape(10, 12) * 34, "come out black"),  # 12 bits
        (np.arange(120, dtype=np.int32).reshape(10, 12) * 1000, "pixels from 0 to 119000"),
        (np.arange(120, dtype=np.int32).reshape(10, 12) * 100 - 9, "pixels from -9 to 11891"),
        (np.arange(120, dtype=np.float32).reshape(10, 12), "floating-point"),
    ],
)
def test_deep_pixels_that_would_be_lost_are_refused(folder, pixels, told):
    Image.fromarray(pixels).save(folder / "cat" / "deep.tiff")
    with pytest.raises(ValueError, match=rf"1 of 19 images cannot be read.*cat/deep.tiff \(ValueError: .*{told}"):
        load(folder)


def test_black_is_black_in_any_depth(folder):
    Image.fromarray(np.zeros((10, 12), dtype=np.uint16)).save(folder / "cat" / "deep.tiff")
    train, heldout = load(folder)
    assert "cat/deep.tiff" in [*train.names, *heldout.names]


def test_what_a_disk_has_of_its_own_is_no_class(folder):
    before = load(folder)[0]
    shutil.copytree(folder / "cat", folder / "lost+found")
    (folder / "latest.txt").symlink_to("nowhere")
    assert load(folder)[0].fingerprint == before.fingerprint


def png_of_16_bits(pixels):
    """In RGB, which Pillow does not write."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_deep_colour_is_scaled_or_refused():
    pixels = np.array(picture(5, (8, 8))).astype(np.uint16)
    assert np.array_equal(decode_image(png_of_16_bits(pixels * 257), 8).permute(1, 2, 0).numpy(), pixels)
    check_image(png_of_16_bits(pixels * 257))
    with pytest.raises(ValueError, match="come out black"):
        check_image(png_of_16_bits(pixels * 16))
    wide = np.arange(64, dtype=np.int32).reshape(8, 8) * 257
    assert np.array_equal(decode_image(encoded(Image.fromarray(wide), "TIFF"), 8)[0].numpy(), wide // 257)


@pytest.mark.parametrize("kind", ["strip", "pipe", "device"])
def test_what_would_take_all_memory_or_time_is_named(folder, kind):
    place = folder / "cat" / "strange.png"
    if kind == "strip":
        Image.new("L", (1, 60_000)).save(place)
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to("/dev/zero")
    told = "1 x 60000 pixels, more than 20 times as long as wide" if kind == "strip" else "not a regular file"
    with pytest.raises(ValueError, match=rf"strange.png \(.*{told}\)"):
        load(folder)


def test_a_strip_that_is_not_too_long_is_read():
    assert decode_image(encoded(picture(0, (10, 200))), 8).shape == (3, 8, 8)


def test_threads_share_room_and_what_is_larger_goes_alone():
    room, lock, inside, seen = Room(10), threading.Lock(), [], []

    def work(amount):
        with room.taken(amount):
            with lock:
                inside.append(amount)
                seen.append(list(inside))
            time.sleep(0.002)
            with lock:
                inside.remove(amount)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [3, 4, 25, 2, 9, 10, 1, 5] * 5))
    assert all(sum(amounts) <= 10 or amounts == [25] for amounts in seen)
    assert len(seen) == 40 and max(map(len, seen)) > 1 and room.used == 0


def test_one_percent_unreadable_is_a_warning_that_names_them(tmp_path):
    for index in range(199):
        write(tmp_path / f"{index:03d}.png", index)
    (tmp_path / "bad.png").write_bytes(b"no")
    with pytest.warns(UserWarning, match=r"1 of 200 images cannot be read and are left out: bad.png \(not an image"):
        train, heldout = load(tmp_path)
    assert len(train) + len(heldout) == 199 and "bad.png" not in train.names + heldout.names
    for index in range(6):
        (tmp_path / f"bad{index}.png").write_bytes(b"no")
    with pytest.raises(ValueError, match="7 of 206.*bad.png.*bad3.png.* and 2 more"):
        load(tmp_path)


def test_file_that_breaks_after_the_check_is_named(folder):
    train, _ = load(folder)
    (folder / train.names[0]).write_bytes(b"gone")
    with pytest.raises(ValueError, match="image 'cat/00.png' cannot be decoded"):
        train[0]


# Pixels


def test_images_match_single_reads_and_pillow(folder):
    train, _ = load(folder)
    batch = train.images(torch.tensor([3, 0, -1]))
    assert batch.dtype == torch.uint8 and batch.is_contiguous()
    assert torch.equal(batch, torch.stack([train[3], train[0], train[len(train) - 1]]))
    with Image.open(folder / train.names[3]) as image:
        expected = image.resize((10, 8), Image.Resampling.LANCZOS).crop((1, 0, 9, 8))
    assert np.array_equal(train[3].permute(1, 2, 0).numpy(), np.array(expected))
    assert len(list(train)) == len(train)
    with pytest.raises(IndexError, match="index=99 is out of range"):
        train[99]


def test_image_of_the_right_size_passes_unchanged():
    image = picture(0, (8, 8))
    assert np.array_equal(decode_image(encoded(image), 8).permute(1, 2, 0).numpy(), np.array(image))


@pytest.mark.parametrize("size", [(24, 8), (8, 24)])
def test_crop_is_centred(size):
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    middle = slice(8, 16)
    pixels[(slice(None), middle) if size[0] == 24 else middle] = picture(1, (8, 8))
    cropped = decode_image(encoded(Image.fromarray(pixels)), 8)
    assert np.array_equal(cropped.permute(1, 2, 0).numpy(), np.array(picture(1, (8, 8))))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = np.array(picture(2, (8, 8)))
    # What the camera stored, so that the viewer's turn (TIFF 6.0, tag 274) gives the upright image again.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    assert np.array_equal(decode_image(data, 8).permute(1, 2, 0).numpy(), upright)


def test_every_mode_becomes_rgb():
    image = picture(3, (8, 8))
    grey = np.array(image.convert("L"))

    def decoded(source, format="PNG", **options):
        return decode_image(encoded(source, format, **options), 8).permute(1, 2, 0).numpy()

    assert np.array_equal(decoded(image.convert("L")), np.stack([grey] * 3, -1))
    palette = image.quantize(16)
    assert np.array_equal(decoded(palette), np.array(palette.convert("RGB")))
    assert np.array_equal(decoded(image.convert("1")), np.array(image.convert("1").convert("RGB")))
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.array_equal(decoded(wide), np.stack([grey] * 3, -1))
    cmyk = decode_image(encoded(image.convert("CMYK"), "TIFF"), 8).permute(1, 2, 0).numpy()
    assert np.array_equal(cmyk, np.array(image.convert("CMYK").convert("RGB")))
    with pytest.raises(ValueError, match="floating-point"):
        decoded(image.convert("F"), "TIFF")


def test_transparency_is_composited_on_white():
    image = picture(4, (8, 8))
    image.putalpha(0)
    assert decode_image(encoded(image), 8).eq(255).all()
    image.putalpha(255)
    assert np.array_equal(decode_image(encoded(image), 8).permute(1, 2, 0).numpy(), np.array(image)[..., :3])
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert decode_image(encoded(palette, transparency=1), 8).eq(255).all()


def test_first_frame_of_an_animation():
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    data = encoded(first, "GIF", save_all=True, append_images=[second])
    assert decode_image(data, 8).flatten(1)[:, 0].tolist() == [255, 0, 0]


# Fingerprint


def test_fingerprint_follows_content_and_nothing_else(folder, tmp_path):
    train, heldout = load(folder)
    assert load(shutil.copytree(folder, tmp_path / "elsewhere"))[0].fingerprint == train.fingerprint
    os.utime(folder / "cat" / "00.png", (0, 0))
    assert load(folder, horizontal_flip=True)[0].fingerprint == train.fingerprint
    prints = {train.fingerprint, heldout.fingerprint}
    prints.add(load_images(DataConfig(dataset=str(folder), resolution=4))[0].fingerprint)
    prints.add(load(folder, heldout_per_class=2)[0].fingerprint)
    (folder / "cat").rename(folder / "catfish")
    prints.add(load(folder)[0].fingerprint)
    (folder / "catfish").rename(folder / "cat")
    write(folder / "cat" / "00.png", 999)
    changed, same = load(folder)
    prints.add(changed.fingerprint)
    assert len(prints) == 6 and same.fingerprint == heldout.fingerprint


def test_fingerprints_and_index_are_stable_across_processes(folder, tmp_path):
    table = write_parquet(tmp_path / "x.parquet", {"image": rows("abcdef"), "label": [0, 0, 0, 1, 1, 1]})
    expected = [part.fingerprint for data in (folder, table) for part in indexed(data, tmp_path / "cache")]
    code = (
        "import sys; from freqgate_dit.training.data import DataConfig, load_images; "
        "from freqgate_dit.training.image_sources import TableReader; "
        # Without the index for the folder, and for the table without reading.
        "parts = list(load_images(DataConfig(dataset=sys.argv[1], resolution=8))); TableReader.__call__ = None; "
        "parts += load_images(DataConfig(dataset=sys.argv[2], resolution=8), sys.argv[3]); "
        "print(*[part.fingerprint for part in parts])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    # A relative path from another directory must not matter either.
    result = subprocess.run(
        [sys.executable, "-c", code, folder.name, table, str(tmp_path / "cache")],
        cwd=folder.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == expected


def test_pickled_images_still_load(folder):
    train, _ = load(folder)
    assert torch.equal(pickle.loads(pickle.dumps(train)).images([1, 2]), train.images([1, 2]))


# Index of what is readable


@pytest.fixture
def reads(monkeypatch):
    """A list that grows by the key of every image that is read."""
    keys = []
    for reader in (FolderReader, TableReader):

        def read(self, key, read=reader.__call__):
            keys.append(key)
            return read(self, key)

        monkeypatch.setattr(reader, "__call__", read)
    return keys


def indexed(dataset, cache_dir, **options):
    return load_images(DataConfig(dataset=str(dataset), resolution=8, **options), cache_dir)


def fingerprints(parts):
    return [part.fingerprint for part in parts]


def test_second_start_reads_no_file(folder, tmp_path, reads):
    plain = load(folder)
    assert len(reads) == 18
    assert fingerprints(indexed(folder, tmp_path / "cache")) == fingerprints(plain) and len(reads) == 36
    again = indexed(folder, tmp_path / "cache")
    assert len(reads) == 36
    assert fingerprints(again) == fingerprints(plain)
    assert [part.names for part in again] == [part.names for part in plain]
    # Other splits and sizes of the same files, and the same folder by another name, read nothing either.
    other = indexed(folder, tmp_path / "cache", heldout_per_class=2)
    assert fingerprints(other) != fingerprints(plain)
    (tmp_path / "link").symlink_to(folder)
    assert fingerprints(indexed(tmp_path / "link", tmp_path / "cache")) == fingerprints(plain)
    assert len(reads) == 36 and len(list((tmp_path / "cache").rglob("*"))) == 2  # index/, and the file in it
    assert torch.equal(again[0][3], plain[0][3])


def test_index_holds_relative_names_and_no_path(folder, tmp_path):
    indexed(folder, tmp_path / "cache")
    (file,) = (tmp_path / "cache" / "index").iterdir()
    content = file.read_text()
    assert str(tmp_path) not in content and "photos" not in file.name + content
    entries = json.loads(content)["entries"]
    status = (folder / "cat" / "00.png").stat()
    assert len(entries) == 18 and entries["cat/00.png"][:2] == [status.st_size, status.st_mtime_ns]


def test_changed_added_and_removed_files_are_noticed(folder, tmp_path, reads):
    def check(expected):
        """What is read with the index, which must find what a start without it finds."""
        reads.clear()
        found = fingerprints(indexed(folder, tmp_path / "cache"))
        assert reads == expected
        assert found == fingerprints(load(folder))

    indexed(folder, tmp_path / "cache")
    check([])
    file = folder / "dog" / "02.png"
    write(file, 77)
    check(["dog/02.png"])
    # Of the same size, but written later.
    before = file.stat()
    file.write_bytes(encoded(picture(78)).ljust(before.st_size, b"\0")[: before.st_size])
    os.utime(file, ns=(before.st_mtime_ns + 1,) * 2)
    check(["dog/02.png"])
    write(folder / "cat" / "99.png", 99)
    check(["cat/99.png"])
    (folder / "wild" / "03.png").unlink()
    check([])
    (folder / "wild" / "06.png").rename(folder / "wild" / "07.png")
    check(["wild/07.png"])
    (entries,) = [json.loads(path.read_text())["entries"] for path in (tmp_path / "cache" / "index").iterdir()]
    assert len(entries) == 18 and "wild/03.png" not in entries


def test_same_size_and_time_is_taken_for_unchanged(folder, tmp_path):
    """As documented, and the proof that known files are not even opened."""
    before = fingerprints(indexed(folder, tmp_path / "cache"))
    for file in folder.rglob("*.png"):
        status = file.stat()
        file.write_bytes(bytes(status.st_size))
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprints(indexed(folder, tmp_path / "cache")) == before
    with pytest.raises(ValueError, match="18 of 18 images cannot be read"):
        load(folder)


@pytest.mark.parametrize("content", ["", "{", '{"format": 0, "entries": {}}'])
def test_damaged_or_older_index_is_made_anew(folder, tmp_path, reads, content):
    indexed(folder, tmp_path / "cache")
    (file,) = (tmp_path / "cache" / "index").iterdir()
    good = file.read_text()
    file.write_text(content)
    reads.clear()
    indexed(folder, tmp_path / "cache")
    assert len(reads) == 18 and file.read_text() == good


def test_unreadable_files_are_read_and_reported_every_time(tmp_path, reads):
    root = tmp_path / "photos"
    for index in range(199):
        write(root / f"{index:03d}.png", index)
    (root / "bad.png").write_bytes(b"no")
    for expected in (200, 1):
        reads.clear()
        with pytest.warns(UserWarning, match="1 of 200 images cannot be read and are left out: bad.png"):
            train, heldout = indexed(root, tmp_path / "cache")
        assert len(reads) == expected and len(train) + len(heldout) == 199
    # More than 1 %: an error, but what was readable is not read again once they are gone.
    for name in ("bad2.png", "bad3.png"):
        (root / name).write_bytes(b"no")
    (root / "gone.png").symlink_to(root / "nowhere")
    write(root / "new.png", 500)
    with pytest.raises(ValueError, match="4 of 204 images cannot be read"):
        indexed(root, tmp_path / "cache")
    for name in ("bad.png", "bad2.png", "bad3.png", "gone.png"):
        (root / name).unlink()
    reads.clear()
    train, heldout = indexed(root, tmp_path / "cache")
    assert not reads and len(train) + len(heldout) == 200


def test_long_lists_are_checked_in_groups_and_in_order(tmp_path):
    assert list(_in_threads(lambda value: value + 1, range(10000))) == list(range(1, 10001))
    assert list(_in_threads(str, [])) == []


def test_rows_of_a_table_are_read_once(tmp_path, reads):
    path = write_parquet(tmp_path / "x.parquet", {"image": rows("abcdef"), "label": [0, 0, 0, 1, 1, 1]})
    first = fingerprints(indexed(path, tmp_path / "cache"))
    assert len(reads) == 6
    assert fingerprints(indexed(path, tmp_path / "cache")) == first and len(reads) == 6
    assert fingerprints(load(path)) == first and len(reads) == 12
    assert str(tmp_path) not in next((tmp_path / "cache" / "index").iterdir()).read_text()
    changed = rows("abcdef")
    changed[0]["bytes"] = encoded(picture(77))
    write_parquet(path, {"image": changed, "label": [0, 0, 0, 1, 1, 1]})
    reads.clear()
    assert fingerprints(indexed(path, tmp_path / "cache")) != first and len(reads) == 6


def test_rows_that_name_files_are_read_every_time(tmp_path, reads):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    for index in range(4):
        write(tmp_path / f"{index}.png", index)
    named = [{"bytes": None, "path": str(tmp_path / f"{index}.png")} for index in range(4)]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(named, struct)}), tmp_path / "x.parquet")
    first = fingerprints(indexed(tmp_path / "x.parquet", tmp_path / "cache"))
    write(tmp_path / "0.png", 99)
    assert fingerprints(indexed(tmp_path / "x.parquet", tmp_path / "cache")) != first and len(reads) == 8


def test_a_cache_that_cannot_be_written_is_told_and_done_without(folder, tmp_path):
    (tmp_path / "file").touch()
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"checked again at every start: `cache_dir`: .*`--cache_dir`"):
            found = indexed(folder, tmp_path / "file" / "cache")
        assert fingerprints(found) == fingerprints(load(folder))
    with pytest.raises(ValueError, match=r"`cache_dir` \(~no-such-user/cache\).*`--cache_dir`"):
        indexed(folder, "~no-such-user/cache")


def test_the_cache_of_datasets_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    table = write_parquet(tmp_path / "x.parquet", {"image": rows("abcd")})
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "x.parquet" / "cache")
    with pytest.raises(ValueError, match="dataset=.*`datasets` keeps what it has read in .*set HF_HOME"):
        load(table)


# Parquet and Hub


def test_parquet_with_class_label_and_file_names(tmp_path):
    datasets = pytest.importorskip("datasets")
    names = ["c.png", "a.png", "b.png", "f.png", "e.png", "d.png"]
    columns = {"picture": rows(names), "kind": [0, 0, 0, 1, 1, 1]}
    features = {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["dog", "cat"])}
    train, heldout = load(write_parquet(tmp_path / "x.parquet", columns, features), heldout_per_class=1)
    assert train.class_names == ("dog", "cat")
    assert train.names == ["a.png", "b.png", "d.png", "e.png"] and heldout.names == ["c.png", "f.png"]
    assert torch.equal(train[0], decode_image(columns["picture"][1]["bytes"], 8))
    assert torch.equal(heldout[1], decode_image(columns["picture"][3]["bytes"], 8))


def test_parquet_fingerprint_does_not_depend_on_the_path(tmp_path):
    columns = {"image": rows("abcd"), "label": [0, 0, 1, 1]}
    first = load(write_parquet(tmp_path / "x.parquet", columns))[0]
    (tmp_path / "other").mkdir()
    again = load(write_parquet(tmp_path / "other" / "y.parquet", columns))[0]
    assert first.fingerprint == again.fingerprint
    columns["image"][0]["bytes"] = encoded(picture(77))
    assert load(write_parquet(tmp_path / "x.parquet", columns))[0].fingerprint != first.fingerprint


def test_parquet_labels_without_names(tmp_path):
    numbers = write_parquet(tmp_path / "n.parquet", {"image": rows("abcdef"), "label": [10, 2, 10, 2, 0, 0]})
    train, heldout = load(numbers)
    assert (
        train.class_names == ("0", "2", "10") and train.names == ["e", "b", "a"] and heldout.names == ["f", "d", "c"]
    )
    words = write_parquet(tmp_path / "w.parquet", {"image": rows("abcd"), "label": ["dog", "cat", "dog", "cat"]})
    assert load(words)[0].class_names == ("cat", "dog")
    none = write_parquet(tmp_path / "u.parquet", {"image": rows([None] * 11), "caption": ["x"] * 11})
    with pytest.warns(UserWarning, match=r"without classes.*\['caption'\].*label_column"):
        train, heldout = load(none, heldout_per_class=1)
    assert train.class_names == () and train.names == [f"{row:02d}" for row in range(10)] and heldout.names == ["10"]
    assert load(none, label_column="caption")[0].class_names == ("x",)


def test_parquet_written_by_others_and_by_glob(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    for shard, part in enumerate((rows("cadb")[:2], rows("cadb")[2:])):
        table = pa.table({"image": part, "label": ["x", "x"]})
        pq.write_table(table, tmp_path / f"part [{shard}].parquet")
    train, heldout = load(tmp_path / "*.parquet", heldout_per_class=1)
    assert train.names == ["a", "b", "c"] and heldout.names == ["d"]
    assert load(tmp_path / "part [[]1].parquet", heldout_per_class=1)[0].names == ["b"]
    pq.write_table(pa.table({"jpg": [row["bytes"] for row in rows("ab")]}), tmp_path / "raw.parquet")
    assert len(load(tmp_path / "raw.parquet", image_column="jpg")[0]) == 1


def test_what_is_there_is_no_pattern(folder, tmp_path, monkeypatch):
    place = tmp_path / "set [a-z]"
    place.mkdir()
    columns = {"image": rows("abcd"), "label": [0, 0, 1, 1]}
    expected = load(write_parquet(tmp_path / "plain.parquet", columns))[0].fingerprint
    write_parquet(place / "part [1].parquet", columns)
    for pattern in ("part [1].parquet", "*.parquet", "part [[]?].parquet"):
        assert load(place / pattern)[0].fingerprint == expected
    monkeypatch.chdir(place)
    assert load("part [1].parquet")[0].fingerprint == load("*.parquet")[0].fingerprint == expected
    with pytest.raises(ValueError, match=r"has a character of patterns.*pass its files .*\*\.parquet"):
        load(place)  # a Hub data set, which `datasets` loads by patterns
    assert load(shutil.move(folder, tmp_path / "photos [2]"))[0].class_names == ("cat", "dog", "wild")
    (tmp_path / "photos [3].zip").touch()
    with pytest.raises(ValueError, match="unpack archives"):
        load(tmp_path / "photos [3].zip")


def test_parquet_bad_columns(tmp_path):
    datasets = pytest.importorskip("datasets")
    both = {"image": datasets.Image(), "other": datasets.Image()}
    two = write_parquet(tmp_path / "two.parquet", {"image": rows("ab"), "other": rows("ab"), "label": [0, 0]}, both)
    with pytest.raises(ValueError, match=r"image_column=None.*pass one of \['image', 'other'\]"):
        load(two)
    assert len(load(two, image_column="other")[0]) == 1
    with pytest.raises(ValueError, match="image_column='photo' is not a column.*image"):
        load(two, image_column="photo")
    with pytest.raises(ValueError, match="image_column='label' has the type"):
        load(two, image_column="label")
    with pytest.raises(ValueError, match="label_column='kind' is not a column"):
        load(two, image_column="image", label_column="kind")
    with pytest.raises(ValueError, match="no image column"):
        load(write_parquet(tmp_path / "none.parquet", {"label": [1]}, {"label": datasets.Value("int64")}))


def test_parquet_bad_labels_and_rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    for labels, message in (
        (["x", None], "row 1 has None"),
        ([0.5, 1.5], "row 0 has 0.5"),
        (["train", "cat"], "classes named like splits"),
    ):
        path = write_parquet(tmp_path / "x.parquet", {"image": rows("ab"), "label": labels})
        with pytest.raises(ValueError, match=message):
            load(path)
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    path = write_parquet(tmp_path / "y.parquet", {"image": rows("ab"), "label": [0, -1]}, features)
    with pytest.raises(ValueError, match="1 unlabelled rows"):
        load(path)
    path = write_parquet(tmp_path / "z.parquet", {"image": rows("ab"), "label": [0, 2]}, features)
    with pytest.warns(UserWarning, match="no image and are left out: b"):
        train, _ = load(path)
    assert train.class_names == ("a", "c") and train.labels.tolist() == [0, 1]
    path = write_parquet(tmp_path / "null.parquet", {"image": [*rows("ab"), None]})
    with pytest.raises(ValueError, match="1 of 3 images cannot be read.*null"):
        load(path)


def test_downloaded_hub_data_set_shaped_like_huggan_afhq(tmp_path):
    """`load_dataset` takes the folder where it takes the Hub id, so this is the Hub's path without a network."""
    datasets = pytest.importorskip("datasets")
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "wild"])}
    (tmp_path / "AFHQ" / "data").mkdir(parents=True)
    columns = {"image": rows([None] * 9), "label": [0, 0, 0, 1, 1, 1, 2, 2, 2]}
    write_parquet(tmp_path / "AFHQ" / "data" / "train-00000-of-00001.parquet", columns, features)
    train, heldout = load(tmp_path / "AFHQ", heldout_per_class=1)
    assert train.class_names == ("cat", "dog", "wild") and heldout.names == ["2", "5", "8"]
    with pytest.raises(ValueError, match="dataset_split='nonsense'.*Check the spelling"):
        load(tmp_path / "AFHQ", dataset_split="nonsense")


def test_a_configuration_of_a_hub_data_set_is_named(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    for name, count in (("small", 3), ("large", 5)):
        write_parquet(tmp_path / "set" / f"{name}.parquet", {"image": rows([None] * count), "label": [0] * count})
    configs = [f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in ("small", "large")]
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
    with pytest.raises(ValueError, match="dataset_config=None.*(?s:.*)small"):
        load(tmp_path / "set")
    train, _ = load(tmp_path / "set", dataset_config="large", heldout_per_class=1)
    assert len(train) == 4


def test_hub_set_out_of_reach_is_a_clear_error(tmp_path):
    pytest.importorskip("datasets")
    code = (
        "from freqgate_dit.training.data import DataConfig, load_images\n"
        "try: load_images(DataConfig(dataset='nobody/nothing'))\n"
        "except ValueError as error: print(error)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert "dataset='nobody/nothing' is neither a folder of images nor .parquet files" in result.stdout
    assert "could not be loaded as a Hub data set" in result.stdout and "Check the spelling" in result.stdout


# Built-in set


def test_built_in_set():
    train, heldout = load_images(DataConfig(num_images=40))
    assert (len(train), len(heldout)) == (40, 512)
    assert len(train.class_names) == 64 and train.labels.shape == (40,) and train.labels.dtype == torch.int64
    assert torch.equal(train.images([0, 5])[1], train[5]) and train[5].shape == (3, 32, 32)
    again, _ = load_images(DataConfig(num_images=40))
    assert torch.equal(again[7], train[7]) and again.fingerprint == train.fingerprint
    assert "40 training and 512 held-out images" in describe(train, heldout)
    others = [{"data_seed": 1}, {"world": "add"}, {"num_images": 41}, {"resolution": 48}]
    prints = {load_images(DataConfig(**{"num_images": 40, **other}))[0].fingerprint for other in others}
    assert len(prints | {train.fingerprint, heldout.fingerprint}) == 6


# Options


def test_options_that_do_not_apply_are_refused(folder):
    with pytest.raises(ValueError, match="horizontal_flip=True.*changes its class"):
        load_images(DataConfig(horizontal_flip=True))
    with pytest.raises(ValueError, match="heldout_per_class=3 has no effect on dataset='shapes_textures'"):
        load_images(DataConfig(heldout_per_class=3))
    for option in (
        {"dataset_split": "validation"},
        {"dataset_config": "a"},
        {"image_column": "image"},
        {"num_images": 5},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(option))}=.* has no effect"):
            load(folder, **option)


@pytest.mark.parametrize(
    "option", [{"resolution": 0}, {"num_images": 0}, {"heldout_per_class": -1}, {"heldout_fraction": 1.0}]
)
def test_numbers_out_of_range_are_refused(option):
    name, value = next(iter(option.items()))
    with pytest.raises(ValueError, match=f"{name}={value}"):
        DataConfig(**option)


def test_every_field_is_a_flag():
    parser = HfArgumentParser(DataConfig)
    flags = "--dataset x --resolution 64 --horizontal_flip --heldout_per_class 3 --label_column kind --world add"
    (config,) = parser.parse_args_into_dataclasses(flags.split())
    expected = {"horizontal_flip": True, "heldout_per_class": 3, "label_column": "kind", "world": "add"}
    assert config == DataConfig("x", resolution=64, **expected)
    assert parser.parse_args_into_dataclasses([]) == (DataConfig(),)
    assert "--balance_classes" in parser.format_help()


# Front door


def test_describe_shows_classes_counts_and_samples(folder):
    text = describe(*load(folder, heldout_per_class=2))
    assert "12 training and 6 held-out images, 8x8 RGB" in text
    assert "  cat: 3 + 2\n  dog: 4 + 2\n  wild: 5 + 2\n" in text
    assert "samples: cat/00.png (cat), dog/03.png (dog), wild/04.png (wild)" in text
    assert "fewer than 2000" in text


def test_good_folder_gives_no_warning(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder)
