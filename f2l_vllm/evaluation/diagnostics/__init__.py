"""Why answers are as they are: takes an adapter apart to find which of its parts answers depend on."""
