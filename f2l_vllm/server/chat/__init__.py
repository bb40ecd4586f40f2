"""Questions: what they may hold, which videos they name, and how they are answered."""
