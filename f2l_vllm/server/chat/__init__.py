"""Questions: what they may hold, which videos they mean, and how they are answered."""
