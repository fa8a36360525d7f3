"""One page about a pruning: what statistics, plans and an evaluation tell, as plain data and as a file of HTML."""
