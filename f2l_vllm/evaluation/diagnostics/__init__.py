"""Why answers are as they are: an adapter taken apart, and what of it answers depend on."""
