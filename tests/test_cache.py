import os

import pytest
import torch

from matchdistill import MatchingDistiller, cache
from matchdistill.cache import TeacherCache, make_room
from matchdistill.capture import Captured
from matchdistill.locking import MARK, marked
from matchdistill.models import small_resnet
from matchdistill.slots import GIB, Slots, checksum

BATCH = 4


def images(seed=0):
    return torch.randn(BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def numbers(batch, first=0):
    return torch.tensor([[first + place, checksum(image)] for place, image in enumerate(batch)])


@pytest.fixture
def distiller():
    torch.manual_seed(0)
    made = MatchingDistiller(small_resnet(width=4), small_resnet(width=2))
    made.refresh([images()])
    made.runs = 0

    def count(*_):
        made.runs += 1

    made.teacher.register_forward_hook(count)
    return made


def layout(distiller, dtype=torch.float32, count=3 * BATCH):
    found = distiller.frozen_teacher(Captured(arguments=((images(),), {})))
    shapes = tuple(tuple(value.shape[1:]) for value in found.values())
    return Slots(shapes, dtype, count)


@pytest.fixture
def opened(distiller, tmp_path):
    made = TeacherCache(tmp_path, layout(distiller), distiller.teacher, {}, GIB)
    made.open()
    distiller.frozen_teacher.cache, distiller.runs = made, 0
    yield made
    made.close()


def loss_of(distiller, batch, told=None):
    """The loss in evaluation mode, in which batch norms give the same every time."""
    distiller.eval()
    known = distiller.frozen_teacher.cache
    if known is None:
        return distiller(batch)[1].item()
    with known.of(told):
        return distiller(batch)[1].item()


def test_the_teacher_runs_once_and_the_loss_is_the_same(distiller, opened):
    batch = images(1)
    expected = loss_of(distiller, batch)  # of images without numbers
    assert (distiller.runs, opened.runs) == (1, 0)
    assert [loss_of(distiller, batch, numbers(batch)) for _ in range(3)] == [expected] * 3
    assert (distiller.runs, opened.runs) == (2, 1)


def test_in_another_order_and_batch_each_image_has_its_own_values(distiller, opened):
    batch, other = images(1), images(2)
    for part, first in ((batch, 0), (other, BATCH)):
        loss_of(distiller, part, numbers(part, first))
    both, told = torch.cat([other, batch])[::2], torch.cat([numbers(other, BATCH), numbers(batch)])[::2]
    served = loss_of(distiller, both, told)
    assert distiller.runs == 2
    assert served == pytest.approx(loss_of(distiller, both), rel=1e-6)


def test_a_batch_of_which_some_are_kept_keeps_these(distiller, opened):
    batch, other = images(1), images(2)
    loss_of(distiller, batch, numbers(batch))
    mixed, told = torch.cat([batch[:2], other[:2]]), torch.cat([numbers(batch)[:2], numbers(other, BATCH)[:2]])
    before = next(opened.root.glob("*/*.bin")).read_bytes()
    loss_of(distiller, mixed, told)
    after = next(opened.root.glob("*/*.bin")).read_bytes()
    size = BATCH * opened.layout.slot
    assert after[:size] == before[:size]
    assert opened.empty(range(3 * BATCH)) == [6, 7, 8, 9, 10, 11]


def test_a_refresh_with_kept_values_is_the_same(distiller, opened):
    batch = images(1)
    expected = distiller.refresh([batch])
    loss_of(distiller, batch, numbers(batch))
    runs = distiller.runs
    with opened.of(numbers(batch)):
        found = distiller.refresh([batch])
    assert distiller.runs == runs
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.index, other.index)
        torch.testing.assert_close(one.cost, other.cost)


def test_damaged_values_are_computed_again_and_this_is_said_once(distiller, opened):
    batch = images(1)
    expected = loss_of(distiller, batch, numbers(batch))
    for round_number in range(2):
        with next(opened.root.glob("*/*.bin")).open("r+b") as file:
            file.seek(100)
            byte = file.read(1)
            file.seek(100)
            file.write(bytes([byte[0] ^ 64]))
        if round_number == 0:
            with pytest.warns(UserWarning, match="damaged, or of other pixels"):
                assert loss_of(distiller, batch, numbers(batch)) == expected
        else:
            assert loss_of(distiller, batch, numbers(batch)) == expected
    assert distiller.runs == 3


@pytest.mark.filterwarnings("ignore:some of the teacher's cached values")
def test_other_pixels_by_the_same_number_are_not_served_its_values(distiller, opened):
    batch, other = images(1), images(2)
    loss_of(distiller, batch, numbers(batch))
    assert loss_of(distiller, other, numbers(other)) == loss_of(distiller, other)
    assert distiller.runs == 3


def test_changed_weights_are_another_cache(distiller, tmp_path):
    def name(**changes):
        given = {"root": tmp_path, "layout": layout(distiller), "teacher": distiller.teacher, "told": {}, "most": GIB}
        return TeacherCache(**{**given, **changes}).name

    known = [name(), name(told={"taps": "a"}), name(layout=layout(distiller, torch.float16)), name(with_output=True)]
    assert known[0] == name(root=tmp_path / "elsewhere", most=1)
    for value in (next(distiller.teacher.parameters()), next(distiller.teacher.buffers())):
        with torch.no_grad():
            value.flatten()[0] += 1e-6
        known.append(name())
    assert len(set(known)) == 6


def test_images_of_another_size_are_refused(distiller, opened):
    batch = torch.randn(2, 3, 24, 24)
    with pytest.raises(ValueError, match="images of several sizes cannot be cached"):
        loss_of(distiller, batch, numbers(batch))


OWN, OLD, OLDER, NEW = (f"teacher-{letter * 32}" for letter in "abcd")


def cached(root, name, size, age, whole=True):
    (root / name).mkdir(parents=True)
    (root / name / "shard-000.bin").write_bytes(bytes(size))
    if whole:
        (root / name / cache.DESCRIPTION).write_text("{}")
    told = root / name / cache.DESCRIPTION if whole else root / name
    os.utime(told, (1e9 - age, 1e9 - age))


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_the_least_recently_used_go_and_no_more_than_must(tmp_path):
    for name, age in ((OLD, 3), (OLDER, 4), (NEW, 1)):
        cached(tmp_path, name, 1000, age)
    make_room(tmp_path, OWN, 1000, 4100)
    assert names(tmp_path) == [OLD, OLDER, NEW]
    make_room(tmp_path, OWN, 1000, 3100)
    assert names(tmp_path) == [OLD, NEW]
    make_room(tmp_path, OWN, 2900, 3100)
    assert names(tmp_path) == []


def test_what_is_no_cache_is_never_removed(tmp_path):
    for name in ("sometool", "teacher-mine", "d" * 32):
        cached(tmp_path, name, 1000, 9)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"teacher-{'e' * 32}").symlink_to(tmp_path / "elsewhere")
    kept = names(tmp_path)
    make_room(tmp_path, OWN, 1000, 1100)
    assert names(tmp_path) == kept


def test_a_cache_of_which_a_part_was_removed_goes_too(tmp_path):
    cached(tmp_path, OLD, 1000, 3, whole=False)
    make_room(tmp_path, OWN, 1000, 1100)
    assert names(tmp_path) == []


def test_its_own_files_count_once(tmp_path):
    cached(tmp_path, OWN, 1000, 3)
    cached(tmp_path, OLD, 1000, 4)
    make_room(tmp_path, OWN, 1000, 2100)
    assert names(tmp_path) == [OWN, OLD]


def test_what_is_in_use_stays(tmp_path):
    cached(tmp_path, OLD, 1000, 3)
    with marked(tmp_path / OLD), pytest.raises(ValueError, match="other runs that go on now use"):
        make_room(tmp_path, OWN, 1000, 1500)
    assert names(tmp_path) == [OLD]
    (tmp_path / OLD / f"{MARK}dead").touch()  # of a process that was killed
    make_room(tmp_path, OWN, 1000, 1500)
    assert names(tmp_path) == []


def test_what_does_not_fit_is_told_before_anything_is_removed(tmp_path, monkeypatch):
    cached(tmp_path, OLD, 1000, 3)
    with pytest.raises(ValueError, match=r"needs 2\.0 GiB, more than the 1\.0 GiB of teacher\.cache_gib"):
        make_room(tmp_path, OWN, 2 * GIB, GIB)
    usage = type("Usage", (), {"free": GIB})
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"needs 2\.0 GiB, but the disk of .* has 1\.0 GiB"):
        make_room(tmp_path, OWN, 2 * GIB, 3 * GIB)
    assert names(tmp_path) == [OLD]


def test_an_opened_cache_keeps_the_bound(distiller, tmp_path):
    size = layout(distiller).nbytes
    for told in range(5):
        made = TeacherCache(tmp_path, layout(distiller), distiller.teacher, {"seed": told}, int(2.5 * size))
        made.open()
        made.close()
        os.utime(tmp_path / made.name / cache.DESCRIPTION, (1e9 + told, 1e9 + told))
        assert len(names(tmp_path)) <= 2
        assert made.name in names(tmp_path)
