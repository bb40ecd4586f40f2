"""What tests share: servers, videos, checkpoints, databases, disks."""

from pathlib import Path

ROOT = Path(__file__).parents[2]  # of the repository
