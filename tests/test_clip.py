"""Tokenizer and text encoder: round trips, cut prompts, and the forms that CLIP is published in."""
import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from common import GOLDEN, edit_json, expected, golden_tokenizer, tree
from hypothesis import given, settings, strategies as st
from shape_comments import ShapeComments

import clip
from engine.checkpoint import CheckpointError, read_json
from engine.pipeline import Pipeline

WORDS = "a the red green café star stars circle of left above zebra's 7 ! Ünder".split()
few = settings(max_examples=20, deadline=None)


@cache
def learned_tokenizer():
    """Of captions that hold WORDS."""
    return clip.learn_tokenizer([" ".join(WORDS), " ".join(WORDS[::-1])] * 5, 16)


def text_of(tokenizer, ids):
    """Token ids -> text, word ends as spaces."""
    special = {tokenizer.start, tokenizer.end, tokenizer.pad}
    pieces = [tokenizer.bpe.id_to_token(i) for i in ids if i not in special]
    return "".join(pieces).replace("</w>", " ").strip()


# -------------------------------------------------------------------------------------------------
# Tokenizer


@few
@given(st.lists(st.sampled_from(["a", "red", "star", "stars", "circle", "of"]), max_size=14))
def test_round_trip(words):
    tokenizer = learned_tokenizer()
    ids = tokenizer([" ".join(words).upper()])[0].tolist()
    assert text_of(tokenizer, ids) == " ".join(words)
    assert ids[0] == tokenizer.start and ids[len(words) + 1] == tokenizer.end


@few
@given(st.text(max_size=30))
def test_any_text_is_tokens(text):
    """White space does not matter. Every row has the full length, one start and an end."""
    tokenizer = golden_tokenizer()
    ids, spaced = tokenizer([text, "  " + text.replace(" ", " \n\t ") + "  "])
    assert ids.shape == (77,) and ids.dtype == torch.int64 and torch.equal(ids, spaced)
    assert ids[0] == tokenizer.start and (ids == tokenizer.start).sum() == 1
    assert tokenizer.end in ids


def test_no_texts():
    assert learned_tokenizer()([]).shape == (0, 16)


def test_cut_prompts_say_once_what_was_dropped(capsys):
    tokenizer = learned_tokenizer()
    words = [f"star{'s' * (i % 2)}" for i in range(20)]
    for _ in range(2):
        ids = tokenizer([" ".join(words), "a star"])
    message = capsys.readouterr().err
    assert message.count("dropped") == 1 and repr(" ".join(words[14:])) in message
    assert ids[0, -1] == tokenizer.end and ids.shape == (2, 16)
    tokenizer(["green " * 20], warn=False)
    assert capsys.readouterr().err == ""


def test_a_word_that_is_cut_in_two_counts_as_dropped(capsys):
    clip.Tokenizer(learned_tokenizer().bpe, 6)(["a red xyzxyz star"])
    assert "dropped: 'xyzxyz star'" in capsys.readouterr().err


def test_saved_tokenizers_are_the_same(tmp_path):
    for tokenizer in (learned_tokenizer(), golden_tokenizer()):
        tokenizer.save_pretrained(tmp_path)
        assert tree(tmp_path) == ["merges.txt", "special_tokens_map.json", "tokenizer_config.json",
                                  "vocab.json"]
        again = clip.Tokenizer.from_pretrained(tmp_path)
        texts = ["A red  star!", "", "zebra's 7 çé"]
        assert torch.equal(tokenizer(texts), again(texts))
        assert again.length == tokenizer.length and again.pad == tokenizer.pad


def test_tokenizer_json_will_do(tmp_path):
    """The one file of newer checkpoints, in place of vocab.json and merges.txt."""
    learned_tokenizer().save_pretrained(tmp_path)
    learned_tokenizer().bpe.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "vocab.json").unlink()
    again = clip.Tokenizer.from_pretrained(tmp_path)
    assert torch.equal(again(WORDS), learned_tokenizer()(WORDS))


@pytest.mark.parametrize("pad", ("!", {"content": "!", "lstrip": False}))
def test_the_pad_token_of_either_config(tmp_path, pad):
    """"!" of the larger CLIP models, as text or as an object; it is a special token in prompts."""
    learned_tokenizer().save_pretrained(tmp_path)
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        edit_json(tmp_path / name, pad_token=pad)
    tokenizer = clip.Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.bpe.id_to_token(tokenizer.pad) == "!"
    ids = tokenizer(["a star!"])[0].tolist()
    assert ids[3:] == [tokenizer.pad, tokenizer.end] + [tokenizer.pad] * 11


def test_special_tokens_in_upper_case(tmp_path):
    """As CLIPTokenizerFast of transformers 4.57: special tokens too, unless the config says of one
    that it is not normalized."""
    learned_tokenizer().save_pretrained(tmp_path)
    tokenizer = clip.Tokenizer.from_pretrained(tmp_path)
    start, end = tokenizer.start, tokenizer.end
    a, = tokenizer.bpe.encode("a").ids
    for text, wanted in (("<|STARTOFTEXT|>", [start]), ("a<|StartOfText|> A", [a, start, a]),
                         ("<|ENDOFTEXT|>a", [end, a]), ("<|endoftext|>", [end])):
        assert tokenizer.bpe.encode(text).ids == wanted, text
    assert len(tokenizer.bpe.encode("<|\u017fTARTOFTEXT|>").ids) > 1        # long s: no s
    exact = {"7": {"content": clip.END, "normalized": False, "special": True}}
    edit_json(tmp_path / "tokenizer_config.json", added_tokens_decoder=exact)
    tokenizer = clip.Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.bpe.encode("<|STARTOFTEXT|><|endoftext|>").ids == [start, end]
    assert end not in tokenizer.bpe.encode("<|ENDOFTEXT|>").ids


def test_lengths(tmp_path):
    """A huge model_max_length means that none is set."""
    learned_tokenizer().save_pretrained(tmp_path)
    for stored, length in ((20, 20), (1e30, 77)):
        edit_json(tmp_path / "tokenizer_config.json", model_max_length=stored)
        assert clip.Tokenizer.from_pretrained(tmp_path).length == length


@pytest.mark.parametrize("name, text, words", [
    ("vocab.json", "{", "vocab.json: not a JSON file"), ("vocab.json", None, "no vocab.json"),
    ("merges.txt", None, "no merges.txt"), ("merges.txt", "", "merges.txt: cut off"),
    ("vocab.json", '["a"]', "vocab.json: not a JSON object"),
    ("tokenizer_config.json", '{"model_max_length": NaN}', "model_max_length nan"),
    ("merges.txt", "#version\nqq zz", "merges.txt: cut off"),
    ("special_tokens_map.json", '{"pad_token": null}', "pad_token None"),
    ("tokenizer_config.json", "[1]", "tokenizer_config.json"),
    ("special_tokens_map.json", "{", "special_tokens_map.json"),
    ("tokenizer_config.json", '{"model_max_length": 2}', "model_max_length 2"),
    ("tokenizer_config.json", '{"model_max_length": "x"}', "model_max_length 'x'")])
def test_broken_tokenizers_are_named(tmp_path, name, text, words):
    learned_tokenizer().save_pretrained(tmp_path)
    if name == "special_tokens_map.json":
        (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / name).unlink()
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=words):
        clip.Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("keep", (0.3, 0.7, 0.97))
def test_merges_that_were_cut_off(tmp_path, keep):
    """The file says nothing of its length: the vocabulary does."""
    learned_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "merges.txt"
    text = path.read_text(encoding="utf-8")
    path.write_text(text[:int(keep * len(text))], encoding="utf-8")
    with pytest.raises(CheckpointError, match="merges.txt: cut off"):
        clip.Tokenizer.from_pretrained(tmp_path)


def test_a_vocabulary_whose_largest_id_exceeds_the_embedding(tmp_path):
    """It has no more words than the embedding has rows, but a gap."""
    model = Path(shutil.copytree(GOLDEN / "compressed", tmp_path / "model"))
    words = json.loads((model / "tokenizer/vocab.json").read_text(encoding="utf-8"))
    words["!"] = 10_000
    (model / "tokenizer/vocab.json").write_text(json.dumps(words))
    with pytest.raises(CheckpointError, match="more words"):
        Pipeline(model)


def test_a_tokenizer_folder_appears_whole(tmp_path, monkeypatch):
    """A full disk in between leaves the old one, or none."""
    def full(*arguments):
        raise OSError(28, "No space left on device")
    learned_tokenizer().save_pretrained(tmp_path / "old")
    before = sorted(path.read_bytes() for path in (tmp_path / "old").iterdir())
    monkeypatch.setattr(clip, "write_json", full)
    for name in ("old", "new"):
        with pytest.raises(OSError):
            golden_tokenizer().save_pretrained(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert sorted(path.read_bytes() for path in (tmp_path / "old").iterdir()) == before


def test_a_vocabulary_without_the_special_tokens(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0, "<|endoftext|>": 1}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(CheckpointError, match="not in the vocabulary"):
        clip.Tokenizer.from_pretrained(tmp_path)


# -------------------------------------------------------------------------------------------------
# Text encoder


@pytest.fixture
def folder(tmp_path):
    """A copy of the golden text encoder."""
    return Path(shutil.copytree(GOLDEN / "compressed/text_encoder", tmp_path / "text_encoder"))


def test_the_text_half_of_a_whole_clip(folder):
    """Its config nests the text half's; the projection's size is outside."""
    text = read_json(folder / "config.json")
    whole = {"model_type": "clip", "architectures": ["CLIPModel"], "logit_scale_init_value": 2.6592,
             "projection_dim": text["projection_dim"], "vision_config": {"hidden_size": 8},
             "text_config": {**text, "projection_dim": 512, "dropout": 0.0, "top_p": 1.0,
                             "id2label": {"0": "LABEL_0"}}}
    (folder / "config.json").write_text(json.dumps(whole))
    want = expected("compressed")
    hidden, pooled = clip.TextEncoder.from_pretrained(folder)(want["clip.input_ids"])
    torch.testing.assert_close(hidden, want["clip.hidden"], rtol=0, atol=1e-4)
    torch.testing.assert_close(pooled, want["clip.pooled"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("content", (
    {"projection_dim": 32}, {"text_config": {}}, {"text_config": None, "projection_dim": 32}))
def test_a_whole_clip_config_without_its_text_half(folder, content):
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", **content}))
    with pytest.raises(CheckpointError, match="without text_config or projection_dim"):
        clip.TextEncoder.from_pretrained(folder)


def test_quick_gelu(folder):
    edit_json(folder / "config.json", hidden_act="quick_gelu")
    layer = clip.TextEncoder.from_pretrained(folder).text_model.encoder.layers[0]
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    y = x + layer.self_attn(layer.layer_norm1(x))
    h = layer.mlp.fc1(layer.layer_norm2(y))
    wanted = y + layer.mlp.fc2(h / (1 + torch.exp(-1.702 * h)))
    torch.testing.assert_close(layer(x), wanted)


def tiny_encoder(**changes):
    sizes = dict(hidden_size=12, intermediate_size=8, num_hidden_layers=2, num_attention_heads=3,
                 projection_dim=7, vocab_size=10)
    return clip.TextEncoder(clip.Config(**{**sizes, **changes}))


def test_where_the_text_ends():
    """At the first end token. The old form, eos_token_id 2: at the first largest id."""
    ids = torch.tensor([[7, 1, 2, 9, 9], [7, 9, 1, 9, 1]])
    for eos, positions in ((9, [3, 1]), (2, [3, 1]), (1, [1, 2])):
        assert tiny_encoder(eos_token_id=eos).end_position(ids).tolist() == positions


def test_later_tokens_do_not_matter():
    """Attention is causal, so padding needs no mask."""
    encoder = tiny_encoder(eos_token_id=9)
    ids = torch.tensor([[7, 1, 3, 9, 0], [7, 1, 3, 9, 5]])
    hidden, pooled = encoder(ids)
    torch.testing.assert_close(hidden[0, :4], hidden[1, :4])
    torch.testing.assert_close(pooled[0], pooled[1])
    assert not torch.allclose(hidden[0, 4], hidden[1, 4])


def test_shape_comments_are_true():
    with ShapeComments(clip, D=12, H=3, d=4, P=7, L=5) as comments:
        tiny_encoder()(torch.ones(2, 5, dtype=torch.int64))
    assert not comments.wrong, sorted(set(comments.wrong))
    assert not comments.unseen()
