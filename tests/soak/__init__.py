"""What takes long: fuzzing, models of the released shapes. Commands of their own."""
