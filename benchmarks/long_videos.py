"""`python -m benchmarks.long_videos`: films that grow from 12 frames to an hour, and questions about their moments.

Exact match from an adapter in one pass over all frames, from one composed of chunks, from all frames in context until
they no longer fit, and from the question alone; docs/long-videos.md. The shipped model was not trained on films of
several scenes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from f2l_vllm.bench import record
from f2l_vllm.evaluation.long_videos import long_videos, markdown
from f2l_vllm.evaluation.setup import Setup


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="f2l-tiny")
    parser.add_argument("--hypernetwork")
    parser.add_argument("--frames", type=int, nargs="+", default=[12, 24, 64, 256, 1024, 3600], help="and seconds")
    parser.add_argument("--films", type=int, default=8, help="of each length")
    parser.add_argument("--questions", type=int, default=4, help="of each type about each film")
    parser.add_argument("--max-chunks", type=int, default=15)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--work", type=Path, help="folder for films and answers, to resume in; default: temporary")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--markdown", type=Path, help="write the table here, too")
    options = parser.parse_args()
    setup = Setup(options.model, options.hypernetwork, max_tokens=16)
    with TemporaryDirectory(prefix="f2l-long-videos-") as temporary:
        results = long_videos(
            options.frames,
            options.films,
            setup,
            options.work or Path(temporary),
            questions=options.questions,
            seed=options.seed,
            max_chunks=options.max_chunks,
            on_progress=lambda stage, done, total: print(f"{stage}: {done} of {total}", flush=True),
        )
    names = ("model", "hypernetwork", "frames", "films", "questions", "max_chunks", "seed")
    record.write(options.json, {name: getattr(options, name) for name in names}, results)
    print(markdown(results))
    if options.markdown:
        options.markdown.write_text(markdown(results))


if __name__ == "__main__":
    main()
