"""Studies over seeds: a design file in, one small JSON for every finished cell, findings out."""
