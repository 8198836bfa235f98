"""Training on the world of shapes: tokens of drawn pictures, and the scores of sheets."""
import numpy as np
import pytest
import torch
from PIL import Image

import clip
import train
import vq
from engine.checkpoint import UserError
from engine.data import to_float
from engine.distributed import Run
from shapes import codebook, world
from shapes.recipe import ShapesRecipe

STAGES = {
    "vq": dict(size=64, patch_codes=(8, 6)),
    "1": dict(size=128, views=2, concepts=0.5, augment_prob=0.0),
    "2": dict(size=128, augment_prob=1.0),
    "3": dict(size=64, world="tiny", augment_prob=0.0),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The recipe of a run with a tokenizer and a VQ model of f = 8 with a computed codebook."""
    run = Run(tmp_path_factory.mktemp("run"), STAGES)
    recipe = ShapesRecipe(run)
    clip.learn_tokenizer(world.sample_captions(0, 2000), 32).save_pretrained(run.out / "tokenizer")
    model = vq.VQModel(vq.Config(
        block_out_channels=(16, 16, 32, 64), layers_per_block=1, latent_channels=24,
        vq_embed_dim=24, num_vq_embeddings=28 * 6 + 8, norm_num_groups=8))
    source = recipe.source("1")
    images = to_float(np.stack([source[i][0] for i in range(40)]))
    codebook.set_patch_codes(model, images, 8, 6, np.random.default_rng(0))
    model.save_pretrained(run.out / "vqvae")
    return recipe


def test_drawn_tokens_are_those_of_whole_pictures(recipe):
    """Pictures are drawn at 4 pixels per token, and have the tokens, the captions and the micro
    conditions of pictures of the stage's size."""
    dataset, source = recipe.dataset("1"), recipe.source("1")
    assert dataset.grid == (16, 16)
    index = dataset.indices([0, 0], 3, 12)
    ids, text_ids, micro_conds = dataset[index]
    pictures, captions, wanted = zip(*[source[int(i)] for i in index])
    assert pictures[0].shape == (128, 128, 3)
    model = vq.VQModel.from_pretrained(recipe.run.out / "vqvae")
    tokenizer = clip.Tokenizer.from_pretrained(recipe.run.out / "tokenizer")
    with torch.no_grad():
        same = ids == model.encode(to_float(np.stack(pictures)))
    assert ids.shape == (12, 16, 16) and same.float().mean() > 0.999           # 8-bit rounding
    assert torch.equal(text_ids, tokenizer(list(captions)))
    assert torch.equal(micro_conds, torch.from_numpy(np.stack(wanted)))
    assert ids.dtype == text_ids.dtype == torch.int64 and micro_conds.dtype == torch.float32


def test_drawn_tokens_depend_on_their_index_alone(recipe):
    """In any order, and repeated."""
    index = np.array([7, 2 ** 40, 7, 3])
    once = recipe.dataset("1")[index]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 2, 0, 1]):
        for a, b in zip(once, recipe.dataset("1")[index[order]]):
            assert torch.equal(a[order], b)


def test_indices_of_a_step(recipe):
    """Each picture as often as there are views. Others for another step, seed, or stage."""
    dataset = recipe.dataset("1")
    index = dataset.indices([0, 0], 5, 12)
    assert np.array_equal(index[:6], index[6:]) and len(set(index)) == 6
    assert np.array_equal(index, dataset.indices([0, 0], 5, 12))
    for seed, step in (([0, 0], 6), ([1, 0], 5), ([0, 1], 5)):
        assert not set(index) & set(dataset.indices(seed, step, 12))
    assert len(set(recipe.dataset("2").indices([0, 0], 5, 12))) == 12
    with pytest.raises(UserError, match="7 does not divide by 2 views"):
        dataset.indices([0, 0], 0, 7)


def test_micro_conditions_are_in_pixels_of_the_stage(recipe):
    """Of crops of larger pictures: width and height of 128 to 160, scores below the best."""
    _, _, micro_conds = recipe.dataset("2")[np.arange(20)]
    width, height, top, left, score = micro_conds.T
    assert (width == height).all() and 128 <= width.min() < width.max() <= 160
    assert (torch.maximum(top, left) <= width - 128).all() and top.any() and left.any()
    assert score.min() < 4 and score.max() <= world.CLEAN_SCORE


def test_without_a_computed_codebook_whole_pictures_are_encoded(recipe, tmp_path):
    """For example of a VQ model that --init brought, whatever the preset says."""
    run = Run(tmp_path, STAGES)
    torch.manual_seed(0)
    config = vq.Config(block_out_channels=(8, 8), layers_per_block=1, latent_channels=4,
                       num_vq_embeddings=32, norm_num_groups=4)
    vq.VQModel(config).save_pretrained(tmp_path / "vqvae")
    clip.Tokenizer.from_pretrained(recipe.run.out / "tokenizer").save_pretrained(
        tmp_path / "tokenizer")
    dataset, source = ShapesRecipe(run).dataset("3"), ShapesRecipe(run).source("3")
    ids, _, _ = dataset[np.arange(3)]
    pictures = to_float(np.stack([source[i][0] for i in range(3)]))
    with torch.no_grad():
        expected = vq.VQModel.from_pretrained(tmp_path / "vqvae").encode(pictures)
    assert dataset.grid == (32, 32) and torch.equal(ids, expected)


@pytest.mark.parametrize("preset", ("tiny", "small"))
def test_captions_fit_the_text_encoder(preset, tmp_path, capsys):
    """Those of the preset's pictures, and those of its sheets."""
    run = Run(tmp_path, train.PRESETS[preset])
    recipe = ShapesRecipe(run)
    recipe.make_tokenizer(train.MODELS[preset]["text"]["max_position_embeddings"])
    stage = [stage for stage in run.stages if stage in "1234"][-1]
    mixture = {name: value for name, value in recipe.mixture(stage).items()
               if name in world.WORDS}
    rng = np.random.default_rng(0)
    captions = [world.sample_example(rng, **mixture)[0] for _ in range(1500)]
    clip.Tokenizer.from_pretrained(tmp_path / "tokenizer")(
        captions + recipe.sheet_captions(stage, 60))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("stage, places", (
    ("2", {}), ("3", dict(cells=4, margin=0, large=0.0))), ids=("full", "tiny"))
def test_scores_of_a_sheet(recipe, stage, places):
    """Perfect pictures of held-out captions, of all tasks in turn, and blank ones."""
    prompts = recipe.sheet_prompts(stage, 20)
    assert [task for task, _, _ in prompts] == [*world.TASKS * 3, *world.TASKS[:2]]
    captions = recipe.sheet_captions(stage, 20)
    assert len(set(captions)) == 20 and all(map(world.is_held_out, captions))
    pictures = []
    for i, (_, _, spec) in enumerate(prompts):
        scene = world.sample_scene(np.random.default_rng(i), spec, **places)
        pictures.append(world.render(scene, 128))
    names = {*world.TASKS, "overall"}
    assert recipe.scores(stage, pictures) == dict.fromkeys(names, 1.0)
    blank = [Image.new("RGB", (128, 128), "white")] * 20
    assert recipe.scores(stage, blank) == dict.fromkeys(names, 0.0)
    scores = recipe.scores(stage, pictures[:1] + blank[1:])
    assert scores["single"] == 0.25 and scores["overall"] == pytest.approx(0.25 / 6)
