"""The CLIP text tower: a prompt to the hidden states and the pooled vector that condition the
transformer (paper section 2.2; Radford et al. 2021). A third of the file is about files that are
broken or of another kind, and about learning a tokenizer.

    tokenizer = Tokenizer.from_pretrained("weights/shapes/tokenizer")
    encoder = TextEncoder.from_pretrained("weights/shapes/text_encoder")
    hidden, pooled = encoder(tokenizer(["a red circle", ""]))             # (2, L, D), (2, P)

Letters: B batch, L text positions, D width, H heads of size d, P width of the pooled output.
"""
import json
import reprlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer as BPETokenizer
from tokenizers import models, normalizers, pre_tokenizers, trainers
from torch import nn

from engine.checkpoint import (DEPTH, CheckpointError, Embedding, JsonConfig, Pretrained, UserError,
                               first_line, read_json, write_folder, write_json)

# -------------------------------------------------------------------------------------------------
# Tokenizer

WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"      # BPE merges within these
START, END = "<|startoftext|>", "<|endoftext|>"
BPE_OPTIONS = {"end_of_word_suffix": "</w>", "unk_token": END}
TOKENIZER_FILES = ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json",
                   "tokenizer.json", "added_tokens.json")


class Tokenizer:
    """Byte-level BPE with </w> word ends: START, the text, END, padded to `length`. Special
    tokens in a text are recognised in any case, except those in `exact`."""

    def __init__(self, bpe, length, pad=END, exact=()):
        self.bpe = bpe                            # a Tokenizer of the `tokenizers` library
        self.length = length
        self.warned = set()                       # texts whose cut was reported
        bpe.no_padding()
        bpe.no_truncation()
        if bpe.token_to_id(START) is None or bpe.token_to_id(END) is None:
            raise CheckpointError(f"tokenizer: {START} or {END} is not in the vocabulary")
        for token in (START, END, pad):                       # NOTE pad "!": special in prompts too
            lowered = token not in exact
            bpe.add_special_tokens([AddedToken(token, special=True, normalized=lowered)])
        self.start = bpe.token_to_id(START)
        self.end = bpe.token_to_id(END)
        self.pad = bpe.token_to_id(pad)

    @classmethod
    def from_pretrained(cls, folder):
        """Read vocab.json and merges.txt, or tokenizer.json; the length from tokenizer_config.json;
        the pad token from there or from special_tokens_map.json.
        Raises CheckpointError for missing or broken files."""
        folder = Path(folder)
        config = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (folder / name).is_file():
                config.update(read_json(folder / name))
        pad = config.get("pad_token", END)
        if isinstance(pad, dict):
            pad = pad.get("content")
        if not isinstance(pad, str) or not pad:
            raise CheckpointError(f"{folder}: pad_token {reprlib.repr(pad)} is not a token")
        length = config.get("model_max_length", 77)
        if not isinstance(length, (int, float)) or not length >= 3:           # also NaN
            raise CheckpointError(f"{folder / 'tokenizer_config.json'}: model_max_length "
                                  f"{reprlib.repr(length)} is not a number of tokens")
        length = int(length) if length < 100_000 else 77      # transformers writes 1e30 for "unset"
        return cls(read_bpe(folder), length, pad, exact_tokens(config))

    def save_pretrained(self, folder):
        """Write vocab.json, merges.txt and the two config files, like the published tokenizers. The
        folder appears whole."""
        names = {"bos_token": START, "eos_token": END, "unk_token": END,
                 "pad_token": self.bpe.id_to_token(self.pad)}

        def write(temporary):
            try:
                self.bpe.model.save(str(temporary))
            except Exception as e:                            # the library raises bare Exception
                raise UserError(f"{folder}: the tokenizer cannot be written ({e})") from None
            write_json(temporary / "special_tokens_map.json", names)
            write_json(temporary / "tokenizer_config.json",
                       {**names, "do_lower_case": True, "model_max_length": self.length,
                        "tokenizer_class": "CLIPTokenizer", "errors": "replace",
                        "add_prefix_space": False})
        write_folder(folder, write, owned=TOKENIZER_FILES)

    def __call__(self, texts, warn=True):
        """list of B str -> (B, length) int64. A text that is too long is cut; it still ends with
        END. With `warn`, stderr says once per text what was dropped."""
        rows = []
        room = self.length - 2
        encodings = self.bpe.encode_batch(list(texts), add_special_tokens=False)
        for text, encoding in zip(texts, encodings):
            if warn and len(encoding.ids) > room and text not in self.warned:
                self.warned.add(text)
                dropped = dropped_words(text, encoding, room)
                print(f"prompt cut to {room} tokens; dropped: {dropped[:1000]!r}", file=sys.stderr)
            row = [self.start, *encoding.ids[:room], self.end]
            rows.append(row + [self.pad] * (self.length - len(row)))
        return torch.tensor(rows, dtype=torch.int64).view(-1, self.length)


def exact_tokens(config):
    """The special tokens of a tokenizer_config.json that are recognised in their own case only."""
    added = config.get("added_tokens_decoder")
    entries = added.values() if isinstance(added, dict) else []
    return [entry.get("content") for entry in entries
            if isinstance(entry, dict) and entry.get("normalized") is False]


def dropped_words(text, encoding, room):
    """The words of `text` whose tokens do not all lie within the first `room`."""
    start = encoding.offsets[room][0]
    while start > 0 and not text[start - 1].isspace():        # a word that is cut in two is dropped
        start -= 1
    return text[start:]


def byte_pair_tokenizer(model):
    """A BPE model of the `tokenizers` library with CLIP's text normalisation and word splitting."""
    bpe = BPETokenizer(model)
    bpe.normalizer = normalizers.Sequence([
        normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return bpe


def read_bpe(folder):
    """The byte_pair_tokenizer of a tokenizer folder. Raises CheckpointError."""
    vocab = folder / "vocab.json"
    merges = folder / "merges.txt"
    both = folder / "tokenizer.json"
    try:
        if vocab.is_file() and merges.is_file():
            check_merges(vocab, merges)
            return byte_pair_tokenizer(models.BPE.from_file(str(vocab), str(merges), **BPE_OPTIONS))
        if both.is_file():
            return byte_pair_tokenizer(BPETokenizer.from_file(str(both)).model)
    except CheckpointError:
        raise
    except Exception as e:                                    # the library raises bare Exception
        raise CheckpointError(f"{folder}: the tokenizer cannot be read "
                              f"({first_line(e)})") from None
    lacking = [path.name for path in (vocab, merges) if not path.is_file()]
    raise CheckpointError(f"{folder}: no {' and no '.join(lacking)}, and no tokenizer.json")


def check_merges(vocab, merges):
    """Raises CheckpointError if a word of vocab.json is longer than a byte and no line of
    merges.txt makes it: the file was cut off. Words like <name> are added tokens."""
    made = set()
    for line in merges.read_text(encoding="utf-8").split("\n"):
        made.add("".join(line.split()))
    lost = [word for word in read_json(vocab) if len(word.removesuffix("</w>")) > 1
            and word not in made and not (word[0] == "<" and word[-1] == ">")]
    if lost:
        raise CheckpointError(f"{merges}: cut off? {len(lost)} words of {vocab.name} have no line "
                              f"in it, first: {reprlib.repr(lost[0])}")


def learn_tokenizer(captions, length):
    """Learn byte pairs from captions -> Tokenizer. Its vocabulary has the order of CLIP's: all
    bytes, all bytes that end a word, the merges, the two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1024, min_frequency=2, initial_alphabet=alphabet,
                                  end_of_word_suffix="</w>", show_progress=False)
    bpe = byte_pair_tokenizer(models.BPE(**BPE_OPTIONS))
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    words = [*alphabet, *(byte + "</w>" for byte in alphabet), *map("".join, merges), START, END]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    return Tokenizer(byte_pair_tokenizer(models.BPE(vocabulary, merges, **BPE_OPTIONS)), length)


# -------------------------------------------------------------------------------------------------
# Text encoder


@dataclass
class Config(JsonConfig):
    """The defaults are the published configuration."""
    hidden_size: int = 1024                       # D
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    projection_dim: int = 1024                    # P
    max_position_embeddings: int = 77
    vocab_size: int = 49408
    hidden_act: str = "gelu"                      # or quick_gelu: x * sigmoid(1.702 x)
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 2                         # NOTE 2 is an old form: END is the largest id

    FIXED = {"model_type": "clip_text_model", "attention_dropout": 0.0}
    BOUNDS = dict(num_hidden_layers=DEPTH, layer_norm_eps=(0, 1), eos_token_id=(0, 2 ** 20))
    # Keys that transformers writes into every config for its generation and training helpers.
    IGNORED = frozenset("""
        architectures torch_dtype dtype transformers_version _name_or_path initializer_factor
        initializer_range bos_token_id pad_token_id gradient_checkpointing dropout
        add_cross_attention bad_words_ids begin_suppress_tokens chunk_size_feed_forward
        cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample
        early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
        finetuning_task forced_bos_token_id forced_eos_token_id id2label is_decoder
        is_encoder_decoder label2id length_penalty max_length min_length no_repeat_ngram_size
        num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
        output_scores prefix problem_type pruned_heads remove_invalid_values repetition_penalty
        return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params
        temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k
        top_p torchscript typical_p use_bfloat16 use_cache _attn_implementation_autoset""".split())

    def __post_init__(self):
        super().__post_init__()
        if self.eos_token_id >= max(self.vocab_size, 3):
            raise CheckpointError(f"text encoder: eos_token_id {self.eos_token_id} is not one of "
                                  f"the vocab_size {self.vocab_size}")
        if self.hidden_act not in ("gelu", "quick_gelu"):
            raise CheckpointError(f"text encoder: hidden_act {self.hidden_act!r} is not supported, "
                                  "only gelu, quick_gelu")
        if self.hidden_size % self.num_attention_heads:
            raise CheckpointError("text encoder: num_attention_heads must divide hidden_size")

    @classmethod
    def from_dict(cls, raw, path="config"):
        if raw.get("model_type") == "clip":       # the full CLIP checkpoint: keep its text half
            if not isinstance(raw.get("text_config"), dict) or "projection_dim" not in raw:
                raise CheckpointError(f"{path}: a CLIP config without text_config or "
                                      "projection_dim")
            raw = {**raw["text_config"], "model_type": "clip_text_model",
                   "projection_dim": raw["projection_dim"]}
        return super().from_dict(raw, path)

    def to_dict(self):
        return {**super().to_dict(), "architectures": ["CLIPTextModelWithProjection"],
                "torch_dtype": "float32"}


def quick_gelu(x):
    """The approximate GELU of OpenAI's CLIP models."""
    return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Causal self-attention."""
    def __init__(self, c: Config):
        super().__init__()
        self.heads = c.num_attention_heads
        self.qkv = nn.Linear(c.hidden_size, 3 * c.hidden_size)
        self.out_proj = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x):                                                     # (B, L, D)
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))                  # (B, L, 3, H, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                  # (B, H, L, d)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(y.transpose(1, 2).flatten(2))                    # (B, L, D)


class Layer(nn.Module):
    """Attention and MLP, each after a norm and added to its input."""
    def __init__(self, c: Config):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.self_attn = Attention(c)
        self.layer_norm2 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(c.hidden_size, c.intermediate_size),
                                  "fc2": nn.Linear(c.intermediate_size, c.hidden_size)})
        self.act = F.gelu if c.hidden_act == "gelu" else quick_gelu

    def forward(self, x):                                                     # (B, L, D)
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp.fc2(self.act(self.mlp.fc1(self.layer_norm2(x))))


class TextEncoder(Pretrained):
    """Token and position embeddings, layers, final norm, projection, under published names.

    Another text encoder stands in for it with from_pretrained, forward(text_ids) -> hidden, pooled,
    and a config with hidden_size (D), projection_dim (P), vocab_size and max_position_embeddings,
    which engine/pipeline.py:check_parts reads. Its place is engine/hub.py:PARTS and
    engine/pipeline.py:Pipeline.text_encoder."""
    CONFIG = Config
    STEM = "model"
    FP16_VARIANT = False                          # the published one is faulty
    FUSED = {"self_attn.qkv": {"self_attn.q_proj": 1, "self_attn.k_proj": 1, "self_attn.v_proj": 1}}
    IGNORED_WEIGHTS = ("text_model.embeddings.position_ids", "vision_model.", "visual_projection.",
                       "logit_scale")

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        self.text_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({
                "token_embedding": Embedding(c.vocab_size, c.hidden_size),
                "position_embedding": Embedding(c.max_position_embeddings, c.hidden_size)}),
            "encoder": nn.ModuleDict({
                "layers": nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))}),
            "final_layer_norm": nn.LayerNorm(c.hidden_size, c.layer_norm_eps)})
        self.text_projection = nn.Linear(c.hidden_size, c.projection_dim, bias=False)

    def end_position(self, input_ids):
        """(B, L) -> (B,): the position of the first END."""
        eos = self.config.eos_token_id
        is_end = input_ids if eos == 2 else (input_ids == eos).int()
        return is_end.argmax(-1)

    def forward(self, input_ids):
        """(B, L) int64 -> hidden (B, L, D), pooled (B, P). hidden is the second-to-last layer's
        output without the final norm. pooled is the last layer's output at the end of the text,
        normed and projected. There is no padding mask."""
        embeddings = self.text_model.embeddings
        positions = embeddings.position_embedding.weight[:input_ids.shape[1]]         # (L, D)
        x = embeddings.token_embedding(input_ids) + positions                         # (B, L, D)
        for layer in self.text_model.encoder.layers:
            hidden = x
            x = layer(x)
        rows = torch.arange(len(input_ids), device=input_ids.device)
        last = x[rows, self.end_position(input_ids)]                                  # (B, D)
        return hidden, self.text_projection(self.text_model.final_layer_norm(last))
