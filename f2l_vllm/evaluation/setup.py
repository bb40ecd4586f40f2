"""How an evaluation answers its questions and scores the answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from f2l_vllm import models
from f2l_vllm.base_models.rate import check_keep_rate, check_rate
from f2l_vllm.evaluation.questions import ARMS, DROPPING_ARMS
from f2l_vllm.evaluation.rubrics import ANSWER, RUBRICS
from f2l_vllm.evaluation.scores import JUDGE, METRICS
from f2l_vllm.video.reading import ReadingOptions

SERVER, TRANSFORMERS = WAYS = ("server", "transformers")


@dataclass(frozen=True)
class JudgeSetup:
    """An OpenAI-compatible endpoint that judges, by one of `rubrics.RUBRICS`.

    Raises:
        ValueError: there is no such rubric; the message lists them.
    """

    base_url: str
    model: str
    api_key: str = field(repr=False)
    rubric: str = ANSWER

    def __post_init__(self) -> None:
        if self.rubric not in RUBRICS:
            raise ValueError(f"no rubric {self.rubric!r} for a judge: choose one of {', '.join(RUBRICS)}")


@dataclass(frozen=True)
class Setup:
    """How questions are answered and scored.

    Attributes:
        model: what `f2l-vllm serve` takes.
        hypernetwork: the model's own when None.
        arms: some of `questions.ARMS` and `questions.DROPPING_ARMS`; the latter are answered in process.
        composition: also ask under adapters of the video in these numbers of chunks, in process; the first is 1.
        through: `server` or `transformers`.
        base_url: a running server (ending in `/v1`) instead of one started for the evaluation.
        serve_flags: more flags for the server that is started.
        max_frames: frames read of a video, in every arm; as the hypernetwork was trained when None.
        merge_rate: part of the visual tokens to save, in context and in internalization.
        keep_rate: part of the visual tokens that the dropping arms keep.
        max_tokens: limit of an answer.
        concurrency: questions in work at a time.
        metric: the metric of the headline; the question set's own when None.
        margin: non-inferiority margin of that metric; the metric's own when None.

    Raises:
        ValueError: the values make no sense together; the message says which.
    """

    model: str = models.DEFAULT_MODEL
    hypernetwork: str | None = None
    arms: tuple[str, ...] = ARMS
    composition: tuple[int, ...] = ()
    through: str = SERVER
    base_url: str | None = None
    api_key: str = field(default="none", repr=False)
    serve_flags: str = ""
    max_frames: int | None = None
    merge_rate: float = 0.0
    keep_rate: float = 0.5
    max_tokens: int = 64
    concurrency: int = 8
    judge: JudgeSetup | None = None
    metric: str | None = None
    margin: float | None = None
    equivalence_margin: float | None = None

    def __post_init__(self) -> None:
        known = (*ARMS, *DROPPING_ARMS)
        if not self.arms or set(self.arms) - set(known) or len(set(self.arms)) < len(self.arms):
            raise ValueError(f"arms are some of {', '.join(known)}, each once; got {', '.join(self.arms) or 'none'}")
        if self.through not in WAYS:
            raise ValueError(f"questions are answered through {' or '.join(WAYS)}, not {self.through!r}")
        if self.through == TRANSFORMERS and (self.base_url or self.serve_flags):
            raise ValueError("a server's address or flags make no sense when transformers answers: leave them out")
        if self.base_url and (self.serve_flags or self.max_frames or self.merge_rate):
            raise ValueError(
                "a running server has its flags, frames and rate of merging: leave them out, or the address"
            )
        counts = self.composition
        if counts and (counts[0] != 1 or min(counts) < 1 or len(set(counts)) < len(counts)):
            raise ValueError(f"numbers of chunks are different ones, the first of them 1, as 1,2,4; got {counts}")
        check_rate(self.merge_rate)
        check_keep_rate(self.keep_rate)
        if self.merge_rate and self.drops:
            raise ValueError("tokens are merged or dropped: leave out --merge-rate, or the arms that drop them")
        if self.metric is not None and self.metric not in METRICS:
            raise ValueError(f"unknown metric {self.metric!r}: choose one of {', '.join(METRICS)}")
        if self.metric == JUDGE and self.judge is None:
            raise ValueError("the metric 'judge' needs a judge: name its endpoint and model")
        if any(margin is not None and not margin > 0 for margin in (self.margin, self.equivalence_margin)):
            raise ValueError("a margin is the largest difference that counts as none: it must be positive")

    @property
    def drops(self) -> bool:
        """Whether an arm drops visual tokens."""
        return bool(set(self.arms) & set(DROPPING_ARMS))

    @property
    def needs_models(self) -> bool:
        """Whether some questions are answered in process, whoever answers the others."""
        return self.base_url is None or self.drops or bool(self.composition)

    @property
    def reading(self) -> ReadingOptions:
        """How videos are read."""
        return ReadingOptions(self.max_frames, merge_rate=self.merge_rate)
