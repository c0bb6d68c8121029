import numpy as np
import pytest
import torch
from PIL import Image
from trees import set_up

from matchdistill.data import ImageData
from matchdistill.data.pictures import read_picture
from matchdistill.models.trust import check_trusted_data
from matchdistill.runs.validate import validate

MODULE = """
import torch
from PIL import Image
from torch.utils.data import Dataset, DataLoader
import pytorch_lightning as pl

class Squares(Dataset):
    def __init__(self, shades, labels, kind="image"):
        self.shades, self.own_labels, self.kind = shades, labels, kind

    def __len__(self):
        return len(self.shades)

    def __getitem__(self, index):
        shade = self.shades[index]
        image = Image.new("RGB", (20, 16), (shade, 0, 0))
        if self.kind == "tensor":
            image = torch.zeros(3, 16, 20, dtype=torch.uint8)
            image[0] = shade
        elif self.kind == "float":
            image = torch.full((3, 16, 16), shade - 40.0)
        elif self.kind == "text":
            image = "image.png"
        elif self.kind == "single":
            return image
        elif self.kind == "broken":
            raise RuntimeError("no disk\\nat all")
        return image, self.own_labels[index]

class Known(Squares):
    @property
    def targets(self):
        return torch.tensor(self.own_labels)

def squares(kind="image", labels=(1, 0, 1, 0), val=True, names=("dark", "light"), cls=Squares):
    train = cls([10, 20, 30, 40], list(labels), kind)
    return train, (cls([50, 60], [0, 1], kind) if val else None), names

def known(**options):
    return squares(cls=Known, **options)

def fails():
    raise OSError("no\\nroute")

def other(value):
    return value

class Module(pl.LightningDataModule):
    def __init__(self, named=True):
        super().__init__()
        if named:
            self.class_names = ["dark", "light"]

    def setup(self, stage):
        self.train, self.val, _ = squares()

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=3)

    def val_dataloader(self):
        return DataLoader(self.val)

class NoVal(Module):
    val_dataloader = pl.LightningDataModule.val_dataloader
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "mysquares.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    __import__("sys").modules.pop("mysquares", None)


def squares(function, **options):
    return set_up(f"mysquares:{function}", None, image_size=16, **options)


def batch_of(dataset):
    images, labels = dataset.__getitems__(list(range(len(dataset))))
    return images, labels.tolist()


@pytest.mark.parametrize("function", ["squares", "known", "Module"])
def test_images_of_a_function_come_by_class(function):
    data = squares(function, augment=False)
    images, labels = batch_of(data.train_set)
    assert (images.shape, labels) == ((4, 3, 16, 16), [0, 0, 1, 1])
    shades = (images[:, 0].mean((1, 2)) * 0.229 + 0.485) * 255
    assert shades.round().tolist() == [20, 40, 10, 30]
    assert batch_of(data.val_set)[1] == [0, 1]
    assert data.class_names == ["dark", "light"]


def test_tensors_are_the_same_pictures():
    images, tensors = (squares("squares", options={"kind": kind}) for kind in ("image", "tensor"))
    assert torch.equal(batch_of(images.val_set)[0], batch_of(tensors.val_set)[0])


def test_prepared_tensors_go_to_the_network_as_they_are():
    data = squares("squares", options={"kind": "float"}, prepared=True)
    assert batch_of(data.train_set)[0].mean((1, 2, 3)).tolist() == [-20, 0, -30, -10]
    data = set_up("mysquares:squares", None, image_size=8, options={"kind": "float"}, prepared=True)
    with pytest.raises(
        ValueError, match=r"expected float tensors \(3, 8, 8\), got torch.float32 \(3, 16, 16\): .*image_size"
    ):
        data.val_set[0]
    with pytest.raises(ValueError, match="expected a tensor, got a Image"):
        squares("squares", prepared=True).val_set[0]
    with pytest.raises(
        ValueError, match=r"0 of the validation set of .* its values run from 10 to 10: expected 0 to 1"
    ):
        squares("squares", options={"kind": "float"}).val_set[0]


def test_no_validation_set_and_no_names():
    for data in (squares("squares", options={"val": False}), squares("NoVal")):
        assert (batch_of(data.train_set)[1], batch_of(data.val_set)[1]) == ([0, 1], [0, 1])
    assert squares("Module", options={"named": False}).class_names == ["0", "1"]


@pytest.mark.parametrize("workers", [0, 2])
def test_it_is_loaded_by_workers(workers):
    data = squares("squares", workers=workers, batch_size=2)
    assert sum(len(labels) for _, labels in data.train_dataloader()) == 4


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("square", {}, "module 'mysquares' has no function 'square'; did you mean 'squares'"),
        ("squares", {"color": 1}, "cannot be called with data.options .*unexpected keyword argument 'color'"),
        ("fails", {}, "it fails with OSError: no$"),
        ("other", {"value": 3}, "it returned a int: expected training set, validation set .* a LightningDataModule"),
        ("other", {"value": [[], None, ["a"]]}, "its training set has no images"),
        ("other", {"value": [3, None, ["a"]]}, "its training set is a int: expected a Dataset with a length"),
        ("squares", {"names": []}, r"it returned \[\] as the names of the classes: expected a list"),
        ("squares", {"names": "ab"}, "it returned 'ab' as the names"),
        ("squares", {"names": ["a", "a"]}, "it returned a class name twice, 'a'"),
        ("squares", {"names": ["a"]}, "item 0 of the training set of .* has the label 1: expected .* from 0 to 0"),
        ("known", {"labels": [0, 1, 2, 0]}, r"item 2 of .* has the label tensor\(2\): expected"),
        ("squares", {"labels": [0, 1, -1, 0]}, "item 2 of .* has the label -1"),
        ("squares", {"labels": [0, 1, "cat", 0]}, "item 2 of .* has the label 'cat'"),
        ("squares", {"labels": [0, 1, 0.5, 0]}, "item 2 of .* has the label 0.5"),
        ("squares", {"labels": [0, 1]}, "its training set cannot be read .IndexError"),
        ("squares", {"kind": "text"}, "cannot be read .*item 0 of .* has a str: expected a PIL image or a tensor"),
        ("known", {"kind": "single"}, r"item 0 of .* is a Image: expected a pair \(image, label\)"),
        ("squares", {"kind": "broken"}, "its training set cannot be read .RuntimeError: no disk.$"),
        ("Module", {"x": 1}, "cannot be called"),
    ],
)
def test_what_a_function_may_get_wrong(function, options, message):
    with pytest.raises(ValueError, match=message) as info:
        squares(function, options=options)
    assert "\n" not in str(info.value)
    assert str(info.value).startswith("data.name 'mysquares:")


def test_modules_that_there_are_not():
    with pytest.raises(ValueError, match=r"data.name 'mysquare:squares': there is no library or module 'mysquare'"):
        set_up("mysquare:squares", None)
    with pytest.raises(ValueError, match=r"expected digits, .* or package.module:function"):
        ImageData("mysquares:")
    with pytest.raises(
        ValueError, match=r"data.options is given, but 'digits' takes none.*; data.prepared is for functions"
    ):
        ImageData(options={"a": 1}, prepared=True)


def test_root_is_an_argument():
    with pytest.raises(ValueError, match="unexpected keyword argument 'root'"):
        set_up("mysquares:squares", "here")


@pytest.mark.parametrize(
    ("tensor", "pixel"),
    [
        (torch.full((3, 2, 4), 7, dtype=torch.uint8), 7),
        (torch.full((4, 2, 4), 7, dtype=torch.uint8), 7),
        (torch.full((1, 2, 4), 0.2), 51),
        (torch.full((2, 4), 0.2, dtype=torch.bfloat16), 51),
        (torch.full((2, 4), 2570, dtype=torch.int32), 10),
        (torch.ones((2, 4), dtype=torch.bool), 255),
    ],
)
def test_tensors_as_pictures(tensor, pixel):
    class Place:
        def open(self):
            return tensor

    image = read_picture(Place()).image
    assert (image.mode, image.size) == ("RGB", (4, 2))
    assert np.unique(image).tolist() == [pixel]
    tensor = torch.zeros(2, 2, 4)
    with pytest.raises(ValueError, match=r"with 1, 3 or 4 channels, got \(2, 2, 4\)"):
        read_picture(Place())


def test_an_image_of_its_own_stays_as_it_is():
    image = Image.new("F", (4, 2), 0.2)
    image.getexif()[274] = 6

    class Place:
        def open(self):
            return image

    for _ in range(2):
        picture = read_picture(Place())
        assert (picture.image.size, picture.image.getpixel((0, 0)), picture.orientation) == ((2, 4), (51, 51, 51), 6)
    with pytest.raises(ValueError, match=r"8 pixels, more than data.max_pixels, 7"):
        read_picture(Place(), max_pixels=7)


def test_a_folder_that_names_code_is_not_read_without_trust(tmp_path, tiny):
    check_trusted_data(tmp_path, ImageData().code)
    with pytest.raises(ValueError, match=r"reads its images by calling mysquares:squares.* --trust"):
        validate(tiny("--data.name=mysquares:squares"), tmp_path)
