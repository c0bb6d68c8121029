"""The rules by which image files become pictures, each with a value that is known beforehand."""

import os
import unicodedata
import warnings

import numpy as np
import pytest
from PIL import Image
from trees import refusal, set_up

from matchdistill.data.pictures import IMAGE_SUFFIXES, read_picture

RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)
BYTES = np.rint(RAMP * 255)


def saved(path, image, **options):
    image.save(path, **options)
    return path


def read(path, **options):
    return np.asarray(read_picture(path, **options).image).astype(float)


DEEP = {
    "16.png": (RAMP * 65535).astype(np.uint16),
    "16.tif": (RAMP * 65535).astype(np.uint16),
    "big endian.tif": (RAMP * 65535).astype(">u2"),
    "16.pgm": (RAMP * 65535).astype(np.int32),
    "16.jp2": (RAMP * 65535).astype(np.uint16),
    "32.tif": (RAMP * 65535).astype(np.int32),
    "float.tif": RAMP.astype(np.float32),
    "float.pfm": RAMP.astype(np.float32),
}


@pytest.mark.parametrize("name", DEEP)
def test_more_than_8_bits_are_scaled(tmp_path, name):
    Image.fromarray(DEEP[name]).save(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read(tmp_path / name)
    assert found.shape == (64, 64, 3)
    assert np.abs(found - BYTES[:, :, None]).max() <= 1


def test_white_that_is_zero(tmp_path):
    Image.fromarray((RAMP * 65535).astype(np.uint16)).save(tmp_path / "a.tif", tiffinfo={262: 0})
    assert np.abs(read(tmp_path / "a.tif") - (255 - BYTES)[:, :, None]).max() <= 1


@pytest.mark.parametrize(
    "values", [RAMP * 255, RAMP - 0.5, RAMP * np.nan, RAMP + np.inf], ids=["255", "<0", "nan", "inf"]
)
def test_values_without_a_meaning_are_refused(tmp_path, values):
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "a.tif")
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match=r"its values run from .*: expected 0 to 1"):
        read_picture(tmp_path / "a.tif")


def test_another_white(tmp_path):
    Image.fromarray((RAMP * 4095).astype(np.uint16)).save(tmp_path / "a.png")
    Image.fromarray((RAMP * 255).astype(np.float32)).save(tmp_path / "b.tif")
    assert np.abs(read(tmp_path / "a.png", white=4095) - BYTES[:, :, None]).max() <= 1
    assert np.abs(read(tmp_path / "b.tif", white=255) - BYTES[:, :, None]).max() <= 1
    Image.fromarray((RAMP * 4000).astype(np.uint16)).save(tmp_path / "c.png")
    with pytest.warns(UserWarning, match=r"nearly black.*for example 4095"):
        read_picture(tmp_path / "c.png")


@pytest.mark.parametrize(
    ("name", "image", "colour"),
    [
        ("a.png", Image.new("RGBA", (4, 4), (200, 10, 20, 0)), (200, 10, 20)),
        ("a.png", Image.new("LA", (4, 4), (90, 0)), (90, 90, 90)),
        ("a.png", Image.new("1", (4, 4), 1), (255, 255, 255)),
        ("a.png", Image.new("RGB", (4, 4), (1, 2, 3)).quantize(4), (1, 2, 3)),
        ("a.webp", Image.new("RGBA", (4, 4), (200, 10, 20, 128)), (200, 10, 20)),
        ("a.tif", Image.new("CMYK", (4, 4), (0, 255, 255, 0)), (255, 0, 0)),
        ("a.jpg", Image.new("CMYK", (4, 4), (0, 255, 255, 0)), (255, 0, 0)),
        ("a.tif", Image.new("YCbCr", (4, 4), (76, 85, 255)), (255, 0, 0)),
    ],
    ids=["alpha", "gray alpha", "1 bit", "palette", "webp", "CMYK", "JPEG CMYK", "YCbCr"],
)
def test_colours(tmp_path, name, image, colour):
    options = {"exact": True, "lossless": True} if name.endswith("webp") else {}
    found = read(saved(tmp_path / name, image, **options))
    assert np.abs(found - colour).max() <= 3


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff"])
def test_the_first_of_several_pictures(tmp_path, kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], lossless=True)
    assert np.abs(read(tmp_path / f"a.{kind}") - (255, 0, 0)).max() <= 2


# By the definition of EXIF: where the first row and the first column of what is stored are in the picture.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[::-1],
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[:, ::-1],
}


@pytest.mark.parametrize("kind", ["png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_every_orientation_becomes_upright(tmp_path, kind, orientation):
    upright = np.random.default_rng(0).integers(256, size=(6, 9, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    stored.save(tmp_path / f"a.{kind}", exif=exif, lossless=True)
    picture = read_picture(tmp_path / f"a.{kind}")
    assert np.array_equal(np.asarray(picture.image), upright)
    assert picture.orientation == orientation


def test_damaged_notes_of_a_camera_do_not_matter(tmp_path):
    image = Image.fromarray(BYTES.astype(np.uint8))
    image.save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\3\0\0")
    assert read(tmp_path / "a.jpg").shape == (64, 64, 3)


def test_documents_are_no_images_whatever_their_name(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    with pytest.raises(Exception, match="cannot identify"):
        read_picture(tmp_path / "a.jpg")
    assert not {".eps", ".pdf", ".svg", ".wmf", ".mpg", ".h5"} & IMAGE_SUFFIXES
    assert {
        ".jpg",
        ".jpeg",
        ".jfif",
        ".png",
        ".webp",
        ".avif",
        ".jp2",
        ".bmp",
        ".tif",
        ".ppm",
        ".gif",
    } <= IMAGE_SUFFIXES


def test_many_pixels_are_read_where_they_are_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    path = saved(tmp_path / "a.png", Image.new("L", (64, 64)))
    with pytest.raises(ValueError, match=r"exceeds limit of 2000 pixels.*--data.max_pixels"):
        read_picture(path)
    assert read_picture(path, max_pixels=4096).image.size == (64, 64)
    assert Image.MAX_IMAGE_PIXELS == 1000
    with pytest.raises(ValueError, match=r"it has 4096 pixels, more than data.max_pixels, 4095"):
        read_picture(path, max_pixels=4095)


@pytest.mark.timeout(20)
def test_a_pipe_or_a_device_with_an_image_s_name_does_not_hang(image_root):
    os.mkfifo(image_root / "val" / "cat" / "7.png")
    (image_root / "val" / "dog" / "7.png").symlink_to("/dev/zero")
    data = set_up("folder", image_root, image_size=16)
    with pytest.raises(ValueError, match=r"7.png is a pipe, not a file\): repair or remove it"):
        data.val_set[data.val_set.paths.index(str(image_root / "val" / "cat" / "7.png"))]
    with pytest.raises(ValueError, match=r"7.png is a device, not a file"):
        data.val_set[data.val_set.paths.index(str(image_root / "val" / "dog" / "7.png"))]


def test_links_that_lead_back_are_left_out_and_told(image_root):
    (image_root / "train" / "cat" / "latest").symlink_to(".")
    (image_root / "train" / "cat" / "nested" / "up").symlink_to("../..")
    (image_root / "train" / "cat" / "again").symlink_to("nested")
    with pytest.warns(UserWarning, match="3 links to folders that are read already"):
        data = set_up("folder", image_root)
    assert len(data.train_set) == 12
    assert not any("/again/" in path or "/latest/" in path for path in data.train_set.paths)


def test_links_to_images_elsewhere_are_followed(image_root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (image_root / "train" / "cat").rename(elsewhere / "cat")
    (image_root / "train" / "cat").symlink_to(elsewhere / "cat")
    assert len(set_up("folder", image_root).train_set) == 12


@pytest.mark.parametrize("target", [".", "..", "cat"])
def test_a_class_that_is_a_link_to_others(image_root, target):
    (image_root / "train" / "all").symlink_to(target)
    (image_root / "val" / "all").symlink_to(target)
    assert "whose images are in the set already: remove the link" in refusal("folder", image_root)


def test_types_of_images(image_root):
    kinds = {"jfif": "jpeg", "jp2": "jpeg2000", "tga": "tga", "qoi": "qoi", "avif": "avif"}
    for suffix, form in kinds.items():
        Image.new("RGB", (16, 16)).save(image_root / "train" / "cat" / f"x.{suffix}", format=form)
    for name in ("y.heic", "z.heic", "w.svg", "v"):
        (image_root / "train" / "dog" / name).write_bytes(b"?")
    with pytest.warns(
        UserWarning, match=r"left out, by the ends of their names: \.heic \(2\), (\.svg|no ending) \(1\)"
    ):
        data = set_up("folder", image_root, image_size=16)
    assert len(data.train_set) == 12 + len(kinds)
    for index, path in enumerate(data.train_set.paths):
        if path.rpartition(".")[2] in kinds:
            assert data.train_set[index][0].shape == (3, 16, 16)


def test_classes_in_either_unicode_form(image_root):
    nfc, nfd = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    (image_root / "train" / "cat").rename(image_root / "train" / nfd)
    (image_root / "val" / "cat").rename(image_root / "val" / nfc)
    data = set_up("folder", image_root)
    assert data.class_names == [nfc, "dog"]
    (image_root / "val" / nfd).mkdir()
    assert "two Unicode forms: make one folder" in refusal("folder", image_root)


def test_names_that_are_not_utf_8(image_root):
    for split in ("train", "val"):
        os.rename(os.fsencode(image_root / split / "cat"), os.fsencode(image_root / split) + b"/caf\xe9")  # noqa: PTH104
    folder = os.fsencode(image_root / "train") + b"/caf\xe9"
    with open(folder + b"/\xff.png", "wb") as file:  # noqa: PTH123
        file.write(b"damaged")
    data = set_up("folder", image_root, image_size=16, skip_corrupt=True)
    assert data.class_names == ["caf\\xe9", "dog"]
    with pytest.warns(UserWarning, match=r"caf\\xe9/\\xff\.png is not an image"):
        assert [data.train_set[index] is None for index in range(7)].count(True) == 1
    assert data.corrupt == [f"{image_root}/train/caf\\xe9/\\xff.png"]
    "".join(data.class_names + data.corrupt).encode()
