"""Training of a hypernetwork for any base model, from manifests."""
