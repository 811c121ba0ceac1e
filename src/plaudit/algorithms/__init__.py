"""The ideas: each algorithm says where its batches come from, what one unit is, and what the loss is."""
