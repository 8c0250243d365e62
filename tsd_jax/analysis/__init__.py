"""Analysis: arrays from the files of a run, and plots of them."""
