"""Video files: uploads, their life cycle, and waiting for them."""
