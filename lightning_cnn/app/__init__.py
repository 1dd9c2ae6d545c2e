"""One file per verb: the only imports of hydra."""
