"""The CLIP text tower: a prompt to the hidden states and the pooled vector that guide the transformer
(paper section 2.2; Radford et al. 2021).

    tokenizer = Tokenizer.from_pretrained("weights/shapes/tokenizer")
    encoder = TextEncoder.from_pretrained("weights/shapes/text_encoder")
    hidden, pooled = encoder(tokenizer(["a red circle", ""]))                     # (2, L, D), (2, P)

Letters: B batch, L text positions, D width, P width of the pooled output.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer as BPETokenizer, models, normalizers, pre_tokenizers
from torch import nn

from vq import CheckpointError, JsonConfig, Pretrained, write_whole

PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
START, END = "<|startoftext|>", "<|endoftext|>"


def byte_pair_tokenizer(model):
    """CLIP's text normalisation and pieces around a BPE model of the `tokenizers` library."""
    bpe = BPETokenizer(model)
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "),
                                           normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PIECES), "removed", invert=True),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return bpe


class Tokenizer:
    """Byte-level BPE with </w> word ends: START, the text, END, padded to `length`."""

    def __init__(self, bpe, length, pad=END):
        self.bpe, self.length, self.cut = bpe, length, set()       # cut: texts whose cutting was told
        self.bpe.no_padding()
        self.bpe.no_truncation()
        self.bpe.add_special_tokens([START, END, pad])             # NOTE a "!" that pads is special in prompts too
        self.start, self.end, self.pad = (bpe.token_to_id(t) for t in (START, END, pad))
        if None in (self.start, self.end, self.pad):
            raise CheckpointError(f"tokenizer: {START}, {END} or the pad token {pad!r} is not in the vocabulary")

    @classmethod
    def from_pretrained(cls, folder):
        """Read vocab.json and merges.txt, or tokenizer.json; the length from tokenizer_config.json, the pad token
        from there or special_tokens_map.json. Raises CheckpointError for files that are missing or broken."""
        folder = Path(folder)
        config = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (folder / name).is_file():
                try:
                    config.update(json.loads((folder / name).read_text(encoding="utf-8")))
                except (ValueError, TypeError):
                    raise CheckpointError(f"{folder / name}: not a JSON object") from None
        try:
            if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
                model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"),
                                             end_of_word_suffix="</w>", unk_token=END)
                bpe = byte_pair_tokenizer(model)
            elif (folder / "tokenizer.json").is_file():
                bpe = byte_pair_tokenizer(BPETokenizer.from_file(str(folder / "tokenizer.json")).model)
            else:
                raise CheckpointError(f"{folder}: no vocab.json with merges.txt, and no tokenizer.json")
        except CheckpointError:
            raise
        except Exception as e:                        # the tokenizers library raises bare Exception
            raise CheckpointError(f"{folder}: the tokenizer cannot be read ({e})") from None
        pad = config.get("pad_token", END)
        length = config.get("model_max_length", 77)
        if not isinstance(length, (int, float)) or length < 3:
            raise CheckpointError(f"{folder / 'tokenizer_config.json'}: model_max_length {length!r} is not a number of tokens")
        return cls(bpe, int(length) if length < 100_000 else 77, pad["content"] if isinstance(pad, dict) else pad)

    def save_pretrained(self, folder):
        """Write vocab.json, merges.txt and the two config files, as the published tokenizers have them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.bpe.model.save(str(folder))
        names = dict(bos_token=START, eos_token=END, unk_token=END, pad_token=self.bpe.id_to_token(self.pad))
        config = dict(names, do_lower_case=True, model_max_length=self.length, tokenizer_class="CLIPTokenizer",
                      errors="replace", add_prefix_space=False)
        for name, content in (("special_tokens_map.json", names), ("tokenizer_config.json", config)):
            text = json.dumps(content, indent=2) + "\n"
            write_whole(folder / name, lambda path: Path(path).write_text(text, encoding="utf-8"))

    def __call__(self, texts, tell=True):
        """list of str -> (B, length) int64. A text that is too long is cut, END kept, and stderr says once what was
        dropped, if it is to `tell`."""
        rows = []
        for text, piece in zip(texts, self.bpe.encode_batch(list(texts), add_special_tokens=False)):
            room = self.length - 2
            if tell and len(piece.ids) > room and text not in self.cut:
                self.cut.add(text)
                print(f"prompt cut to {room} tokens; dropped: {text_after(text, piece, room)!r}", file=sys.stderr)
            row = [self.start, *piece.ids[:room], self.end]
            rows.append(row + [self.pad] * (self.length - len(row)))
        return torch.tensor(rows, dtype=torch.int64).view(-1, self.length)


def text_after(text, piece, room):
    """The words of `text` whose tokens do not all lie within the first `room`."""
    start = piece.offsets[room][0]
    while start > 0 and not text[start - 1].isspace():              # a word that is cut in two counts as dropped
        start -= 1
    return text[start:]


# ---------------------------------------------------------------------------------------------------------
# The encoder


@dataclass
class Config(JsonConfig):
    hidden_size: int = 1024                       # D
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    projection_dim: int = 1024                    # P
    max_position_embeddings: int = 77
    vocab_size: int = 49408
    hidden_act: str = "gelu"                      # or quick_gelu: x * sigmoid(1.702 x)
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 2                         # NOTE 2 is an old form: the position of the largest id

    FIXED = dict(model_type="clip_text_model", attention_dropout=0.0)
    # Keys that transformers writes into every config; they steer its generation and training helpers.
    IGNORED = frozenset("""
        architectures torch_dtype dtype transformers_version _name_or_path initializer_factor initializer_range
        bos_token_id pad_token_id gradient_checkpointing dropout add_cross_attention bad_words_ids begin_suppress_tokens
        chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample
        early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task
        forced_bos_token_id forced_eos_token_id id2label is_decoder is_encoder_decoder label2id length_penalty
        max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
        output_hidden_states output_scores prefix problem_type pruned_heads remove_invalid_values repetition_penalty
        return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature
        tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torchscript typical_p
        use_bfloat16 use_cache _attn_implementation_autoset""".split())

    def __post_init__(self):
        if self.hidden_act not in ("gelu", "quick_gelu"):
            raise CheckpointError(f"text encoder: hidden_act {self.hidden_act!r} is not supported, only gelu, quick_gelu")
        if self.hidden_size % self.num_attention_heads:
            raise CheckpointError("text encoder: num_attention_heads must divide hidden_size")

    @classmethod
    def from_dict(cls, raw, path="config"):
        if raw.get("model_type") == "clip":       # the full CLIP checkpoint: keep its text half
            if not isinstance(raw.get("text_config"), dict) or "projection_dim" not in raw:
                raise CheckpointError(f"{path}: a CLIP config without text_config or projection_dim")
            raw = {**raw["text_config"], "model_type": "clip_text_model", "projection_dim": raw["projection_dim"]}
        return super().from_dict(raw, path)

    def to_dict(self):
        return {**super().to_dict(), "architectures": ["CLIPTextModelWithProjection"], "torch_dtype": "float32"}


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.heads = c.num_attention_heads
        self.qkv = nn.Linear(c.hidden_size, 3 * c.hidden_size)
        self.out_proj = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x):                                                        # (B, L, D)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)    # (B, heads, L, D / heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.self_attn = Attention(c)
        self.layer_norm2 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(c.hidden_size, c.intermediate_size),
                                      fc2=nn.Linear(c.intermediate_size, c.hidden_size)))
        self.act = F.gelu if c.hidden_act == "gelu" else lambda x: x * torch.sigmoid(1.702 * x)

    def forward(self, x):                                                        # (B, L, D)
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp.fc2(self.act(self.mlp.fc1(self.layer_norm2(x))))


class TextEncoder(Pretrained):
    CONFIG, STEM, TWIN = Config, "model", False
    PACKED = {"self_attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}
    DROPPED = ("text_model.embeddings.position_ids", "vision_model.", "visual_projection.", "logit_scale")

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        self.text_model = nn.ModuleDict(dict(
            embeddings=nn.ModuleDict(dict(token_embedding=nn.Embedding(c.vocab_size, c.hidden_size),
                                          position_embedding=nn.Embedding(c.max_position_embeddings, c.hidden_size))),
            encoder=nn.ModuleDict(dict(layers=nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers)))),
            final_layer_norm=nn.LayerNorm(c.hidden_size, c.layer_norm_eps)))
        self.text_projection = nn.Linear(c.hidden_size, c.projection_dim, bias=False)

    def end_position(self, ids):
        """(B, L) -> (B,): where the text ends."""
        eos = self.config.eos_token_id
        return (ids if eos == 2 else (ids == eos).int()).argmax(-1)

    def forward(self, ids):
        """(B, L) int64 -> hidden (B, L, D), the second-to-last layer's output without the final norm, and
        pooled (B, P), the projected, normed last layer at the end of the text. There is no padding mask."""
        embeddings = self.text_model.embeddings
        x = embeddings.token_embedding(ids) + embeddings.position_embedding.weight[:ids.shape[1]]          # (B, L, D)
        for layer in self.text_model.encoder.layers:
            hidden, x = x, layer(x)
        last = x[torch.arange(len(ids), device=ids.device), self.end_position(ids)]                        # (B, D)
        return hidden, self.text_projection(self.text_model.final_layer_norm(last))
