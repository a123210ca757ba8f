"""`seqzoo ablate`: a grid of small models, each trained as a cell, and one table of what came."""
