"""Pictures and frames in a prompt: fetched and decoded within limits, while tenants take turns."""
