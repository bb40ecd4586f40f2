"""Folders in FineVideo's layout, with real (tiny) videos: `metadata/sample_0.json`, `videos/sample_0.mp4`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tests.support.videos import write_video

SECONDS = 60


def timestamp(seconds: float) -> str:
    """As FineVideo writes it: HH:MM:SS.mmm."""
    return f"{int(seconds) // 3600:02d}:{int(seconds) // 60 % 60:02d}:{seconds % 60:06.3f}"


def times(start: float, end: float) -> dict[str, str]:
    return {"start_timestamp": timestamp(start), "end_timestamp": timestamp(end)}


def scene(number: int, start: float, end: float, **changes: Any) -> dict[str, Any]:
    """One scene with all fields that the dataset has."""
    return {
        "activities": [
            {"description": f"A person does thing {number}", "timestamp": times(start, (start + end) / 2)},
            {"description": f"Then thing {number} ends.", "timestamp": times((start + end) / 2, end)},
        ],
        "audioVisualCorrelation": 0.8,
        "cast": ["A person"],
        "characterInteraction": [],
        "contextualRelevance": "It shows how.",
        "dynamismScore": 0.5,
        "mood": {"description": "Calm", "keyMoments": []},
        "narrativeProgression": [{"description": "It begins.", "timestamp": timestamp(start)}],
        "props": [{"name": "Ball", "timestamp": times(start, end)}],
        "sceneId": number + 1,
        "thematicElements": "Play",
        "timestamps": times(start, end),
        "title": f"Scene {number}",
        "videoEditingDetails": [{"description": "A cut", "timestamps": times(start, end)}],
        **changes,
    }


def entry(video_id: str, scenes: list[Any], **content: Any) -> dict[str, Any]:
    """One video's JSON object."""
    return {
        "content_fine_category": "Ball games",
        "content_metadata": {
            "characterList": [{"characterId": "1", "description": "Tall", "name": "A person"}],
            "description": f"Video {video_id} shows a person  who plays",
            "fps": 25.0,
            "qAndA": [{"question": "Who plays?", "answer": "A person."}],
            "scenes": scenes,
            "storylines": {"climax": {"description": "A goal", "timestamp": timestamp(20)}, "scenes": [1]},
            "title": f"Title {video_id}",
            "trimmingSuggestions": [],
            **content,
        },
        "content_parent_category": "Sports",
        "duration_seconds": SECONDS,
        "original_json_filename": f"{video_id}.json",
        "original_video_filename": f"{video_id}.mp4",
        "resolution": "640x360",
        "text_to_speech": "We say something.",
        "timecoded_text_to_speech": [{"start": timestamp(0), "end": timestamp(3), "text": "We say something."}],
        "youtube_title": "Watch this",
    }


class FineVideo:
    """Two folders that grow; every video is a link to one of `SECONDS` seconds."""

    def __init__(self, root: Path) -> None:
        self.metadata, self.videos = root / "metadata", root / "videos"
        for folder in (self.metadata, self.videos):
            folder.mkdir()
        self._video = write_video(root / "minute.mp4", frames=SECONDS * 2, fps=2)
        self._count = 0

    def add(self, entry: object, *, video: bool = True) -> str:
        """Add one video and its metadata; the files' common name."""
        name = f"sample_{self._count}"
        self._count += 1
        text = entry if isinstance(entry, str) else json.dumps(entry)
        (self.metadata / f"{name}.json").write_text(text)
        if video:
            os.link(self._video, self.videos / f"{name}.mp4")
        return name
