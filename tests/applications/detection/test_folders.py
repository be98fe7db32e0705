"""Folders in YOLO's and COCO's format: read exactly, or refused whole with every fault by its file and line."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bilevel.applications.detection.folders import FolderError, coco_folder, yolo_folder
from bilevel.applications.detection.problem import checked

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


def picture(path, width=40, height=20, box=None):
    """A black image with a white box."""
    pixels = np.zeros((height, width, 3), np.uint8)
    if box:
        x1, y1, x2, y2 = box
        pixels[y1:y2, x1:x2] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def yolo(tmp_path):
    """Two images with boxes and one without a label file, of other sizes."""
    picture(tmp_path / "images/train/a.png", 40, 20, (8, 4, 24, 16))
    picture(tmp_path / "images/train/b.png", 30, 60, (3, 6, 6, 12))
    picture(tmp_path / "images/train/c.png")
    labels = tmp_path / "labels/train"
    labels.mkdir(parents=True)
    (labels / "a.txt").write_text("1 0.4 0.5 0.4 0.6\n\n0 0.5 0.5 1.0 1.0\n")
    (labels / "b.txt").write_text("0 0.15 0.15 0.1 0.1\r\n")
    (tmp_path / "data.yaml").write_text("train: images/train\nnc: 2\nnames: ['tumour', \"none\"]  # two\n")
    return tmp_path


def test_a_yolo_folder_is_read_in_pixels(yolo):
    folder = yolo_folder(yolo)
    assert [file.name for file in folder.files] == ["a.png", "b.png", "c.png"]
    assert folder.names == ("tumour", "none")
    np.testing.assert_allclose(folder.boxes[0], [[8, 4, 24, 16], [0, 0, 40, 20]], atol=1e-5)
    np.testing.assert_allclose(folder.boxes[1], [[3, 6, 6, 12]], atol=1e-5)
    assert [c.tolist() for c in folder.classes] == [[1, 0], [0], []]
    assert folder.sizes.tolist() == [[40, 20], [30, 60], [40, 20]]
    assert repr(folder) == "Folder(3 images, 1 of them without a box; boxes: tumour 2, none 1)"


def test_a_batch_is_letterboxed_with_its_boxes(yolo):
    batch = yolo_folder(yolo).batch([1, 0], size=32)
    assert batch["image"].shape == (2, 32, 32, 3) and batch["image"].dtype == np.float32
    assert batch["mask"].tolist() == [[True, False], [True, True]]
    # 40 x 20 becomes 32 x 16 with 8 rows of grey above: the white box is where the annotation is.
    np.testing.assert_allclose(batch["boxes"][1, 0], [6.4, 8 + 3.2, 19.2, 8 + 12.8], atol=1e-4)
    image = batch["image"][1, :, :, 0]
    np.testing.assert_allclose(image[:8], 114 / 255, atol=1e-6)
    assert (image[12:20, 8:18] == 1).all() and (image[12:20, 22:] == 0).all()
    # 30 x 60 becomes 16 x 32, with 8 columns of grey on its left.
    np.testing.assert_allclose(batch["boxes"][0, 0], [8 + 1.6, 3.2, 8 + 3.2, 6.4], atol=1e-4)
    with pytest.raises(ValueError, match=r"a.png has 2 boxes and most=1 was given"):
        yolo_folder(yolo).batch(most=1)


def test_a_stream_gives_every_image_once_an_epoch_from_any_place(yolo):
    stream = yolo_folder(yolo).stream(1, size=16, seed=3)
    items = stream.items()
    first = [next(items) for _ in range(6)]
    for epoch in (first[:3], first[3:]):
        assert sorted(item["mask"].sum() for item in epoch) == [0, 1, 2]
    again = next(stream.items(4))
    np.testing.assert_array_equal(again["image"], first[4]["image"])


def test_other_ways_to_lay_it_out_and_to_name_classes(yolo):
    (yolo / "data.yaml").write_text("nc: 2\nnames:\n  0: tumour\n  1: none\nval: x\n")
    assert yolo_folder(yolo).names == ("tumour", "none")
    (yolo / "data.yaml").write_text("names:\n- tumour\n- 'none'\nnc: 2\n")
    assert yolo_folder(yolo).names == ("tumour", "none")
    (yolo / "data.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither a data.yaml nor a classes.txt.*give names="):
        yolo_folder(yolo)
    assert yolo_folder(yolo, names=("a", "b")).names == ("a", "b")
    (yolo / "classes.txt").write_text("tumour\nnone\n")
    assert yolo_folder(yolo).names == ("tumour", "none")
    (yolo / "valid").mkdir()
    (yolo / "images/train").rename(yolo / "valid/images")
    (yolo / "labels/train").rename(yolo / "valid/labels")
    assert len(yolo_folder(yolo, "val")) == 3


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("1 0.4 0.5 0.4 0.6\n0 0.9 0.5 0.4 0.6", r"a.txt:2: the box from \(0.7, 0.2\) to \(1.1, 0.8\) lies outside"),
        ("0 12 8 4 6", "a.txt:1: the box from .* lies outside the image.*shares of the image's sides were expected"),
        ("0 0.5 0.5 -0.2 0.1", "a.txt:1: the box has the width -0.2 and the height 0.1: its corners are swapped"),
        ("0 0.5 0.5 0 0.1", "a.txt:1: .* or it has no area"),
        ("0 nan 0.5 0.2 0.1", "a.txt:1: '0 nan 0.5 0.2 0.1' is not finite"),
        ("0 0.5 inf 0.2 0.1", "is not finite"),
        ("2 0.5 0.5 0.2 0.1", "a.txt:1: the class 2 is unknown; there are 0 tumour, 1 none"),
        ("-1 0.5 0.5 0.2 0.1", "the class -1 is unknown"),
        ("0.5 0.5 0.5 0.2 0.1", "the class 0.5 is unknown"),
        ("\n0 0.5 0.5 0.2", "a.txt:2: 4 columns; 5 were expected, class x y width height"),
        ("0 0.5 half 0.2 0.1", "a.txt:1: 'half' is no number"),
    ],
)
def test_a_broken_label_is_named_by_file_and_line(yolo, lines, message):
    (yolo / "labels/train/a.txt").write_text(lines)
    with pytest.raises(FolderError, match=message):
        yolo_folder(yolo)


def test_all_faults_are_listed_at_once_and_nothing_is_read(yolo):
    (yolo / "labels/train/a.txt").write_text("7 0.5 0.5 0.1 0.1\n0 0.5 0.5 2 2\n")
    (yolo / "labels/train/lost.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    (yolo / "labels/train/b.txt").write_bytes(b"\xff\xfe\x00")
    (yolo / "images/train/c.png").write_bytes(b"no image")
    (yolo / "images/train/d.jpg").write_bytes((yolo / "images/train/a.png").read_bytes()[:40])
    with pytest.raises(FolderError) as caught:
        yolo_folder(yolo)
    lines = str(caught.value).splitlines()
    assert lines[0] == "6 things are wrong, and nothing was read:"
    for line, part in zip(
        lines[1:],
        ["lost.txt: there is no image lost", "a.txt:1: the class 7", "a.txt:2: the box", "b.txt: no text in UTF-8",
         "c.png: no image that can be decoded", "d.jpg: no image that can be decoded"],
        strict=True,
    ):  # fmt: skip
        assert part in line


def test_what_is_missing_is_named(yolo, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has neither images/test nor test/images"):
        yolo_folder(yolo, "test")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        yolo_folder(tmp_path / "nowhere")
    (yolo / "images/val").mkdir()
    with pytest.raises(FileNotFoundError, match=r"labels/val is missing, beside .*images/val"):
        yolo_folder(yolo, "val")
    (yolo / "labels/val").mkdir()
    with pytest.raises(FolderError, match="there is no image"):
        yolo_folder(yolo, "val")
    picture(yolo / "images/val/x.png")
    with pytest.raises(FolderError, match="there is no label file for any of the 1 images"):
        yolo_folder(yolo, "val")
    (yolo / "labels/val/x.txt").touch()
    assert yolo_folder(yolo, "val").boxes[0].shape == (0, 4)
    picture(yolo / "images/val/x.bmp")
    with pytest.raises(FolderError, match=r"x.png: its label file would be that of x.bmp too"):
        yolo_folder(yolo, "val")


def test_rounded_labels_stick_out_a_little_and_are_cut(yolo):
    (yolo / "labels/train/a.txt").write_text("0 0.95 0.5 0.11 0.5\n")
    np.testing.assert_allclose(yolo_folder(yolo).boxes[0], [[35.8, 5, 40, 15]], atol=1e-4)
    with pytest.raises(FolderError, match="lies outside"):
        yolo_folder(yolo, slack=0.0)


def test_an_image_that_breaks_off_is_named_when_it_is_decoded(yolo):
    whole = yolo / "images/train/a.png"
    noise = np.random.default_rng(0).integers(0, 255, (80, 80, 3), np.uint8)
    Image.fromarray(noise).save(whole)
    whole.write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(FolderError, match=r"a.png: no image that can be decoded"):
        yolo_folder(yolo).batch(size=16)


ENTRIES = {
    "images": [
        {"id": 5, "file_name": "a.png", "width": 40, "height": 20},
        {"id": 9, "file_name": "in/b.png", "width": 30, "height": 60},
    ],
    "categories": [{"id": 8, "name": "write"}, {"id": 3, "name": "read"}],
    "annotations": [
        {"id": 1, "image_id": 9, "category_id": 8, "bbox": [3, 6, 3, 6]},
        {"id": 2, "image_id": 5, "category_id": 3, "bbox": [8.0, 4, 16, 12], "iscrowd": 1},
        {"id": 3, "image_id": 5, "category_id": 8, "bbox": [0, 0, 40, 20]},
    ],
}


@pytest.fixture
def coco(tmp_path):
    """Writes a file of annotations, an entry to a line; gives its path."""
    picture(tmp_path / "a.png", 40, 20, (8, 4, 24, 16))
    picture(tmp_path / "in/b.png", 30, 60)

    def write(**changed):
        parts = [
            f'"{name}": [\n' + ",\n".join(map(json.dumps, entries)) + "\n]"
            for name, entries in {**ENTRIES, **changed}.items()
        ]
        file = tmp_path / "instances.json"
        file.write_text('{"info": {"images": []},\n' + ",\n".join(parts) + "}\n")
        return file

    return write


def test_a_coco_file_is_read(coco):
    folder = coco_folder(coco())
    assert folder.names == ("read", "write")
    np.testing.assert_array_equal(folder.boxes[0], [[8, 4, 24, 16], [0, 0, 40, 20]])
    np.testing.assert_array_equal(folder.boxes[1], [[3, 6, 6, 12]])
    assert [c.tolist() for c in folder.classes] == [[0, 1], [1]]
    assert [c.tolist() for c in folder.crowd] == [[True, False], [False]]
    batch = folder.batch(size=20)
    np.testing.assert_allclose(batch["boxes"][0, 0], [4, 5 + 2, 12, 5 + 8], atol=1e-5)
    assert batch["crowd"].tolist() == [[True, False], [False, False]]


def changed(part, k, **entries):
    """The entries of a list, one of them changed (None: a key taken out)."""
    new = [dict(entry) for entry in ENTRIES[part]]
    new[k] = {key: value for key, value in {**new[k], **entries}.items() if value is not None}
    return {part: new}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            changed("annotations", 1, bbox=[30, 4, 16, 12]),
            r"json:12: the box from \(30, 4\) to \(46, 16\) lies outside",
        ),
        (changed("annotations", 2, bbox=[24, 16, -16, -12]), r"json:13: the box has the width -16 .* swapped"),
        (changed("annotations", 0, bbox=[float("nan"), 4, 1, 1]), r"json:11: the box \[nan, 4, 1, 1\] is not finite"),
        (changed("annotations", 0, bbox=[1, 2, 3]), r"json:11: 'bbox' is \[1, 2, 3\]; \[x, y, width, height\]"),
        (changed("annotations", 0, bbox=None), r"json:11: no 'bbox'"),
        (changed("annotations", 0, category_id=4), r"json:11: the category 4 is unknown; there are 3 read, 8 write"),
        (changed("annotations", 1, image_id=6), r"json:12: there is no image 6"),
        (changed("annotations", 2, id=1), r"json:13: the id 1 stands there for the second time"),
        (changed("images", 1, id=5), r"json:4: the id 5 stands there for the second time"),
        (changed("images", 1, file_name="c.png"), r"json:4: the image .*c.png is missing"),
        (changed("images", 0, width=41), r"json:3: .*a.png has 40 x 20 pixels, and 41 x 20 are said"),
        (changed("categories", 1, name=None), r"json:8: no 'name'; a text was expected"),
        ({"categories": [3]}, r"json:7: 3 is no entry"),
        (changed("annotations", 0, id=[1]), r"json:11: 'id' is \[1\]; a whole number was expected"),
        (changed("annotations", 1, iscrowd="0"), r"json:12: 'iscrowd' is '0'; 0 or 1 was expected"),
        (changed("annotations", 0, bbox=[3, 6, 10**400, 6]), r"json:11: the box \[3, 6, inf, 6\] is not finite"),
    ],
)
def test_a_broken_entry_is_named_by_its_line(coco, change, message):
    with pytest.raises(FolderError, match=message):
        coco_folder(coco(**change))


def test_what_is_no_coco_file_is_named(coco, tmp_path):
    file = coco()
    file.write_text(file.read_text().replace('"in/b.png"', '"in/b.png",,'))
    with pytest.raises(FolderError, match=r"instances.json:4: no JSON: "):
        coco_folder(file)
    file.write_text('{"images": [], "annotations": {}}')
    with pytest.raises(FolderError, match="no list 'categories' and no list 'annotations' in it"):
        coco_folder(file)
    file.write_text(coco().read_text().replace("[3, 6, 3, 6]", f"[3, 6, 1{'0' * 5000}, 6]"))
    with pytest.raises(FolderError, match=r"instances.json:11: the box \[3, 6, inf, 6\] is not finite"):
        coco_folder(file)
    file.write_text("[]")
    with pytest.raises(FolderError, match="no list 'images'"):
        coco_folder(file)
    file.write_text("[" * 200_000)
    with pytest.raises(FolderError, match=r"instances.json: no annotations|instances.json:1: no JSON"):
        coco_folder(file)
    with pytest.raises(FileNotFoundError, match="is no file"):
        coco_folder(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        coco_folder(coco(), tmp_path / "nowhere")


def test_faults_without_end_are_counted(coco):
    many = [{"id": k, "image_id": 0, "category_id": 8, "bbox": [0, 0, 1, 1]} for k in range(30)]
    with pytest.raises(FolderError, match=r"30 things are wrong, and nothing was read:\n(.*\n){20}  and 10 more$"):
        coco_folder(coco(annotations=many))


def test_sixteen_bits_of_grey_keep_their_range(yolo):
    Image.fromarray(np.full((20, 40), 40000, np.uint16)).save(yolo / "images/train/a.png")
    image = yolo_folder(yolo).batch([0], size=40)["image"][0]
    assert image[20, 20].tolist() == pytest.approx([40000 / 65535] * 3, abs=1 / 255)


def test_a_crowd_is_no_example_of_one():
    batch = {
        "image": np.zeros((1, 8, 8, 3), np.float32), "boxes": np.asarray([[[0, 0, 4, 4], [0, 0, 8, 8]]], np.float32),
        "classes": np.zeros((1, 2), np.int32), "mask": np.ones((1, 2), bool), "crowd": np.asarray([[False, True]]),
    }  # fmt: skip
    assert checked(batch, 1)["mask"].tolist() == [[True, False]]
    with pytest.raises(ValueError, match=r"crowds of bool\[1\]; bool of \[1, 2\] is needed"):
        checked({**batch, "crowd": np.asarray([True])}, 1)


def test_pixels_of_no_known_range_are_refused_when_the_folder_is_read(yolo):
    Image.fromarray(np.ones((20, 40), np.float32)).save(yolo / "images/train/d.tif")
    with pytest.raises(FolderError, match=r"d.tif: its pixels are of mode 'F', of no known range; save 8 or 16 bits"):
        yolo_folder(yolo)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("['red, big', \"blue\"]", ("red, big", "blue")),
        ("{0: 'red, big', 1: blue}", ("red, big", "blue")),
        ("[driver's seat, wheel]", ("driver's seat", "wheel")),
        ("[o'neil, d'or]", ("o'neil", "d'or")),
    ],
)
def test_quoted_names_may_have_commas_and_apostrophes_are_no_quotes(yolo, names, expected):
    (yolo / "data.yaml").write_text(f"train: images/train\nnc: 2\nnames: {names}\n")
    assert yolo_folder(yolo).names == expected


def test_names_are_as_many_as_is_said(yolo):
    (yolo / "data.yaml").write_text("nc: 5\nnames: ['red', 'blue']\n")
    with pytest.raises(FolderError, match=r"data.yaml:2 'names' has 2 names, 0 red, 1 blue, and nc is 5"):
        yolo_folder(yolo)


@pytest.mark.parametrize("rows", [np.array([False, True, True]), [1.0], 1, [3], [-4]])
def test_rows_that_are_no_indices_are_refused(yolo, rows):
    with pytest.raises(ValueError, match=r"The rows are .*; whole numbers below 3, the number of images, are needed"):
        yolo_folder(yolo).batch(rows, size=8)
