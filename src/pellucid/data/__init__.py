"""Text in, rows of tokens out: corpora, readers, the train/validation split, packing, and the baselines to beat."""
