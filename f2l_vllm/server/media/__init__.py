"""Pictures and frames in a prompt: fetched and decoded within limits, tenants taking turns."""
