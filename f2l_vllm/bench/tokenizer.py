"""A tokenizer of the released models' kind and size, made without them.

SmolVLM2's tokenizer splits text like GPT-2's, with single digits, and common words are single tokens. Here the words of
the measured prompts are single tokens, and words that no prompt has fill the vocabulary up to its size, so that any id
a random model answers with is text. Apart from a few rare words, prompts have the same length as with SmolVLM2's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from num2words import num2words
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from f2l_vllm.hypernetwork.adapter_check import PROBE
from f2l_vllm.hypernetwork.config import INSTRUCTION
from f2l_vllm.recipes.f2l_tiny import tokenizer as tiny

_PROCESSORS_WORDS = (
    "User: You are provided the following series of frames from a 0:00:08 [H:MM:SS] video.\n\nFrame from 00:01:\n\n"
    "User:\nAssistant:\nSystem:"
)


def build(size: int, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """The tokenizer; the same texts give the same one.

    Args:
        size: of the vocabulary, special tokens included.
        texts: their words become single tokens.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size,  # an upper bound: training ends when every word is one token
        min_frequency=1,
        special_tokens=list(tiny.SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(texts), trainer)
    bpe = _filled(bpe, size)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=tiny.IM_START,
        eos_token=tiny.END_OF_UTTERANCE,
        unk_token=tiny.END_OF_TEXT,
        pad_token=tiny.IM_END,
        extra_special_tokens={
            "fake_image_token": tiny.FAKE_IMAGE,
            "global_image_token": tiny.GLOBAL_IMAGE,
            "image_token": tiny.IMAGE,
            "video_token": tiny.VIDEO,
            "end_of_utterance_token": tiny.END_OF_UTTERANCE,
        },
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=1 << 20,
    )


def _corpus(texts: Iterable[str]) -> Iterator[str]:
    yield from (_PROCESSORS_WORDS, INSTRUCTION, PROBE)
    yield from (f"series of {num2words(count)} frames" for count in range(1, 1025))
    for text in texts:
        yield from (f"User: {text}", text)


def _filled(trained: Tokenizer, size: int) -> Tokenizer:
    """The same tokenizer with a vocabulary of `size`."""
    state = json.loads(trained.to_str())
    vocabulary = state["model"]["vocab"]
    fillers = (f"Ġword{number}" for number in range(size))  # Ġ is the byte-level alphabet's space
    vocabulary |= {next(fillers): place for place in range(len(vocabulary), size)}
    filled = Tokenizer.from_str(json.dumps(state))
    filled.decoder = decoders.ByteLevel()
    return filled
