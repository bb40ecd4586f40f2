"""The synthetic world: scenes of moving shapes, what is said of them, and real videos of them."""
