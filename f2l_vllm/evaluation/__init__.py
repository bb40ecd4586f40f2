"""How good answers are: questions with known answers, asked in every arm, scored, compared and reported."""
