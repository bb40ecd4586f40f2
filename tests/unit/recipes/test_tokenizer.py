"""Any text encodes and comes back; the world's words and the processor's phrases are single tokens."""

import pytest

from f2l_vllm.recipes.f2l_tiny.tokenizer import SPECIAL_TOKENS, build_tokenizer
from f2l_vllm.synthetic import phrases


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_building_it_twice_gives_the_same_tokenizer(tokenizer):
    assert build_tokenizer().backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


@pytest.mark.parametrize(
    "text", ["żółć 漢字 😀", "Zebra's 100 km/h\t\n\n  x", "", "\x00\x7f", "What colour is the circle?"]
)
def test_any_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_every_word_of_the_world_is_one_token(tokenizer):
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    for sentence in phrases.corpus():
        assert len(tokenizer.tokenize(sentence)) == len(split(sentence)), sentence


def test_special_tokens_have_the_first_ids(tokenizer):
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))


@pytest.mark.parametrize(
    "pieces",
    [
        ("<|im_start|>User:", " What colour is the circle?<end_of_utterance>\nAssistant:", " Red.<end_of_utterance>"),
        ("<|im_start|>User: ", "You are provided the following series of eight frames from a 0:00:08"),
        (" [H:MM:SS] video.\n", "\nFrame from 00:07:", "<fake_token_around_image>", "\n\n", "Internalize this video"),
    ],
)
def test_pieces_of_a_prompt_encode_as_the_whole(tokenizer, pieces):
    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    assert [token for piece in pieces for token in encode(piece)] == encode("".join(pieces))
