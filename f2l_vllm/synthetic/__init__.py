"""The synthetic world: scenes of moving shapes, questions about them, and real videos of them."""
