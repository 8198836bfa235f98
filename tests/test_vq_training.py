"""The pieces of stage vq: the codebook, its restarts, and two losses that stay apart."""
import numpy as np
import pytest
import torch
from common import noise, photos
from tiny_training import MODEL, SIZE

import vq
from engine.data import FileSource
from engine.vq_training import (VQTrainer, distinct_points, k_means, read_rows,
                                restart_dead_codes)


@pytest.mark.parametrize("number, k", ((200, 8), (5, 16)))
def test_k_means_finds_clusters(number, k):
    """With more centres than points too."""
    g = torch.Generator().manual_seed(0)
    clusters = 10 * torch.eye(4).repeat(number // 4 + 1, 1)[:number]                # (number, 4)
    points = clusters + 0.1 * torch.randn(number, 4, generator=g)
    centres = k_means(points, k, np.random.default_rng(0))
    assert centres.shape == (k, 4) and centres.isfinite().all()
    assert torch.cdist(points, centres).amin(1).max() < 1


def test_distinct_points_has_one_point_of_each_cell():
    """A flat ground, seen 1000 times with a little noise, counts as few points; rare ones stay."""
    g = torch.Generator().manual_seed(0)
    flat, rare = 0.01 * torch.randn(1000, 3, generator=g), 5 + torch.arange(12.0).reshape(4, 3)
    kept = distinct_points(torch.cat((flat, rare)))
    assert len(kept) <= 12 and all((kept == row).all(1).any() for row in rare)


def test_unused_codes_move_to_the_worst_latents():
    codebook = torch.arange(8.0)[:, None].repeat(1, 2)
    before = codebook.clone()
    latents = 100 + torch.rand(20, 2)
    unused = torch.tensor([False, True, False, True, False, False, False, True])
    restart_dead_codes(codebook, unused, latents, torch.arange(20.0), np.random.default_rng(0))
    assert torch.equal(codebook[~unused], before[~unused])
    worst = latents[-4 * 3:]
    assert all((worst == row).all(1).any() for row in codebook[unused])
    used = torch.zeros(8, dtype=torch.bool)
    before = codebook.clone()
    restart_dead_codes(codebook, used, latents, torch.arange(20.0), np.random.default_rng(0))
    assert torch.equal(codebook, before)


def test_a_broken_picture_is_replaced_by_the_next(tmp_path):
    """In the batch that a worker reads; the pictures are whole bytes."""
    source = FileSource(photos(tmp_path, 5, broken=(1, 2)), 0, 40)
    rows = read_rows(source, np.array([4, 1, 0, 2]))
    assert rows.shape == (4, 40, 40, 3) and rows.dtype == torch.uint8
    for row, number in zip(rows, (4, 3, 0, 3)):
        assert np.array_equal(row, noise(number, 40, 40))


def tiny_trainer():
    torch.manual_seed(0)
    return VQTrainer(vq.VQModel(vq.Config(**MODEL["vq"])))


def test_common_codes_are_preferred():
    """Of two codes at nearly the same distance the one in use is chosen, without a rate weight the
    nearer one."""
    trainer = tiny_trainer()
    trainer.vq.quantize.embedding.weight.data[:2] = torch.tensor([[0.5], [-0.51]])
    trainer.vq.quantize.embedding.weight.data[2:] = 100
    trainer.code_usage[:] = 1e-5
    trainer.code_usage[1] = 0.9
    latents = torch.zeros(3, 4)
    assert trainer.choose_codes(latents).tolist() == [1, 1, 1]
    trainer.rate_weight = 0.0
    assert trainer.choose_codes(latents).tolist() == [0, 0, 0]


def test_every_parameter_has_a_gradient_in_every_part():
    """Data parallelism wants one, a zero where a parameter does not take part."""
    trainer = tiny_trainer()
    images = torch.rand(2, 3, SIZE, SIZE)
    for quantize, adversary in ((False, False), (True, False), (True, True)):
        trainer.zero_grad()
        trainer(images, quantize, adversary)[0].backward()
        assert all(p.grad is not None for p in trainer.parameters())
        idle = not any(p.grad.any() for p in trainer.discriminator.parameters())
        assert idle == (not adversary)
