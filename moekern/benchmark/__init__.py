"""The kernels against what a user would write instead, on layers of models people prune. Correct first, then timed."""
