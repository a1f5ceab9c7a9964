"""What the routers are worth: equal steps, equal seeds, two data sets, one table."""
