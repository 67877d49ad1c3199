"""What a run will take, before any money is spent: arithmetic in cost, what has to be measured, and the tables."""
