import re
import shutil
from pathlib import Path

import pytest
from trees import refusal, set_up

COLUMNS = ["path", "label", "split"]
HEADER = "path,label,split\n"


def rows_of(root, splits=("train", "val")):
    """Lines of a table of class folders, the last image first."""
    paths = sorted((path for split in splits for path in (root / split).rglob("[!.]*.[!t]*")), reverse=True)
    return [(str(path.relative_to(root)), *path.relative_to(root).parts[1::-1]) for path in paths if path.is_file()]


def write(path, rows, header=COLUMNS, delimiter=","):
    path.write_text("".join(delimiter.join(row) + "\n" for row in [header, *rows]))
    return path


def images(dataset):
    return list(zip(dataset.files.paths, dataset.files.labels.tolist(), strict=True))


def same_images(data, root):
    folders = set_up("folder", root)
    assert images(data.train_set) == images(folders.train_set)
    assert images(data.val_set) == images(folders.val_set)
    assert data.class_names == folders.class_names


def test_a_table_is_the_folders_whose_files_it_names(image_root):
    same_images(set_up("csv", write(image_root / "all.csv", rows_of(image_root))), image_root)
    same_images(set_up("csv", write(image_root / "all.TSV", rows_of(image_root), delimiter="\t")), image_root)


def test_columns_of_other_names_and_more_of_them(image_root):
    rows = [(label, "x", split, path) for path, label, split in rows_of(image_root)]
    path = write(image_root / "all.csv", rows, ["species", "note", "fold", "file"])
    columns = {"image_column": "file", "label_column": "species", "split_column": "fold"}
    same_images(set_up("csv", path, **columns), image_root)


def test_other_names_of_splits(image_root):
    names = {"train": "0", "val": "1"}
    rows = [(path, label, names[split]) for path, label, split in rows_of(image_root)]
    same_images(set_up("csv", write(image_root / "all.csv", rows), train_split="0", val_split="1"), image_root)


def test_labels_that_look_like_several_are_told_once(image_root):
    """Of plain classification, which takes each for one class."""
    rows = [(path, f"{label}|blue", split) for path, label, split in rows_of(image_root)]
    with pytest.warns(UserWarning, match=r"is taken for the name of one class.* train the task multilabel") as told:
        data = set_up("csv", write(image_root / "all.csv", rows))
    assert all("|blue" in name for name in data.class_names)
    (said,) = [str(each.message) for each in told]
    assert f"all.csv: '{data.class_names[0]}' is taken" in said


def test_two_tables(image_root):
    train, val = (
        write(image_root / f"{split}.csv", [row[:2] for row in rows_of(image_root, [split])], ["path", "label"])
        for split in ("train", "val")
    )
    same_images(set_up("csv", train, val_root=val), image_root)


def test_parquet(image_root):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow", reason="Parquet is read by pyarrow")
    rows = rows_of(image_root)
    frame = pandas.DataFrame(rows, columns=COLUMNS)
    frame["label"] = frame["label"].astype("category")
    frame.to_parquet(image_root / "all.parquet")
    same_images(set_up("csv", image_root / "all.parquet"), image_root)
    frame["label"] = [None, *frame["label"][1:]]
    frame.to_parquet(image_root / "all.parquet")
    assert refusal("csv", image_root / "all.parquet").endswith("all.parquet, row 1: label is empty (column 'label')")
    frame["label"] = [0.5] * len(frame)
    frame.to_parquet(image_root / "all.parquet")
    assert "row 1 has a float in the column 'label': expected text" in refusal("csv", image_root / "all.parquet")
    (image_root / "all.parquet").write_bytes(b"PAR1")
    assert "is damaged or no Parquet file" in refusal("csv", image_root / "all.parquet")


def test_parquet_without_its_package(image_root, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (image_root / "all.parquet").write_bytes(b"")
    assert "pip install 'matchdistill[datasets]'" in refusal("csv", image_root / "all.parquet")


def test_spaces_bom_quotes_and_absolute_paths(image_root):
    rows = rows_of(image_root)
    first = image_root / rows[0][0]
    shutil.move(first, first.with_name('a, "b".png'))
    lines = [f'"{first.parent}/a, ""b"".png", {rows[0][1]} ,val', "", *(", ".join(row) for row in rows[1:])]
    (image_root / "all.csv").write_bytes(("\ufeffpath, label ,split\r\n" + "\r\n".join(lines)).encode())
    same_images(set_up("csv", image_root / "all.csv"), image_root)


def test_without_validation_images_a_share_is_split_off(image_root):
    rows = [row[:2] for row in rows_of(image_root, ["train"])]
    path = write(image_root / "all.csv", rows, ["path", "label"])
    with pytest.warns(UserWarning, match="all.csv has no validation images: 4 of its 12 training images are taken"):
        data = set_up("csv", path, val_share=0.3)
    assert data.val_set.files.labels.tolist() == [0, 0, 1, 1]
    assert len(data.train_set) == 8
    again = set_up("csv", path, val_share=0.3, seed=5)
    assert again.val_set.files.paths == data.val_set.files.paths
    assert not set(again.train_set.files.paths) & set(again.val_set.files.paths)


def test_a_folder_without_val_as_well(image_root):
    shutil.rmtree(image_root / "val")
    with pytest.warns(UserWarning, match="has no validation images: 2 of its 12 training images are taken"):
        data = set_up("folder", image_root)
    assert (len(data.train_set), data.val_set.files.labels.tolist()) == (10, [0, 1])


def test_the_table_in_the_current_folder(image_root, monkeypatch):
    write(image_root / "all.csv", rows_of(image_root))
    monkeypatch.chdir(image_root)
    assert Path(set_up("csv", Path("all.csv")).train_set.files.paths[0]).exists()


GOOD = "train/cat/2.webp,cat,train\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "t.csv has no column 'path'; it has no columns at all"),
        (
            "file,label\na,b\n",
            "t.csv has no column 'path'; its columns are 'file', 'label': name one of them as data.image_column",
        ),
        (
            "path,labels\na,b\n",
            "t.csv has no column 'label'; its columns are 'path', 'labels': .*; did you mean 'labels'",
        ),
        ("path,label,label\na,b,c\n", "t.csv has the column 'label' twice"),
        (HEADER, "t.csv has no training images"),
        (HEADER + GOOD.replace("train\n", "val\n"), "t.csv has no training images"),
        (HEADER + GOOD + "train/cat/9.png,cat,train\n", r"t.csv, row 2 \(line 3\): there is no file .*train/cat/9.png"),
        (HEADER + "train/cat,cat,train\n", r"row 1 \(line 2\): there is no file .*train/cat"),
        (HEADER + GOOD + "train/dog/../cat/2.webp,dog,val\n", r"row 2 .* has the path .* of .*, row 1 \(line 2\)"),
        (HEADER + "train/cat/2.webp, ,train\n", r"row 1 \(line 2\): label is empty \(column 'label'\)"),
        (HEADER + ",cat,train\n", r"row 1 \(line 2\): image is empty \(column 'path'\)"),
        (HEADER + GOOD.replace("train\n", "test\n"), "row 1 .* has the split 'test': expected 'train' or 'val'"),
        (HEADER + GOOD.replace("train\n", "\n"), "row 1 .* has the split '': expected"),
        (HEADER + "\n" + GOOD + "a,b\n", r"row 2 \(line 4\) has 2 values for 3 columns"),
        (HEADER + 'a,"b"c,train\n', "t.csv, line 2 is damaged"),
        (
            HEADER + GOOD + "val/dog/2.webp,dog,val\n",
            "t.csv has validation images of classes without training images: dog",
        ),
        ("path,label\nä,b".encode("latin-1"), "t.csv is not text in UTF-8 .*: save it as UTF-8"),
    ],
)
def test_bad_tables(image_root, content, message):
    path = image_root / "t.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert re.search(message, refusal("csv", path))


def test_bad_places_of_tables(image_root):
    assert "table " in (said := refusal("csv", image_root / "none.csv"))
    assert said.endswith("none.csv does not exist")
    assert "expected a file that ends in .csv, .tsv, .parquet" in refusal("csv", image_root)
    (image_root / "folder.csv").mkdir()
    assert refusal("csv", image_root / "folder.csv").endswith("is no file")
    path = write(image_root / "all.csv", rows_of(image_root))
    with pytest.raises(ValueError, match=r"has no column 'fold'.* as data.split_column"):
        set_up("csv", path, split_column="fold")
    with pytest.raises(ValueError, match=r"all.csv, row 1 .* has the path .* of .*all.csv, row 1"):
        set_up("csv", path, val_root=path)
    empty = write(image_root / "empty.csv", [])
    with pytest.raises(ValueError, match="has no validation images"):
        set_up("csv", path, val_root=empty)
