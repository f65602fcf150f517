"""A small tokenizer of BERT's kind."""

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import BertProcessing
from transformers import PreTrainedTokenizerFast

WORDS = ("lost", "found", "late")


def small_wordpiece() -> PreTrainedTokenizerFast:
    """A tokenizer of words and digits with the special tokens of BERT around a text."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "card", ":", ".", *WORDS, *"0123456789"]
    words += [f"##{digit}" for digit in range(10)]
    whole = Tokenizer(WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    whole.normalizer, whole.pre_tokenizer = BertNormalizer(), BertPreTokenizer()
    whole.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=whole, **special)
