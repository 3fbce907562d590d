"""Feature networks, and the features of a data set."""
