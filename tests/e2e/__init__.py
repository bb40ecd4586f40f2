"""Real servers, Ray actors and engines, shared where tests leave them as they found them."""
