"""What can be known from config and headers alone: experts, bytes, and the memory a pruned model takes."""
