"""What people need to judge a pruned model, beyond losses: the model in memory under a plan, and what it writes."""
