"""What goes with a pruned checkpoint to those who use it: its model card, and the upload to the hub."""
