"""The nine data sets on which the paper compares adapters with frames in context.

Prompts, sample sizes, frames and margins are the paper's (sections 4 and B). It does not state which samples it drew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from f2l_vllm.evaluation.paper import readers
from f2l_vllm.evaluation.paper.readers import Item
from f2l_vllm.evaluation.rubrics import PAPER_CAPTION, PAPER_QUESTION

FRAMES, LONGEST_EDGE = 12, 384
JUDGE = "Qwen/Qwen3-VL-30B-A3B-Thinking-FP8"
SHORT = "Answer only the question, in one sentence."
_ASKED = "question"  # the type of an example that brings its own question


@dataclass(frozen=True)
class PaperSet:
    """One data set.

    Attributes:
        prompts: what is asked, by type of example; `{question}` stands for the example's own.
        sample: how many examples of each type; of VidCapBench, how many videos.
        source, licence: where it comes from; a licence that nobody could find says so.
        layout: what the annotations are; ends in "assumed" where no published file was seen.
        read: annotations -> examples.
    """

    name: str
    title: str
    prompts: dict[str, str]
    source: str
    licence: str
    layout: str
    read: Callable[[Path], list[Item]]
    sample: int = 500
    by_video: bool = False

    @property
    def rubric(self) -> str:
        """By which a judge scores its answers."""
        return PAPER_QUESTION if _ASKED in self.prompts else PAPER_CAPTION

    def ask(self, item: Item) -> str:
        """What is asked about an example."""
        return self.prompts[item.kind].replace("{question}", item.question)


_VDC = {
    "short": "Summarize this video in one detailed sentence.",
    "detailed": "Describe this video in detail.",
    "camera": "Describe the camera work, framing, and viewpoint in this video.",
    "background": "Describe the background, setting, and environment in this video.",
    "main object": "Describe the main subject and its actions in this video.",
}
_CARE = {
    "caption": "Describe the video in as much useful visual detail as possible. Include the main activity, visible "
    "people or objects, scene context, appearance, and any important visual details that help explain what is "
    "happening.",
    "events": "Describe the key visible events in chronological order. Include all important actions and changes you "
    "can observe, with enough detail to distinguish each event clearly.",
    "objects": "Describe the important visible objects and entities in the video in as much useful detail as possible. "
    "Include their appearance, location, and role in the scene when visible.",
    "spatial": "Describe the spatial layout in as much useful detail as possible: where the people, objects, and scene "
    "elements are located, how they are positioned relative to each other, and what parts of the scene are in the "
    "foreground, background, left, right, center, above, or below.",
    "temporal": "Describe the temporal progression in as much useful detail as possible. Explain what happens over "
    "time, the order of visible actions, and how the scene or subjects change from the beginning to the end.",
}
_QUESTION = {_ASKED: "{question}\n\n" + SHORT}
_UNKNOWN = "not found"

SETS = {
    one.name: one
    for one in (
        PaperSet(
            "activitynet-captions",
            "ActivityNet Captions",
            {"caption": "Describe what is happening in this video."},
            "https://cs.stanford.edu/people/ranjaykrishna/densevid",
            _UNKNOWN,
            "val_1.json: {video: {duration, timestamps, sentences}}; the sentences together are the reference",
            readers.activitynet_captions,
        ),
        PaperSet(
            "plm-rdcap",
            "PLM-RDCap",
            {"caption": "Describe what happens in this video."},
            "https://huggingface.co/datasets/facebook/PLM-VideoBench",
            "CC-BY-4.0",
            "parquet or JSONL: uid, video, dense_captions [{caption}]; together they are the reference",
            readers.plm_rdcap,
        ),
        PaperSet(
            "plm-rcap",
            "PLM-RCap",
            {"caption": "Describe what happens in this video clip."},
            "https://huggingface.co/datasets/facebook/PLM-VideoBench",
            "CC-BY-4.0",
            "parquet or JSONL: video, caption, start_frame, end_frame, at 6 frames a second; the clip is cut to them",
            readers.plm_rcap,
        ),
        PaperSet(
            "vdc",
            "VDC",
            _VDC,
            "https://huggingface.co/datasets/wchai/lmms_VDC_test",
            _UNKNOWN,
            "a folder with short, detailed, camera, background and main_object, each parquet, JSON or JSONL: "
            "video_name, caption; assumed",
            readers.vdc,
        ),
        PaperSet(
            "carebench",
            "CaReBench",
            _CARE,
            "https://huggingface.co/datasets/MCG-NJU/CaReBench",
            "MIT",
            "JSON: [{video, caption, events, objects, spatial, temporal}]; assumed",
            readers.carebench,
        ),
        PaperSet(
            "nextqa",
            "NExT-QA",
            _QUESTION,
            "https://github.com/doc-doc/NExT-OE",
            _UNKNOWN,
            "test.csv: video, question, answer, qid, type",
            readers.nextqa,
        ),
        PaperSet(
            "activitynet-qa",
            "ActivityNet-QA",
            _QUESTION,
            "https://github.com/MILVLG/activitynet-qa",
            "MIT",
            "a folder with test_q.json [{video_name, question, question_id}] and test_a.json [{answer, question_id}]",
            readers.activitynet_qa,
        ),
        PaperSet(
            "plm-sgqa",
            "PLM-SGQA",
            _QUESTION,
            "https://huggingface.co/datasets/facebook/PLM-VideoBench",
            "CC-BY-4.0",
            "parquet or JSONL: uid, video, question, answer",
            readers.plm_sgqa,
        ),
        PaperSet(
            "vidcapbench",
            "VidCapBench",
            _QUESTION,
            "https://github.com/VidCapBench/VidCapBench",
            _UNKNOWN,
            "VidCapBench-AE_QA.jsonl: {video_dir, QA_pairs: [{question, answer}]}",
            readers.vidcapbench,
            sample=100,
            by_video=True,
        ),
    )
}


def find(name: str) -> PaperSet:
    """A set by its name.

    Raises:
        ValueError: there is no such set; the message lists them.
    """
    if name not in SETS:
        raise ValueError(f"no set {name!r}: choose one of {', '.join(SETS)}")
    return SETS[name]
