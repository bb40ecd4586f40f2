"""The default model's tokenizer: byte-level BPE over the world's language and the processor's own prompt text.

It encodes any UTF-8 text; words of the world are single tokens. Where a token may start depends only on the text, never
on earlier merges, so a prompt encoded in pieces (a video's prefix, a question, an answer) has the same ids as the
prompt encoded whole.
"""

from __future__ import annotations

from collections.abc import Iterator

from num2words import num2words
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from f2l_vllm.synthetic import phrases

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
FAKE_IMAGE, GLOBAL_IMAGE, IMAGE, VIDEO = "<fake_token_around_image>", "<global-img>", "<image>", "<video>"
END_OF_UTTERANCE = "<end_of_utterance>"
_ROWS_AND_COLUMNS = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
SPECIAL_TOKENS = (
    *(END_OF_TEXT, IM_START, IM_END, FAKE_IMAGE, GLOBAL_IMAGE, IMAGE, END_OF_UTTERANCE, VIDEO),
    *_ROWS_AND_COLUMNS,
)

# SmolVLM's processor writes these around a video's frames; one token each keeps the video's prompt short.
_INTRO = "You are provided the following series of"
_FRAMES_FROM = " frames from a"
_DURATION_UNIT = " [H:MM:SS] video."
_FRAME_FROM = "\nFrame from "
_PIECES = (
    r"\nFrame from (?=\d)"
    r"| (?=You are provided the following series of )|You are provided the following series of(?= )"
    r"| frames from a(?= \d)| \[H:MM:SS\] video\."
    r"|User:|Assistant:|System:|\d{1,2}:|\d{1,2}| ?\p{L}+| ?[^\s\p{L}\d]|\s"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, always the same; takes about a second."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # an upper bound: training ends when every word of the corpus is one token
        min_frequency=1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=IM_START,
        eos_token=END_OF_UTTERANCE,
        unk_token=END_OF_TEXT,
        pad_token=IM_END,
        extra_special_tokens={
            "fake_image_token": FAKE_IMAGE,
            "global_image_token": GLOBAL_IMAGE,
            "image_token": IMAGE,
            "video_token": VIDEO,
            "end_of_utterance_token": END_OF_UTTERANCE,
        },
        additional_special_tokens=list(_ROWS_AND_COLUMNS),
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=2048,
    )


def _corpus() -> Iterator[str]:
    yield from phrases.corpus()
    yield from ("User:", "Assistant:", "System:", "\n", _FRAME_FROM + "00:00:", _DURATION_UNIT)
    for number in range(60):
        yield f"{number:02d}:{number:02d}"
        yield f"{number % 10}:{number:02d}:"
    for frames in range(1, 65):
        yield f"{_INTRO} {num2words(frames)}{_FRAMES_FROM} 0:00:{frames - 1:02d}{_DURATION_UNIT}\n"
