"""Small tokenizers of each kind of decoder, of a few words each."""

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ("<unk>", "<s>", "</s>")
WORDS = (*SPECIAL, "▁A", "▁B", "C", "▁", "▁▁", "d", "\ufffd", "é")
FEW_BYTES = ("<0x0A>", "<0x20>", "<0xE2>", "<0x82>", "<0xAC>")
ALL_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
# One letter for each byte, as a byte-level tokenizer spells it.
LETTERS = tuple(sorted(pre_tokenizers.ByteLevel.alphabet()))
SPACES = decoders.Replace("▁", " ")


def small_tokenizer(
    words: Sequence[str], decoder: decoders.Decoder | None, added: Sequence[str] = ()
) -> Tokenizer:
    """Return a tokenizer whose first three words are special; ``added`` are added and plain."""
    vocab = {word: index for index, word in enumerate(words)}
    model = models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    tokenizer.add_tokens([AddedToken(word) for word in added])
    return tokenizer


def llama(words: Sequence[str], num_stripped: int = 1) -> Tokenizer:
    """Return a tokenizer with the decoder of Llama 2 and Mistral."""
    return small_tokenizer(
        words,
        decoders.Sequence(
            [
                SPACES,
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", num_stripped, 0),
            ]
        ),
    )


def small_tokenizers() -> dict[str, Tokenizer]:
    """Return a tokenizer of each kind, by its name."""
    gemma = decoders.Sequence([SPACES, decoders.ByteFallback(), decoders.Fuse()])
    metaspace = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    strip_right = decoders.Sequence([SPACES, decoders.Fuse(), decoders.Strip(" ", 0, 1)])
    strip_tokens = decoders.Sequence([SPACES, decoders.Strip(" ", 1, 0)])
    pieces = (*SPECIAL, "hello", "##s", "##", "n", "'", ".", "do", "not", ",", "n't", "é")
    ends = (*SPECIAL, "hello</w>", "s", "a</w>", ".")
    euro = (*SPECIAL, *(letter for letter in LETTERS if letter in "âĤ¬AĠÿðŁ"))
    return {
        "byte-level": small_tokenizer(
            (*SPECIAL, *LETTERS, "Ġthe", "Ã©", "âĤ"), decoders.ByteLevel(), ["<tool>", "a é", "☕"]
        ),
        "byte-level, few bytes": small_tokenizer(euro, decoders.ByteLevel(), ["☕ x"]),
        "llama": llama((*WORDS, *ALL_BYTES)),
        "llama, few bytes": llama((*WORDS, *FEW_BYTES)),
        "llama, no bytes": llama(WORDS),
        "llama, two spaces stripped": llama((*WORDS, *FEW_BYTES), num_stripped=2),
        "gemma": small_tokenizer((*WORDS, *ALL_BYTES), gemma),
        "metaspace": small_tokenizer(WORDS, decoders.Metaspace()),
        "metaspace never": small_tokenizer(WORDS, decoders.Metaspace(prepend_scheme="never")),
        "metaspace and bytes": small_tokenizer((*WORDS, *FEW_BYTES), metaspace),
        "strip right": small_tokenizer(WORDS, strip_right),
        "strip each token": small_tokenizer(WORDS, strip_tokens),
        "wordpiece": small_tokenizer(pieces, decoders.WordPiece()),
        "bpe with suffix": small_tokenizer(ends, decoders.BPEDecoder("</w>")),
        "no decoder": small_tokenizer(pieces, None),
    }
