import pytest
import torch

from matchdistill import slots
from matchdistill.slots import LINE, Shards, Slots, checksum

SHAPES = ((3, 4, 4), (5,))


def layout(count=6, dtype=torch.float32):
    return Slots(SHAPES, dtype, count)


def values(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def filled(folder, count=6):
    shards = Shards(folder, layout(count))
    for number in range(count):
        shards.write(number, 100 + number, values(number))
    return shards


def same(found, expected):
    return found is not None and all(map(torch.equal, found, expected))


def test_what_is_read_is_what_was_written_also_by_another_process(tmp_path):
    filled(tmp_path)
    again = Shards(tmp_path, layout())
    assert all(same(again.read(number, 100 + number), values(number)) for number in range(6))


def test_a_slot_is_empty_until_it_is_written(tmp_path):
    shards = Shards(tmp_path, layout())
    assert shards.read(2, 102) is None
    assert shards.is_empty(2)
    assert same(shards.write(2, 102, values(2)), values(2))
    assert not shards.is_empty(2)
    assert same(shards.read(2, 102), values(2))
    assert shards.read(1, 102) is None


def test_other_pixels_have_other_values(tmp_path):
    assert filled(tmp_path).read(2, 103) is None


def test_every_flipped_bit_is_seen(tmp_path):
    shards = filled(tmp_path)
    path, slot = tmp_path / "shard-000.bin", layout().slot
    for place in (*range(16), *range(LINE, slot)):
        with path.open("r+b") as file:
            file.seek(2 * slot + place)
            (byte,) = file.read(1)
            file.seek(2 * slot + place)
            file.write(bytes([byte ^ 1 << place % 8]))
            file.flush()
            assert shards.read(2, 102) is None, place
            file.seek(2 * slot + place)
            file.write(bytes([byte]))
    assert same(shards.read(2, 102), values(2))


def test_swapped_slots_are_seen(tmp_path):
    shards, slot = filled(tmp_path), layout().slot
    path = tmp_path / "shard-000.bin"
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.write(content[slot : 2 * slot] + content[:slot])
    assert shards.read(0, 100) is None
    assert shards.read(0, 101) is None


@pytest.mark.parametrize("opened", [True, False])
def test_a_shard_that_was_cut_lacks_what_was_cut_and_takes_it_again(tmp_path, opened):
    shards, slot = filled(tmp_path), layout().slot
    assert shards.read(5, 105) is not None
    with (tmp_path / "shard-000.bin").open("r+b") as file:
        file.truncate(3 * slot + LINE + 8)  # amid the fourth
    if not opened:
        shards = Shards(tmp_path, layout())
    kept = [number for number in range(6) if same(shards.read(number, 100 + number), values(number))]
    assert kept == [0, 1, 2]
    assert [number for number in range(6) if shards.read(number, 100 + number) is not None] == kept
    shards.write(5, 105, values(5))
    assert same(shards.read(5, 105), values(5))
    assert (tmp_path / "shard-000.bin").stat().st_size == layout().nbytes


def test_a_shard_that_was_removed_is_made_again(tmp_path):
    filled(tmp_path)
    (tmp_path / "shard-000.bin").unlink()
    assert Shards(tmp_path, layout()).read(0, 100) is None


def test_many_slots_are_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(slots, "SHARD", 2 * layout().slot)
    filled(tmp_path, 7)
    sizes = [path.stat().st_size // layout().slot for path in sorted(tmp_path.glob("*.bin"))]
    assert sizes == [2, 2, 2, 1]
    again = Shards(tmp_path, layout(7))
    assert all(same(again.read(number, 100 + number), values(number)) for number in range(7))


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_values_are_rounded_to_the_type_that_they_are_kept_in(tmp_path, dtype, error):
    shards = Shards(tmp_path, layout(dtype=dtype))
    returned = shards.write(0, 1, values())
    read = shards.read(0, 1)
    assert same(read, returned)
    for kept, value in zip(read, values(), strict=True):
        assert kept.dtype == dtype
        torch.testing.assert_close(kept.float(), value, rtol=error, atol=1e-7)


def test_values_beyond_float16_are_refused_and_infinite_ones_are_not(tmp_path):
    shards = Shards(tmp_path, layout(dtype=torch.float16))
    large = [value * 1e6 for value in values()]
    with pytest.raises(ValueError, match=r"too large for float16: give --teacher\.cache_dtype bfloat16"):
        shards.write(0, 1, large)
    assert shards.is_empty(0)
    Shards(tmp_path / "wide", layout(dtype=torch.bfloat16)).write(0, 1, large)
    assert shards.write(0, 1, [value / 0 for value in values()])[0].isinf().all()


def test_checksums_of_short_and_odd_lengths_differ():
    contents = [
        torch.tensor(each, dtype=torch.uint8) for each in ([], [0], [0, 0], [1], [0, 1], [0] * 8, [0] * 9, [1] * 9)
    ]
    found = [checksum(each) for each in contents]
    assert len(set(found)) == len(found)
    assert all(-(2**63) <= each < 2**63 and each for each in map(checksum, contents))
