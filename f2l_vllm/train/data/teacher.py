"""The teacher that writes target answers: the frozen base model, which sees the frames in its context.

The model runs in this process, through transformers, or behind an OpenAI-compatible server that answers `video_url`
parts from frames, like this project's.

Shape suffixes: B questions, T tokens, D hidden size, V visual tokens of the clip.
"""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from f2l_vllm.base_models.text_layers import check_length
from f2l_vllm.hypernetwork.encoder import VideoEncoder
from f2l_vllm.train.data.clips import UnusableVideoError, clip_file, open_example
from f2l_vllm.train.data.manifest import Example
from f2l_vllm.video.sample import SampledVideo, Sampling

REFUSED = "refused_by_server"
TOO_LONG = "too_long_for_model"
_QUESTIONS_AT_ONCE = 16
_RETRIES = 5  # of a request to a server that is busy or starting again
_REFUSALS = (400, 413, 422)  # of this video; any other error is the server's or the user's


class TeacherError(RuntimeError):
    """The teacher cannot go on; nothing is wrong with the example."""


@dataclass(frozen=True)
class TeacherAnswer:
    """The teacher's answer. `finish_reason` is `stop`, or `length` if the limit on tokens cut the answer off."""

    text: str
    finish_reason: str


class Teacher(Protocol):
    """Answers questions about clips.

    Attributes:
        settings: what its answers depend on, the model first of all.
        concurrency: how many clips it takes at a time.
    """

    settings: dict[str, Any]
    concurrency: int

    def answer(self, examples: Sequence[Example]) -> list[TeacherAnswer]:
        """Greedy answers to the prompts of examples about one clip.

        Raises:
            UnusableVideoError: the clip cannot be used.
            TeacherError: the teacher cannot be used.
        """
        ...


class LocalTeacher:
    """A model in this process. It sees a clip once, however many questions are asked about it.

    Args:
        model: a transformers model of a known family; its device and dtype are kept.
        processor: the model's processor.
        name: the targets name it as their writer.
        max_tokens: limit of an answer.
        sampling: which frames are read; the processor's own choice when None.
    """

    concurrency = 1

    def __init__(
        self, model: nn.Module, processor: Any, name: str, *, max_tokens: int, sampling: Sampling | None = None
    ) -> None:
        self.sampling = sampling or Sampling()
        self.settings = {
            "model": name,
            "max_tokens": max_tokens,
            "max_frames": self.sampling.max_frames,
            "fps": self.sampling.fps,
        }
        self._model: Any = model.eval()
        self._processor = processor
        self._encoder = VideoEncoder(model, processor)
        self._max_tokens = max_tokens

    @classmethod
    def load(cls, directory: Path, name: str, *, max_tokens: int, sampling: Sampling | None = None) -> LocalTeacher:
        """Load model and processor: onto a GPU in the checkpoint's precision, or onto the CPU in fp32.

        Raises:
            ValueError: the model cannot be loaded.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        device, dtype = ("cuda", "auto") if torch.cuda.is_available() else ("cpu", torch.float32)
        try:
            model: Any = AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype)
            processor = AutoProcessor.from_pretrained(directory)
        except OSError as error:
            raise ValueError(f"The teacher {name!r} cannot be loaded from {directory}: {error}") from error
        return cls(model.to(device), processor, name, max_tokens=max_tokens, sampling=sampling)

    @torch.no_grad()
    def answer(self, examples: Sequence[Example]) -> list[TeacherAnswer]:
        """As `Teacher.answer`."""
        clip = open_example(examples[0], self._processor, self.sampling)
        visual_VD = self._encoder.see(clip)
        answers: list[TeacherAnswer] = []
        for start in range(0, len(examples), _QUESTIONS_AT_ONCE):
            prompts = [example.prompt for example in examples[start : start + _QUESTIONS_AT_ONCE]]
            answers += self._generate([self._tokens(clip, prompt) for prompt in prompts], visual_VD)
        return answers

    def _tokens(self, clip: SampledVideo, prompt: str) -> Tensor:
        """Token ids [T] of one user turn with the video and the prompt, and the start of the answer."""
        blank = clip.frames[:, :2, :2]  # the ids depend on how many frames there are and when, not on their pixels
        message = {"role": "user", "content": [{"type": "video", "video": blank}, {"type": "text", "text": prompt}]}
        options = {"do_sample_frames": False, "video_metadata": [[clip.metadata]], "do_resize": False}
        inputs = self._processor.apply_chat_template(
            [message],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=options,
        )
        ids: Tensor = inputs["input_ids"][0]
        return ids

    def _generate(self, ids: Sequence[Tensor], visual_VD: Tensor) -> list[TeacherAnswer]:
        longest = max(len(one) for one in ids)
        try:
            check_length(self._model, longest, self._max_tokens)
        except ValueError as error:
            raise UnusableVideoError(TOO_LONG, str(error)) from error
        pad = self._processor.tokenizer.pad_token_id
        ids_BT = torch.stack([nn.functional.pad(one, (longest - len(one), 0), value=pad) for one in ids])
        mask_BT = torch.stack([torch.arange(longest) >= longest - len(one) for one in ids])
        ids_BT, mask_BT = ids_BT.to(visual_VD.device), mask_BT.to(visual_VD.device)
        embeds_BTD = self._model.get_input_embeddings()(ids_BT)
        places_BT = (ids_BT == self._model.config.image_token_id) & mask_BT
        embeds_BTD[places_BT] = visual_VD.to(embeds_BTD.dtype).repeat(len(ids), 1)
        output_BT = self._model.generate(
            inputs_embeds=embeds_BTD,
            attention_mask=mask_BT.long(),
            max_new_tokens=self._max_tokens,
            do_sample=False,
        )
        ends = self._model.generation_config.eos_token_id
        ends = torch.tensor(ends if isinstance(ends, list) else [ends], device=output_BT.device)
        finished = torch.isin(output_BT, ends).any(1).tolist()
        texts = self._processor.batch_decode(output_BT, skip_special_tokens=True)
        return [
            TeacherAnswer(text.strip(), "stop" if end else "length") for text, end in zip(texts, finished, strict=True)
        ]


class ServerTeacher:
    """A model behind an OpenAI-compatible server. Clips travel in the request; the server samples their frames.

    Args:
        base_url: e.g. http://127.0.0.1:8000/v1
        model: the name it is served under; the server's first model when None.
        max_tokens: limit of an answer.
        concurrency: requests at a time.

    Raises:
        ValueError: the server cannot be reached, refuses the key, or does not have the model.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str,
        model: str | None = None,
        *,
        max_tokens: int,
        concurrency: int = 8,
    ) -> None:
        from openai import OpenAI, OpenAIError

        self._client = OpenAI(base_url=base_url, api_key=api_key, max_retries=_RETRIES)
        try:
            names = [one.id for one in self._client.models.list() if not getattr(one, "parent", None)]
        except OpenAIError as error:
            raise ValueError(f"The server at {base_url} does not list its models: {error}") from error
        if not names or (model is not None and model not in names):
            raise ValueError(f"The server at {base_url} does not serve {model or 'any model'}, but {names}.")
        self._model = model or names[0]
        self._max_tokens = max_tokens
        self.settings = {"model": self._model, "max_tokens": max_tokens}
        self.concurrency = concurrency

    def answer(self, examples: Sequence[Example]) -> list[TeacherAnswer]:
        """As `Teacher.answer`."""
        with tempfile.TemporaryDirectory(prefix="f2l-clip-") as folder:
            video = clip_file(examples[0], Path(folder)).read_bytes()
        url = "data:video/mp4;base64," + base64.b64encode(video).decode()
        return [self._ask(url, example.prompt) for example in examples]

    def _ask(self, url: str, prompt: str) -> TeacherAnswer:
        from openai import APIStatusError, OpenAIError

        content: list[Any] = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": prompt}]
        try:
            completion = self._client.chat.completions.create(
                model=self._model,
                messages=[{"role": "user", "content": content}],
                max_completion_tokens=self._max_tokens,
                temperature=0,
                extra_body={"f2l": {"mode": "frames"}},
            )
        except APIStatusError as error:
            if error.status_code in _REFUSALS:
                raise UnusableVideoError(REFUSED, error.message) from error
            raise TeacherError(f"The server answers with {error.status_code}: {error.message}") from error
        except OpenAIError as error:
            raise TeacherError(f"The server cannot be reached any more: {error}") from error
        choice = completion.choices[0]
        return TeacherAnswer((choice.message.content or "").strip(), choice.finish_reason)
