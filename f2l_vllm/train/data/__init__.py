"""What is trained on: manifests, clips, and the targets that a teacher writes."""
