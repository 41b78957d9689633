"""Tokenizer folders that spell their words: every published tokenizer's class, a vocabulary of letters."""

import json
import string

from transformers import BertTokenizer, CLIPTokenizer, PreTrainedTokenizerFast

LETTERS = list(string.ascii_lowercase)


def clip_words(folder):
    """CLIP's tokenizer; as in the published one, the end token is the last of all, and pads."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = [*LETTERS, *(f"{c}</w>" for c in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def bert_words(folder):
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def spelling(special, template=None, **names):
    """A fast tokenizer of single characters: `special` tokens first, then letters, digits, space and marks."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    characters = [*string.ascii_letters, *string.digits, *" .,:;?!'\"<>|_\n/-"]
    vocabulary = {t: i for i, t in enumerate([*special, *characters])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=special[0]))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[Yy]es|[Nn]o\b|[\s\S]"), "isolated")
    if template:
        used = [(t, vocabulary[t]) for t in special if t in template]
        inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=special[0], **names)
