"""What happens during a run, as events, and who shows or keeps them."""
