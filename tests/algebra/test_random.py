"""Generators that depend on their key and on nothing else."""

import torch

from weft.algebra.random import checksum, generator


def test_a_key_gives_the_same_numbers_and_leaves_the_global_stream_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = torch.rand(4, generator=generator(0, "basis", (3, 4)))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, torch.rand(4, generator=generator(0, "basis", (3, 4))))
    assert not torch.equal(first, torch.rand(4, generator=generator(1, "basis", (3, 4))))


def test_a_checksum_knows_one_changed_bit():
    t = torch.arange(6.0)
    assert checksum(t) == checksum(t.clone())
    changed = t.clone()
    changed[2] = torch.nextafter(changed[2], torch.tensor(9.0))
    assert checksum(t) != checksum(changed)
