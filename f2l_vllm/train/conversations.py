"""Token ids of a question and its answer as a model's chat template writes them, cut where questions differ.

A tokenizer may join letters across the pieces of a prompt, so every prompt is encoded whole. The start that all prompts
of a batch share is their prefix; the rest of a prompt is its turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from typing import Any

from f2l_vllm.train.packing import Turn
from f2l_vllm.video.sample import SampledVideo

Asked = tuple[str, str, str]  # question, answer, kind


class Conversations:
    """Writes conversations for one processor.

    Args:
        processor: a processor with a chat template.

    Raises:
        ValueError: the template does not write an answer after its own generation prompt, so it cannot be taught.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self._write("a question", "an answer", [])

    def turns(self, asked: Sequence[Sequence[Asked]]) -> tuple[list[int], list[list[Turn]]]:
        """Questions without frames, one row per video.

        Returns:
            the prefix that all prompts share, and per row the turns that follow it.
        """
        written = [[(self._encode(*self._write(question, answer, []))) for question, answer, _ in row] for row in asked]
        return self._cut(written, asked, with_video=False)

    def turns_about(self, sampled: SampledVideo, asked: Sequence[Asked]) -> tuple[list[int], list[Turn]]:
        """Questions about one video, with its frames in front: their common prefix and the turns that follow it."""
        written = []
        for question, answer, _ in asked:
            prompt, reply = self._write(question, answer, [{"type": "video"}])
            written.append((self._encode_about(sampled, prompt + reply), len(self._encode_about(sampled, prompt))))
        prefix, (turns,) = self._cut([written], [asked], with_video=True)
        return prefix, turns

    def _write(self, question: str, answer: str, video: list[dict[str, str]]) -> tuple[str, str]:
        """The prompt, and the text that follows it when the answer is given."""
        user = {"role": "user", "content": [*video, {"type": "text", "text": question}]}
        assistant = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        template = partial(
            self.processor.tokenizer.apply_chat_template, chat_template=self.processor.chat_template, tokenize=False
        )
        prompt = template([user], add_generation_prompt=True)
        whole = template([user, assistant])
        if not whole.startswith(prompt):
            raise ValueError(
                "The processor's chat template does not continue its generation prompt with the answer; "
                f"it writes {whole[:200]!r} for a conversation and {prompt[:200]!r} for a question."
            )
        return prompt, whole[len(prompt) :].rstrip("\n")  # a model stops at the end of the utterance

    def _encode(self, prompt: str, reply: str) -> tuple[list[int], int]:
        tokenizer = self.processor.tokenizer
        whole = tokenizer.encode(prompt + reply, add_special_tokens=False)
        return whole, len(tokenizer.encode(prompt, add_special_tokens=False))

    def _encode_about(self, sampled: SampledVideo, text: str) -> list[int]:
        inputs = self.processor(
            text=[text],
            videos=[[sampled.frames[:, :2, :2]]],  # the ids depend on how many frames there are, not on their pixels
            video_metadata=[[sampled.metadata]],
            do_sample_frames=False,
            do_resize=False,
            return_tensors="pt",
        )
        return [int(token) for token in inputs["input_ids"][0]]

    @staticmethod
    def _cut(
        written: list[list[tuple[list[int], int]]], asked: Sequence[Sequence[Asked]], *, with_video: bool
    ) -> tuple[list[int], list[list[Turn]]]:
        everything = [(ids, start) for row in written for ids, start in row]
        # At least one token of the question stays in the turn: nothing is predicted from the prefix's last token.
        columns = zip(*(ids for ids, _ in everything), strict=False)
        common = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
        length = min(common, min(start for _, start in everything) - 1)
        turns = [
            [
                Turn(tuple(ids[length:]), start - length, kind, with_video)
                for (ids, start), (_, _, kind) in zip(row, questions, strict=True)
            ]
            for row, questions in zip(written, asked, strict=True)
        ]
        return everything[0][0][:length], turns
