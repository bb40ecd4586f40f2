"""No server, no Ray, no engine: the tier that runs in minutes."""
