"""Files of videos: uploads, their life, and who waits for them."""
