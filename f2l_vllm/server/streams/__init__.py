"""Live streams: what is pushed or pulled, composed, asked and watched."""
