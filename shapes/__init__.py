"""The world of shapes: a toy data set with a scorer, and what makes a tiny model learn it."""
